"""`parallama limits`: units and windows, keys, the shadow, resets, grants."""

import os
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from parallama.cli.options import parse_end
from parallama.config import load
from parallama.counters import Call, Counters
from parallama.db.manage import grants
from parallama.db.policies import policy_of
from parallama.errors import UsageError
from parallama.limits import Unit
from parallama.stores import connect_redis
from ratelimit import rules
from tests.parallama.commands import Parallama
from tests.parallama.db_on_disk import NOW, Opened, on
from tests.parallama.servers import Server

EVERY = {
    f"{unit}_per_{window}": number
    for number, (unit, window) in enumerate(
        (unit, window)
        for unit in ("requests", "tokens", "compute_seconds")
        for window in ("minute", "hour", "day", "month")
    )
}
BERLIN = ZoneInfo("Europe/Berlin")


@pytest.fixture
def berlin(cli: Parallama, monkeypatch: pytest.MonkeyPatch) -> Parallama:
    """Somewhere else than in UTC, with a user and a key."""
    monkeypatch.setenv("PARALLAMA_RATE_LIMITING__TIME_ZONE", "Europe/Berlin")
    cli.json("users", "create", "anna")
    cli.json("keys", "create", "anna", "--name", "laptop")
    return cli


def options(**values: object) -> list[str]:
    return [
        word
        for name, value in values.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


# set, list, unset


def test_every_limit_is_set_and_shown(berlin: Parallama) -> None:
    money = {"cost_per_day": "12.50", "cost_per_month": "0.000000001"}
    given = EVERY | money | {"concurrent": 3}
    made = berlin.json("limits", "set", "anna", "--gateway", "*", *options(**given))
    shown = EVERY | {"cost_per_day": "12.5", "cost_per_month": "0.000000001", "concurrent": 3}
    assert {name: made[name] for name in given} == shown
    assert (made["scope"], made["shadow"], made["key_id"]) == ("anna", False, None)
    (listed,) = berlin.json("limits", "list", "anna")
    assert {name: listed[name] for name in made} == made
    assert list(listed)[-4:] == [
        f"{window}_resets_at" for window in ("minute", "hour", "day", "month")
    ]


def test_a_table_has_a_line_for_each_limit_and_nothing_else(berlin: Parallama) -> None:
    given = {"requests_per_day": 5, "tokens_per_day": 200000, "compute_seconds_per_day": 60}
    more = {"cost_per_month": "12.50", "concurrent": 2}
    table = berlin.table(
        *("limits", "set", "anna", "--gateway", "ollama", "--model", "llama3*"),
        *options(**given, **more),
    )
    header, *lines = [line.split("  ") for line in table.splitlines()]
    assert [cell.strip() for cell in header if cell] == [
        "SCOPE", "GATEWAY", "MODEL", "LIMIT", "NO ROOM", "RESETS AT", "SHADOW",
    ]  # fmt: skip
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert {tuple(line[:3]) for line in cells} == {("anna", "ollama", "llama3*")}
    assert [line[3] for line in cells] == [
        "5 requests per day",
        "200000 tokens per day",
        "60 compute seconds per day",
        "cost 12.5 per month",
        "2 requests at once",
    ]
    assert [line[4] for line in cells] == ["-"] * 5  # nothing runs that counts
    assert [line[6] for line in cells] == ["no"] * 5
    assert cells[-1][5] == "-"
    assert berlin.table("limits", "list") == table


def test_a_reset_is_midnight_where_the_configuration_says(berlin: Parallama) -> None:
    given = options(tokens_per_day=1, tokens_per_month=1, concurrent=1)
    before = datetime.now(BERLIN)
    berlin.json("limits", "set", "anna", "--gateway", "*", *given)
    (listed,) = berlin.json("limits", "list")
    after = datetime.now(BERLIN)
    midnights = {
        (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
        for now in (before, after)
    }
    day = datetime.fromisoformat(listed["day_resets_at"])
    assert listed["day_resets_at"].endswith("Z")
    assert day in midnights
    month = datetime.fromisoformat(listed["month_resets_at"]).astimezone(BERLIN)
    assert (month.day, month.hour) == (1, 0)
    assert timedelta(0) < month - before < timedelta(days=32)
    assert (listed["minute_resets_at"], listed["hour_resets_at"]) == (None, None)
    assert f"  {day.astimezone(BERLIN).isoformat()}  " in berlin.table("limits", "list")


def test_a_keys_limits_go_by_name_id_or_public_part(berlin: Parallama) -> None:
    (key,) = berlin.json("keys", "list")
    for name in ("laptop", key["id"], key["key_prefix"]):
        made = berlin.json(
            "limits", "set", f"key:{name}", "--gateway", "*", "--tokens-per-day", "5"
        )
        assert (made["scope"], made["key_id"], made["user_id"]) == (
            f"key:{key['key_prefix']}", key["id"], key["user_id"],
        )  # fmt: skip
    assert len(berlin.json("limits", "list")) == 1
    assert [row["scope"] for row in berlin.json("limits", "list", "anna")] == [made["scope"]]
    assert f"{made['scope']} (anna's 'laptop')  " in berlin.table("limits", "list", "key:laptop")
    assert berlin.json("limits", "unset", "key:laptop", "--gateway", "*") == {"removed": 1}
    assert berlin.json("limits", "list") == []


def test_the_shadow_is_set_shown_and_unset_apart(berlin: Parallama) -> None:
    day = ("limits", "set", "anna", "--gateway", "*", "--tokens-per-day")
    berlin.json(*day, "100")
    assert berlin.json(*day, "50", "--shadow")["shadow"] is True
    assert [row["tokens_per_day"] for row in berlin.json("limits", "list")] == [100, 50]
    assert [line.split()[-1] for line in berlin.table("limits", "list").splitlines()] == [
        "SHADOW", "no", "yes",
    ]  # fmt: skip
    assert berlin.json("limits", "unset", "anna", "--shadow") == {"removed": 1}
    assert [row["tokens_per_day"] for row in berlin.json("limits", "list")] == [100]
    assert "no limits" in berlin.refused(3, "limits", "unset", "anna", "--shadow")
    berlin.json(*day, "50", "--shadow")
    assert berlin.json("limits", "unset", "anna") == {"removed": 2}


def counting(cli: Parallama, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """From here on commands find counters."""
    monkeypatch.setenv("PARALLAMA_REDIS__HOST", "127.0.0.1")
    monkeypatch.setenv("PARALLAMA_REDIS__PORT", str(server.port))


def call(cli: Parallama, user: str, number: int) -> None:
    """As ratelimit decides about one, by what is set now."""

    async def work(at: Opened) -> None:
        policy = await policy_of(at.store, user)
        config = load(cli.config, os.environ)
        now = datetime.now(UTC).timestamp()
        met = rules.buckets(policy.limits, "ollama", "m", "", now, config.rate_limiting.zone)
        async with (
            connect_redis(config) as redis,
            aclosing(Counters(redis, lease=60, timeout=5)) as counters,
        ):
            since = await counters.begin(user, 0)
            ask = Call(f"r{number}", user, "", "ollama", "ollama", "/api/chat", "m", now)
            holds = [each.hold(1) for each in met]
            spent = [(hold, 0) for hold in holds if hold.unit is not Unit.CONCURRENT]
            await counters.seed(user, since, spent, [], now)
            await counters.reserve(ask, holds, tokens=1, least=0, now=now)

    on(cli.folder, work)


def test_how_often_there_was_no_room_is_listed(
    berlin: Parallama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For the shadow, for real limits, and for a role's where they are asked for by the user."""
    user = berlin.json("users", "list")[0]["id"]
    month = ("--gateway", "*", "--requests-per-month")
    berlin.json("limits", "set", "anna", *month, "3")
    berlin.json("limits", "set", "anna", *month, "2", "--shadow")
    berlin.json("limits", "set", "role:user", *month, "1")
    berlin.json("limits", "set", "role:user", "--gateway", "*", "--concurrent", "4", "--shadow")
    with Server(tmp_path / "redis") as server:
        counting(berlin, monkeypatch, server)
        for number in range(5):
            call(berlin, user, number)
        listed = {
            (row["scope"], row["shadow"]): [
                row["requests_per_month_no_room"], row["concurrent_no_room"]
            ]
            for row in berlin.json("limits", "list", "anna")
        }  # fmt: skip
        assert listed == {
            ("anna", False): [2, None],
            ("anna", True): [1, None],
            ("role:user", False): [None, None],  # it does not count: she has her own
            ("role:user", True): [None, 0],
        }
        lines = [line.split() for line in berlin.table("limits", "list", "anna").splitlines()]
        assert [line[-3] for line in lines[1:]] == ["-", "0", "2", "1"]
        everybody = {row["scope"]: row for row in berlin.json("limits", "list")}
        assert everybody["role:user"]["concurrent_no_room"] is None
        assert everybody["anna"]["requests_per_month_no_room"] == 1
    assert berlin.json("limits", "list")[0]["requests_per_month_no_room"] is None  # it is away


def test_no_limit_is_an_answer_too(berlin: Parallama) -> None:
    assert berlin.json("limits", "list") == []
    assert berlin.table("limits", "list").split()[:3] == ["SCOPE", "GATEWAY", "MODEL"]
    assert berlin.json("limits", "grants") == []


@pytest.mark.parametrize(
    ("code", "words", "complaint"),
    [
        (2, ("anna", "--cost-per-day", "-1"), "not an amount: '-1'"),
        (2, ("anna", "--cost-per-day", "NaN"), "not an amount: 'NaN'"),
        (2, ("anna", "--cost-per-day", "1e3"), "not an amount: '1e3'"),
        (2, ("anna", "--cost-per-day", "1,000"), "anything between thousands"),
        (2, ("anna", "--cost-per-day", "0.0000000001"), "at most 9 decimals"),
        (2, ("anna", "--cost-per-day", "1000000.01"), "from 0 to 1000000, not 1000000.01"),
        (2, ("anna", "--cost-per-hour", "1"), "No such option"),
        (2, ("anna", "--concurrent", "-1"), "'--concurrent'"),
        (2, ("anna", "--compute-seconds-per-day", "1.5"), "integer"),
        (2, ("anna", "--compute-seconds-per-day", "1000000000001"), "from 0 to 1000000000000"),
        (3, ("key:ghost", "--tokens-per-day", "1"), "there is no key 'ghost'"),
        (4, ("key:twice", "--tokens-per-day", "1"), "2 keys are named 'twice'"),
    ],
)
def test_a_limit_that_nobody_could_mean_is_refused(
    berlin: Parallama, code: int, words: tuple[str, ...], complaint: str
) -> None:
    for _ in range(2):
        berlin.json("keys", "create", "anna", "--name", "twice")
    assert complaint in berlin.refused(code, "limits", "set", "--gateway", "*", *words)
    assert berlin.json("limits", "list") == []


def test_a_whole_key_as_a_scope_is_refused_and_not_repeated(berlin: Parallama) -> None:
    token = berlin.json("keys", "create", "anna")["key"]
    complaint = berlin.refused(
        2, "limits", "set", f"key:{token}", "--gateway", "*", "--tokens-per-day", "1"
    )
    assert token not in complaint


def test_a_time_zone_that_nobody_knows_is_a_mistake_of_the_configuration(
    berlin: Parallama, monkeypatch: pytest.MonkeyPatch
) -> None:
    for zone in ("Mars/Olympus", "../etc/passwd", "Europe", ""):
        monkeypatch.setenv("PARALLAMA_RATE_LIMITING__TIME_ZONE", f'"{zone}"')
        complaint = berlin.refused(1, "limits", "list")
        assert "rate_limiting.time_zone" in complaint
        assert "IANA name, such as Europe/Berlin" in complaint


# Grants


def test_grants_are_made_listed_and_revoked(berlin: Parallama) -> None:
    before = datetime.now(UTC)
    made = berlin.json("limits", "grant", "anna", "--tokens", "200000", "--until", "3d")
    until = datetime.fromisoformat(made["until"])
    assert timedelta(0) <= until - before - timedelta(days=3) < timedelta(minutes=1)
    assert made == {
        "id": made["id"], "user": "anna", "user_id": made["user_id"], "gateway": "*", "model": "*",
        "unit": "tokens", "amount": 200000, "created_at": made["created_at"],
        "until": made["until"], "over": False,
    }  # fmt: skip
    cost = berlin.json(
        *("limits", "grant", "anna", "--cost", "2.50", "--until", "2999-12-31"),
        *("--gateway", "ollama", "--model", "llama3*"),
    )
    assert (cost["unit"], cost["amount"], cost["until"]) == ("cost", "2.5", "2999-12-31T23:00:00Z")
    assert (cost["gateway"], cost["model"]) == ("ollama", "llama3*")
    assert (
        berlin.json("limits", "grants") == berlin.json("limits", "grants", "anna") == [made, cost]
    )
    table = berlin.table("limits", "grants", "anna").splitlines()
    assert table[2].split() == [
        cost["id"], "anna", "ollama", "llama3*", "2.5", "cost", "3000-01-01T00:00:00+01:00", "no",
    ]  # fmt: skip
    assert berlin.json("limits", "revoke-grant", made["id"]) == made
    assert berlin.json("limits", "grants") == [cost]


def test_a_grant_of_yesterday_is_listed_among_all_as_over(berlin: Parallama) -> None:
    async def work(at: Opened) -> None:
        for until in (NOW + timedelta(days=1), datetime(2999, 1, 1, tzinfo=UTC)):
            await grants.grant(at.desk(), "anna", Unit.REQUESTS, 1, until=until)

    on(berlin.folder, work)
    assert [grant["over"] for grant in berlin.json("limits", "grants")] == [False]
    assert [grant["over"] for grant in berlin.json("limits", "grants", "--all")] == [True, False]
    table = berlin.table("limits", "grants", "anna", "--all")
    assert [line.split()[-1] for line in table.splitlines()] == [
        "OVER", "yes", "no",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "words", "complaint"),
    [
        (2, ("anna", "--until", "3d"), "name one of --tokens, --requests, --compute-seconds"),
        (2, ("anna", "--tokens", "1", "--cost", "1", "--until", "3d"), "name one of --tokens"),
        (2, ("anna", "--tokens", "1"), "Missing option '--until'"),
        (2, ("anna", "--tokens", "0", "--until", "3d"), "'--tokens'"),
        (2, ("anna", "--cost", "0", "--until", "3d"), "grants nothing"),
        (2, ("anna", "--cost", "-1", "--until", "3d"), "not an amount"),
        (
            2,
            ("anna", "--tokens", "1", "--until", "2020-01-01"),
            "cannot end in the past: 2020-01-01",
        ),
        (2, ("anna", "--tokens", "1", "--until", "0d"), "cannot end in the past"),
        (2, ("anna", "--tokens", "1", "--until", "soon"), "not a time: 'soon'; write 3d, tomorrow"),
        (2, ("anna", "--tokens", "1", "--until", "9999-12-31"), "too long a time"),
        (2, ("anna", "--tokens", "1", "--until", "999999999d"), "too long a time"),
        (2, ("anna", "--tokens", "1", "--until", "3d", "--gateway", "x"), "'x' is not"),
        (3, ("ghost", "--tokens", "1", "--until", "3d"), "there is no user 'ghost'"),
        (3, ("role:user", "--tokens", "1", "--until", "3d"), "there is no user 'role:user'"),
    ],
)
def test_a_grant_that_nobody_could_mean_is_refused(
    berlin: Parallama, code: int, words: tuple[str, ...], complaint: str
) -> None:
    assert complaint in berlin.refused(code, "limits", "grant", *words)
    assert berlin.json("limits", "grants") == []


def test_what_is_no_grant_cannot_be_revoked(berlin: Parallama) -> None:
    assert "there is no grant 'x'" in berlin.refused(3, "limits", "revoke-grant", "x")


SATURDAY = datetime(2026, 3, 28, 22, 30, tzinfo=UTC)  # 23:30 in Berlin, where clocks change next


@pytest.mark.parametrize(
    ("when", "until"),
    [
        ("90s", "2026-03-28T22:31:30"),
        ("3d", "2026-03-31T22:30:00"),
        ("today", "2026-03-28T23:00:00"),
        ("Saturday", "2026-03-28T23:00:00"),
        ("tomorrow", "2026-03-29T22:00:00"),
        ("sun", "2026-03-29T22:00:00"),
        ("FRIDAY", "2026-04-03T22:00:00"),
        ("2026-03-29", "2026-03-29T22:00:00"),
        ("2026-03-29T02:30", "2026-03-29T01:30:00"),
        ("2026-03-29T12:00", "2026-03-29T10:00:00"),
        ("2026-03-29 12:00:00Z", "2026-03-29T12:00:00"),
        ("2026-03-29T12:00:00-05:00", "2026-03-29T17:00:00"),
    ],
)
def test_an_end_is_that_of_a_day_in_the_configured_zone(when: str, until: str) -> None:
    expected = datetime.fromisoformat(until).replace(tzinfo=UTC)
    assert parse_end(when, SATURDAY, BERLIN) == expected


def test_the_end_of_a_day_that_has_no_midnight_is_when_clocks_change() -> None:
    havana = ZoneInfo("America/Havana")
    end = parse_end("2026-03-07", datetime(2026, 3, 7, 12, tzinfo=UTC), havana)
    assert end == datetime(2026, 3, 8, 5, tzinfo=UTC)  # 0:00, and at once 1:00


@pytest.mark.parametrize("when", ["", "yesterday", "fr", "d", "-3d", "2026-13-01", "25:00"])
def test_what_is_no_end_is_said(when: str) -> None:
    with pytest.raises(UsageError, match="not a time"):
        parse_end(when, SATURDAY, BERLIN)
