"""Usage rows on a real database."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from parallama.config import Database
from parallama.db import database, ledger
from parallama.db.manage import credentials, people, usage
from parallama.db.manage.tables import gateway_usage_logs
from parallama.db.manage.usage import Which
from parallama.db.months import LIST
from parallama.errors import NotFound
from parallama.roles import Role
from parallama.usage import Spent, UsageRecord
from tests.parallama.db_on_disk import NOW, Opened, a_minted, a_record, on
from tests.postgres import Postgres

BOB = "7c1f2c1e-0000-4000-8000-000000000002"
LOST = "unknown"
LATER = NOW + timedelta(days=1)


async def everything(
    at: Opened, which: Which | None = None, **options: object
) -> list[UsageRecord]:
    rows = usage.rows(at.engine, which or Which(), **options)  # type: ignore[arg-type]
    return [record async for record in rows]


async def ids(at: Opened, which: Which, **options: object) -> list[str]:
    return [record.request_id for record in await everything(at, which, **options)]


async def spending(at: Opened, user: str, *spans: ledger.Span) -> ledger.Spending:
    endpoints = ["/api/chat", "/v1/completions"]
    return await ledger.spending(at.store, user, spans, (NOW, LATER), endpoints=endpoints)


def test_a_row_comes_back_as_it_was_given(db: Database) -> None:
    empty = a_record(
        "r2", timestamp=NOW + timedelta(microseconds=1), key_id=None, model_name=None,
        served_model=None, prompt_tokens=None, completion_tokens=None, cached_tokens=None,
        tokens_used=0, token_source="estimated", streamed=False, finished=False, aborted=True,
        status_code=0, flags="DC,UC", error_message="cut", time_to_first_token=None,
        compute_ms=None, upstream_host=None,
    )  # fmt: skip
    full = a_record("r1", prompt_tokens=0, cached_tokens=0, key_id=BOB, grants="tokens:g1")

    async def work(at: Opened) -> None:
        assert (await ledger.add(at.store, [full, empty])).stored == 2
        assert await everything(at) == [full, empty]

    on(db, work)


def test_one_request_is_one_row_however_often_it_is_delivered(db: Database) -> None:
    async def work(at: Opened) -> None:
        async def stored(*records: UsageRecord) -> int:
            return (await ledger.add(at.store, records)).stored

        first = a_record("r1")
        assert await stored(first, a_record("r2")) == 2
        assert await stored(a_record("r1", tokens_used=99), a_record("r3")) == 1
        assert await stored(a_record("r4"), a_record("r4")) == 1
        assert await stored() == 0
        assert (await everything(at))[0] == first
        assert await usage.count(at.engine) == 4

    on(db, work)


def test_two_writers_with_the_same_rows_store_each_once(db: Database) -> None:
    rows = [a_record(f"r{number}") for number in range(50)]

    async def work(at: Opened) -> None:
        added = await asyncio.gather(ledger.add(at.store, rows), ledger.add(at.store, rows[::-1]))
        assert sum(each.stored for each in added) == 50
        assert await usage.count(at.engine) == 50

    on(db, work)


def test_a_value_that_fits_no_column_does_not_hold_back_its_batch(db: Database) -> None:
    strange = a_record(
        "r1",
        model_name="llama\ud800\x00",
        prompt_tokens=2**70,
        completion_tokens=-(2**70),
        request_duration=float("nan"),
        compute_ms=float("inf"),
    )

    async def work(at: Opened) -> None:
        assert (await ledger.add(at.store, [strange, a_record("r2")])).stored == 2
        stored, plain = await everything(at)
        assert stored == replace(
            strange,
            model_name="llama?\ufffd",
            prompt_tokens=2**63 - 1,
            completion_tokens=1 - 2**63,
            request_duration=None,
            compute_ms=None,
        )
        assert plain == a_record("r2")

    on(db, work)


def test_ids_are_uuids_in_the_order_of_time(db: Database) -> None:
    async def work(at: Opened) -> None:
        await ledger.add(at.store, [a_record(f"r{number}") for number in range(500)])
        async with at.engine.connect() as connection:
            found = list(await connection.scalars(select(gateway_usage_logs.c.id)))
        assert len(set(found)) == 500
        assert {UUID(each).version for each in found} == {7}
        assert {str(UUID(each)) == each for each in found} == {True}
        assert {UUID(each).variant for each in found} == {UUID(int=1 << 63).variant}
        assert len({each[:13] for each in found}) <= 2  # the same millisecond, or the next

    on(db, work)


def test_filters_by_time_include_the_start_and_not_the_end(db: Database) -> None:
    async def work(at: Opened) -> None:
        hours = [NOW + timedelta(hours=number) for number in range(4)]
        await ledger.add(at.store, [a_record(f"r{at.hour}", timestamp=at) for at in hours])
        assert await ids(at, Which(since=hours[1], until=hours[3])) == ["r13", "r14"]
        assert await ids(at, Which(), newest_first=True, limit=2) == ["r15", "r14"]

    on(db, work)


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 4, 5, 6, 11, 100])
def test_pages_join_without_gap_or_overlap(
    db: Database, monkeypatch: pytest.MonkeyPatch, newest_first: bool, limit: int | None
) -> None:
    """Also where many rows have the same time."""
    monkeypatch.setattr(usage, "_PAGE_ROWS", 5)
    times = [NOW + timedelta(seconds=number // 4) for number in range(17)]
    rows = [a_record(f"r{number:02}", timestamp=at) for number, at in enumerate(times)]

    async def work(at: Opened) -> None:
        await ledger.add(at.store, rows)
        wanted = [row.request_id for row in (rows[::-1] if newest_first else rows)][:limit]
        assert await ids(at, Which(), newest_first=newest_first, limit=limit) == wanted

    on(db, work)


def test_a_user_is_meant_by_name_or_id_also_when_gone_or_renamed(db: Database) -> None:
    async def work(at: Opened) -> None:
        anna = await people.create_user(at.desk(), "anna", Role.USER)
        mine = a_record("r1", user_id=anna.id, username="anna")
        await ledger.add(at.store, [mine, a_record("r2", user_id=BOB, username="bob")])
        assert await ids(at, Which(user="anna")) == ["r1"]
        assert await ids(at, Which(user=anna.id)) == ["r1"]
        assert await ids(at, Which(user="bob")) == ["r2"]
        assert await ids(at, Which(user=BOB)) == ["r2"]
        with pytest.raises(NotFound, match="'ghost'"):
            await ids(at, Which(user="ghost"))
        await people.update_user(at.desk(), "anna", username="anne")
        assert await ids(at, Which(user="anne")) == ["r1"]
        await people.delete_user(at.desk(), "anne")
        assert await everything(at, Which(user="anna")) == [mine]

    on(db, work)


def test_a_name_used_again_does_not_inherit_usage(db: Database) -> None:
    async def work(at: Opened) -> None:
        await ledger.add(at.store, [a_record("r1", user_id=BOB, username="bob")])
        await people.create_user(at.desk(), "bob", Role.USER)
        assert await ids(at, Which(user="bob")) == []

    on(db, work)


def test_sums_group_as_asked(db: Database) -> None:
    tomorrow = NOW + timedelta(days=1)
    rows = [
        a_record("r1", model_name="llama3", tokens_used=30, cost=Decimal("0.75")),
        a_record("r2", model_name="gemma", tokens_used=5, status_code=503, aborted=True),
        a_record("r3", timestamp=tomorrow, prompt_tokens=None, completion_tokens=None),
        a_record("r4", user_id=BOB, username="bob", model_name=None, tokens_used=1),
    ]

    async def work(at: Opened) -> None:
        await ledger.add(at.store, rows)
        assert await usage.summary(at.engine, Which(), ["user"]) == [
            {
                "user": "anna", "user_id": rows[0].user_id, "requests": 3, "errors": 1,
                "aborted": 1, "prompt_tokens": 20, "completion_tokens": 40, "tokens_used": 65,
                "cost": Decimal("0.75"), "without_cost": 2,
            },
            {
                "user": "bob", "user_id": BOB, "requests": 1, "errors": 0,
                "aborted": 0, "prompt_tokens": 10, "completion_tokens": 20, "tokens_used": 1,
                "cost": None, "without_cost": 1,
            },
        ]  # fmt: skip
        by_day = await usage.summary(at.engine, Which(user="anna"), ["day", "model"])
        assert [(row["day"], row["model_name"], row["requests"]) for row in by_day] == [
            ("2026-03-01", "gemma", 1),
            ("2026-03-01", "llama3", 1),
            ("2026-03-02", "llama3", 1),
        ]
        (total,) = await usage.summary(at.engine, Which(), [])
        assert (total["requests"], total["tokens_used"]) == (4, 66)

    on(db, work)


def test_sums_of_nothing_are_zero(db: Database) -> None:
    async def work(at: Opened) -> None:
        (total,) = await usage.summary(at.engine, Which(), [])
        assert total.pop("cost") is None
        assert set(total.values()) == {0}
        assert await usage.summary(at.engine, Which(), ["user"]) == []

    on(db, work)


def test_a_key_remembers_its_last_use(db: Database) -> None:
    async def work(at: Opened) -> None:
        await people.create_user(at.desk(), "anna", Role.USER)
        key = await credentials.create_key(at.desk(), "anna", a_minted())
        assert key.last_used_at is None

        async def last_use_after(*times: datetime) -> datetime | None:
            records = [a_record(f"{at}", timestamp=at, key_id=key.id) for at in times]
            await ledger.add(at.store, records)
            return (await credentials.get_key(at.engine, key.id)).last_used_at

        minutes = [NOW + timedelta(minutes=number) for number in range(4)]
        assert await last_use_after(minutes[2], minutes[1]) == minutes[2]
        assert await last_use_after(minutes[0]) == minutes[2]
        assert await last_use_after(minutes[3] - timedelta(seconds=1)) == minutes[2]
        assert await last_use_after(minutes[3]) == minutes[3]

    on(db, work)


def test_the_last_use_of_a_key_survives_replays_and_its_users_end(db: Database) -> None:
    """Two writers at once, the same rows again, and rows of a key that is gone."""

    async def work(at: Opened) -> None:
        await people.create_user(at.desk(), "anna", Role.USER)
        key = await credentials.create_key(at.desk(), "anna", a_minted())
        times = [NOW + timedelta(minutes=2 * number) for number in range(20)]
        records = [a_record(f"{at}", timestamp=at, key_id=key.id) for at in times]
        await asyncio.gather(
            *(ledger.add(at.store, records[begin : begin + 5]) for begin in (15, 0, 10, 5))
        )
        assert (await credentials.get_key(at.engine, key.id)).last_used_at == times[-1]
        await ledger.add(at.store, records[:5])
        assert (await credentials.get_key(at.engine, key.id)).last_used_at == times[-1]
        await people.delete_user(at.desk(), "anna")
        late = a_record("late", timestamp=times[-1] + timedelta(days=1), key_id=key.id)
        assert (await ledger.add(at.store, [late])).stored == 1

    on(db, work)


def test_a_row_keeps_why_it_was_decided_so(db: Database) -> None:
    async def work(at: Opened) -> None:
        await ledger.add(at.store, [a_record("r1", decision='{"rule":"role"}'), a_record("r2")])
        assert {row.request_id: row.decision for row in await everything(at)} == {
            "r1": '{"rule":"role"}',
            "r2": None,
        }

    on(db, work)


def test_a_real_row_takes_the_place_of_a_lost_one(db: Database) -> None:
    lost = a_record("r1", timestamp=NOW - timedelta(hours=1), token_source=LOST, tokens_used=9)

    async def work(at: Opened) -> None:
        assert await ledger.add_lost(at.store, [lost, a_record("r2", token_source=LOST)]) == 2
        assert await ledger.add_lost(at.store, [lost]) == 0
        assert (await ledger.add(at.store, [a_record("r1"), a_record("r3")])).stored == 2
        assert (await ledger.add(at.store, [a_record("r1")])).stored == 0
        assert [(row.request_id, row.token_source) for row in await everything(at)] == [
            ("r1", "reported"), ("r2", LOST), ("r3", "reported"),
        ]  # fmt: skip

    on(db, work)


@pytest.mark.parametrize("apart", [timedelta(0), timedelta(hours=-24), timedelta(hours=24)])
def test_a_lost_row_gives_way_to_a_real_one_that_is_there(db: Database, apart: timedelta) -> None:
    async def work(at: Opened) -> None:
        await ledger.add(at.store, [a_record("r1")])
        lost = a_record("r1", timestamp=NOW + apart, token_source=LOST)
        assert await ledger.add_lost(at.store, [lost]) == 0
        assert await everything(at) == [a_record("r1")]

    on(db, work)


def test_lost_and_real_rows_at_the_same_time_are_one_row_each(db: Database) -> None:
    real = [a_record(f"r{number}") for number in range(40)]
    lost = [replace(row, timestamp=NOW + timedelta(seconds=1), token_source=LOST) for row in real]

    async def work(at: Opened) -> None:
        parts = range(0, 40, 4)
        await asyncio.gather(
            *(ledger.add(at.store, real[start : start + 4]) for start in parts),
            *(ledger.add_lost(at.store, lost[start : start + 4]) for start in parts),
        )
        assert await usage.count(at.engine) == 40
        assert {row.token_source for row in await everything(at)} == {"reported"}

    on(db, work)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_a_row_that_is_refused_costs_no_other(db: Database, count: int) -> None:
    """No name at all is what neither database takes."""
    bad = {0, count // 2}
    nobody: Any = None
    rows = [
        a_record(f"r{number:02}", username=nobody if number in bad else "anna")
        for number in range(count)
    ]

    async def work(at: Opened) -> None:
        added = await ledger.add(at.store, rows)
        assert added.stored == count - len(bad)
        assert [row for row, _ in added.refused] == [rows[number] for number in sorted(bad)]
        assert all("username" in reason for _, reason in added.refused)
        assert await ids(at, Which()) == [
            row.request_id for number, row in enumerate(rows) if number not in bad
        ]

    on(db, work)


def test_a_text_that_is_too_long_for_postgresql_is_refused_without_its_words(
    postgres: Postgres,
) -> None:
    async def work(at: Opened) -> None:
        secret = a_record("r1", upstream_host="secret" * 100)
        ((row, reason),) = (await ledger.add(at.store, [secret, a_record("r2")])).refused
        assert row == secret
        assert reason == "value too long for type character varying(255)"

    on(postgres.migrated(), work)


def test_a_key_that_is_none_of_ours_is_stored_as_it_is(db: Database) -> None:
    async def work(at: Opened) -> None:
        assert (await ledger.add(at.store, [a_record("r1", key_id="key-1")])).stored == 1
        assert (await everything(at))[0].key_id == "key-1"

    on(db, work)


def test_money_is_exact(db: Database) -> None:
    amount = Decimal("123456.000000000001")

    async def work(at: Opened) -> None:
        rows = [a_record(f"r{number}", cost=amount) for number in range(3)]
        await ledger.add(at.store, rows)
        assert [row.cost for row in await everything(at)] == [amount] * 3
        found = await spending(at, rows[0].user_id, (NOW, LATER))
        assert found.sums[0][0].cost == amount * 3

    on(db, work)


def test_what_was_used_is_added_up_by_gateway_model_key_and_grants(db: Database) -> None:
    anna = a_record().user_id
    paid = "tokens:7c1f2c1e-0000-4000-8000-00000000000a"
    rows = [
        a_record("r1", compute_ms=1.5, cost=Decimal("0.5")),
        a_record("r2", compute_ms=None, tokens_used=5, cost=None, flags="DC"),
        a_record("r3", model_name=None, flags="UF,URX"),
        a_record("r4", key_id=BOB, gateway="openai", token_source=LOST),
        a_record("r5", grants=paid),
        a_record("before", timestamp=NOW - timedelta(microseconds=1)),
        a_record("after", timestamp=LATER),
        a_record("of another", user_id=BOB),
        a_record("not metered", endpoint="/api/tags"),
        a_record("too many", flags="RL"),
        a_record("not allowed", flags="DC,UAEX"),
        a_record("not asked", flags="RLSE,DC"),
        a_record("not read", flags="", upstream_host=None),
    ]
    assert [row.admitted for row in rows[-5:]] == [True, False, False, False, False]

    async def work(at: Opened) -> None:
        await ledger.add(at.store, rows)
        before = NOW - timedelta(days=1)
        found = await spending(at, anna, (NOW, LATER), (before, NOW), (before, before))
        assert sorted(found.sums[0], key=repr) == sorted(
            [
                ledger.Used("ollama", "llama3", None, None, 2, 35, 1501.5, Decimal("0.5")),
                ledger.Used("ollama", "llama3", None, paid, 1, 30, 900.0, Decimal(0)),
                ledger.Used("ollama", None, None, None, 1, 30, 900.0, Decimal(0)),
                ledger.Used("openai", "llama3", BOB, None, 1, 30, 900.0, Decimal(0)),
            ],
            key=repr,
        )
        assert [used.requests for used in found.sums[1]] == [1]
        assert found.sums[2] == ()
        others = {"before", "after", "of another"}
        assert set(found.recent) == {row.request_id for row in rows} - others
        day_after = (LATER, LATER + timedelta(days=1))
        nothing = await ledger.spending(at.store, anna, [(NOW, LATER)], day_after, endpoints=[])
        assert nothing == ledger.Spending(((),), ("after",))
        row = await ledger.spent_by(at.store, ["r1", "r2", "r4"], NOW)
        assert row == {"r1": Spent(30, 2, 5 * 10**8), "r2": Spent(5, 1500, 0)}
        assert row["r2"] == rows[1].spent

    on(db, work)


MOST = Decimal("9223372.036854775807")


def test_sums_are_exact_however_much_is_stored(db: Database) -> None:
    """Far beyond 64 bits, in each of the sums."""
    largest = 2**63 - 1
    amounts = {"tokens_used": largest, "prompt_tokens": largest, "completion_tokens": largest}
    rows = [a_record(f"r{number}", cost=MOST, **amounts) for number in range(30)]
    rows.append(a_record("below", cost=Decimal(0), tokens_used=-7, prompt_tokens=-(2**62)))

    async def work(at: Opened) -> None:
        await ledger.add(at.store, rows)
        for by in ([], ["user"], ["day", "model"]):
            (total,) = await usage.summary(at.engine, Which(), by)
            assert total["cost"] == MOST * 30
            assert total["tokens_used"] == largest * 30 - 7
            assert total["prompt_tokens"] == largest * 30 - 2**62
            assert (total["requests"], total["errors"], total["without_cost"]) == (31, 0, 0)
        found = await spending(at, rows[0].user_id, (NOW, LATER))
        ((used,),) = found.sums
        assert (used.cost, used.tokens) == (MOST * 30, largest * 30 - 7)

    on(db, work)


def test_rows_of_any_time_are_stored(db: Database) -> None:
    """Whatever a clock says."""
    times = [
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(2019, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(2020, 1, 1, tzinfo=UTC),
        datetime(2031, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(2032, 1, 1, tzinfo=UTC),
        datetime(2099, 12, 31, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    ]
    rows = [a_record(f"r{number}", timestamp=at) for number, at in enumerate(times)]

    async def work(at: Opened) -> None:
        assert (await ledger.add(at.store, rows)).stored == len(rows)
        assert await everything(at) == rows

    on(db, work)


def test_old_rows_are_removed_and_younger_ones_stay(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_PRUNE_ROWS", 5)
    before = datetime(2026, 3, 10, tzinfo=UTC)
    days = [timedelta(days=number) for number in (-20_000, -70, -69, -40, -39, -9, -2, -1)]
    old = [before + each for each in days for _ in range(3)] + [before - timedelta(microseconds=1)]
    young = [before, before + timedelta(days=1), before + timedelta(days=31)]

    async def work(at: Opened) -> None:
        rows = [a_record(f"r{number}", timestamp=each) for number, each in enumerate(old + young)]
        await ledger.add(at.store, rows)
        assert await ledger.count_before(at.store, before) == len(old)
        assert await ledger.prune(at.store, before) == len(old)
        assert [row.timestamp for row in await everything(at)] == young
        assert await ledger.count_before(at.store, before) == 0
        assert await ledger.prune(at.store, before) == 0
        late = a_record("late", timestamp=old[5])  # its month is gone
        assert (await ledger.add(at.store, [late])).stored == 1

    on(db, work)


def test_postgresql_drops_whole_months(postgres: Postgres) -> None:
    async def months(at: Opened) -> set[str]:
        return {name for (name,) in await at.store.read(LIST)}

    async def work(at: Opened) -> None:
        standing = await months(at)
        times = [datetime(2025, month, 15, tzinfo=UTC) for month in (1, 2, 3)]
        rows = [a_record(f"r{number}", timestamp=each) for number, each in enumerate(times)]
        await ledger.add(at.store, rows)
        made = {f"gateway_usage_logs_2025_0{month}" for month in (1, 2, 3)}
        assert await months(at) - standing == made
        assert await ledger.prune(at.store, datetime(2025, 3, 1, tzinfo=UTC)) == 2
        assert await months(at) - standing == {"gateway_usage_logs_2025_03"}

    on(postgres.migrated(), work)


def test_writers_that_need_the_same_new_month_make_it_once(postgres: Postgres) -> None:
    at = postgres.migrated()
    may = datetime(2024, 5, 1, tzinfo=UTC)
    batches = [
        [a_record(f"r{batch} {number}", timestamp=may) for number in range(4)]
        for batch in range(10)
    ]

    async def both() -> list[ledger.Added]:
        async with database(at) as one, database(at) as other:
            return await asyncio.gather(
                *(ledger.add(store, batch) for batch in batches for store in (one, other))
            )

    assert sum(added.stored for added in asyncio.run(both())) == 40


def test_months_are_those_of_utc(postgres: Postgres) -> None:
    west = timezone(timedelta(hours=-8))

    async def work(at: Opened) -> None:
        row = a_record("r1", timestamp=datetime(2024, 12, 31, 20, tzinfo=west))
        await ledger.add(at.store, [row])
        assert ("gateway_usage_logs_2025_01",) in await at.store.read(LIST)
        assert ("gateway_usage_logs_2024_12",) not in await at.store.read(LIST)

    on(postgres.migrated(), work)
