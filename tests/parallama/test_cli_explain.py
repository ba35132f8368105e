"""`parallama explain`: what would be decided now, and what was decided about a request."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from parallama.limits import Window
from tests.ollama_cli import OllamaCommand
from tests.parallama.commands import Parallama
from tests.parallama.db_on_disk import a_record
from tests.valkey import Valkey

CHAT = "/v1/chat/completions"


@pytest.fixture
def cli(cli: Parallama) -> Parallama:
    """With anna and her key, and without a password for Redis."""
    cli.config.write_text("state_dir: s\n", encoding="utf-8")
    cli.json("users", "create", "anna")
    cli.json("keys", "create", "anna", "--name", "laptop")
    return cli


@pytest.fixture
def valkey(cli: Parallama) -> Iterator[Valkey]:
    folder = cli.folder / "s" / "run"
    folder.mkdir(parents=True)
    server = Valkey(folder)
    server.socket = str(folder / "valkey.sock")
    server.start()
    yield server
    server.stop()


def explained(cli: Parallama, *words: str, path: str = CHAT, model: str | None = "m") -> Any:
    named = () if model is None else ("--model", model)
    return cli.json("explain", "--key", "laptop", "--path", path, *named, *words)


# What would be decided now


def test_a_call_is_let_in_and_each_limit_is_shown(cli: Parallama, valkey: Valkey) -> None:
    cli.json("limits", "set", "anna", "--gateway", "*", "--tokens-per-day", "1000")
    cli.json("limits", "set", "role:user", "--gateway", "openai", "--requests-per-minute", "5")
    cli.json("limits", "set", "anna", "--gateway", "ollama", "--tokens-per-day", "1")
    for _ in range(2):  # nothing is taken
        told = explained(cli, "--max-tokens", "100", "--body-bytes", "400")
        assert (told["verdict"], told["user"], told["role"]) == ("allowed", "anna", "user")
        assert (told["gateway"], told["endpoint"]) == ("openai", CHAT)
        assert (told["method"], told["needs"]) == ("POST", "models:infer:openai")
        limits = {limit.pop("limit"): limit for limit in told["limits"]}
        assert set(limits) == {"1000 tokens per day", "5 requests per minute on openai"}
        tokens = limits["1000 tokens per day"]
        resets = Window.DAY.bounds(datetime.now(UTC).timestamp())[1]
        assert datetime.fromisoformat(tokens.pop("resets_at")).timestamp() == resets
        assert tokens == {
            "used": 0, "held": 0, "needed": 200, "amount": 1000, "left": 1000, "room": "yes",
        }  # fmt: skip
    table = cli.table("explain", "--key", "laptop", "--path", CHAT, "--model", "m")
    assert "every limit has room" in table
    assert "1000 tokens per day" in table


def test_what_was_used_comes_from_the_rows_where_the_counters_are_new(
    cli: Parallama, valkey: Valkey
) -> None:
    cli.json("limits", "set", "anna", "--gateway", "*", "--tokens-per-day", "1000")
    anna = cli.json("users", "get", "anna")["id"]
    now = datetime.now(UTC)
    cli.add(a_record("r1", user_id=anna, timestamp=now, tokens_used=960, gateway="openai"))
    told = explained(cli, "--max-tokens", "100")
    (limit,) = told["limits"]
    assert (limit["used"], limit["left"], limit["room"]) == (960, 40, "yes")
    cli.add(a_record("r2", user_id=anna, timestamp=now, tokens_used=40, gateway="openai"))
    valkey.stop()
    valkey.start()
    told = explained(cli, "--max-tokens", "100")
    assert (told["verdict"], told["status"], told["rule"]) == ("refused", 429, "limit")
    assert told["message"].startswith("You have used up your limit of 1000 tokens per day.")
    assert told["limits"][0]["room"] == "no"
    cli.json("limits", "grant", "anna", "--until", "1d", "--tokens", "500")
    told = explained(cli, "--max-tokens", "100")
    assert (told["verdict"], told["limits"][0]["room"]) == ("allowed", "no")
    assert "a grant has room" in told["why"]


def test_a_limit_of_cost_and_one_in_the_shadow(cli: Parallama, valkey: Valkey) -> None:
    cli.json("prices", "set", "m", "--prompt", "1", "--completion", "2000")
    cli.json("limits", "set", "anna", "--gateway", "*", "--cost-per-day", "2.5")
    cli.json("limits", "set", "anna", "--gateway", "*", "--requests-per-day", "0", "--shadow")
    told = explained(cli, "--max-tokens", "1000")
    assert told["verdict"] == "allowed"
    assert "in the shadow" in told["why"]
    limits = {limit["limit"]: limit for limit in told["limits"]}
    assert limits["2.5 of cost per day"]["needed"] == 2.0
    assert limits["0 requests per day (shadow)"]["room"] == "no"


@pytest.mark.parametrize(
    ("words", "path", "model", "status", "rule", "message"),
    [
        pytest.param(["--models", "x"], CHAT, "m", 404, "model", "does not exist", id="model"),
        pytest.param(["--models", "x"], "/api/chat", "m", 404, "model", "not found", id="ollama"),
        pytest.param(["--networks", "10.0.0.0/8"], CHAT, "m", 403, "network", "address", id="net"),
        pytest.param(["--gateways", "ollama"], CHAT, "m", 403, "gateway", "gateway", id="gateway"),
        pytest.param(["--scopes", "models:read"], CHAT, "m", 403, "scope", "infer", id="scope"),
        pytest.param([], "/api/pull", "m", 403, "role", "role user", id="role"),
        pytest.param([], "/v1/nothing", None, 404, "path", "no such endpoint", id="path"),
    ],
)
def test_a_refusal_names_its_rule_and_what_the_client_would_read(
    cli: Parallama,
    words: list[str],
    path: str,
    model: str | None,
    status: int,
    rule: str,
    message: str,
) -> None:
    """No counter is needed to say so."""
    if words:
        cli.json("keys", "update", "laptop", *words)
    told = explained(cli, path=path, model=model)
    assert (told["verdict"], told["status"], told["rule"]) == ("refused", status, rule)
    assert message in told["message"]
    assert told["limits"] == []


def test_addresses_methods_and_gateways_can_be_chosen(cli: Parallama, valkey: Valkey) -> None:
    cli.json("keys", "update", "laptop", "--networks", "10.0.0.0/8")
    assert explained(cli, "--address", "10.1.2.3")["verdict"] == "allowed"
    assert explained(cli, "--address", "10.1.2.3", "--method", "get")["rule"] == "method"
    told = explained(cli, "--address", "10.1.2.3", path="/ollama/v1/chat/completions")
    assert (told["gateway"], told["dialect"], told["endpoint"]) == ("ollama", "openai", CHAT)
    told = explained(cli, "--address", "10.1.2.3", "--gateway", "ollama")
    assert told["needs"] == "models:infer:ollama"
    told = explained(cli, "--address", "10.1.2.3", path="/api/tags", model=None)
    assert (told["verdict"], told["method"], told["limits"]) == ("allowed", "GET", [])


def test_a_dead_key_is_told_as_its_client_would_be(cli: Parallama, tmp_path: Path) -> None:
    cli.json("keys", "revoke", "laptop")
    assert (explained(cli)["status"], explained(cli)["rule"]) == (401, "invalid_api_key")
    file = tmp_path / "id.pub"
    file.write_text(OllamaCommand().public_key_file, encoding="utf-8")
    key = cli.json("keys", "add-ssh", "anna", str(file), "--name", "ssh")
    cli.json("keys", "revoke", key["id"])
    assert cli.json("explain", "--key", "ssh", "--path", "/api/chat")["status"] == 403


@pytest.mark.parametrize(("away", "verdict"), [("deny", "refused"), ("allow", "allowed")])
def test_while_redis_is_away_it_says_what_is_done_then(
    cli: Parallama, away: str, verdict: str
) -> None:
    with cli.config.open("a") as file:
        file.write(f"rate_limiting: {{when_redis_is_away: {away}}}\n")
    cli.json("limits", "set", "anna", "--gateway", "*", "--tokens-per-day", "1000")
    words = ("explain", "--key", "laptop", "--path", CHAT, "--model", "m", "-o", "json")
    told = json.loads(cli.run(*words).stdout)
    assert told["verdict"] == verdict
    assert "Redis" in told["why"]


@pytest.mark.parametrize(
    ("code", "words", "complaint"),
    [
        (2, (), "--request, or --key and --path"),
        (2, ("--key", "laptop"), "--request, or --key and --path"),
        (2, ("--key", "laptop", "--request", "r", "--path", CHAT), "--request, or --key"),
        (2, ("--key", "laptop", "--path", CHAT), "name --model"),
        (2, ("--key", "laptop", "--path", "/"), "is no call to a model"),
        (2, ("--key", "laptop", "--path", "/nothing"), "is no call to a model"),
        (2, ("--key", "laptop", "--path", "/admin/v1/users"), "is no call to a model"),
        (2, ("--key", "laptop", "--path", CHAT, "--address", "home"), "not an address: 'home'"),
        (3, ("--key", "ghost", "--path", CHAT), "no key 'ghost'"),
        (3, ("--request", "ghost"), "401 is no row"),
    ],
)
def test_what_cannot_be_explained(
    cli: Parallama, code: int, words: tuple[str, ...], complaint: str
) -> None:
    assert complaint in cli.refused(code, "explain", *words)


# What was decided

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
LIMIT = (
    f'"policy_at":{NOW.timestamp() - 2.5:.3f},"limit":"100 tokens per day","used":90,"held":8,'
    f'"needs":20,"ends":{NOW.timestamp() + 3600:.0f}'
)


@pytest.mark.parametrize(
    ("fields", "verdict", "why"),
    [
        pytest.param({}, "allowed", "the row does not say", id="from before"),
        pytest.param(
            {"decision": '{"known_at":1.0}', "endpoint": "/api/tags"},
            "allowed",
            "it spends nothing, so no limit was asked",
            id="a list",
        ),
        pytest.param(
            {"decision": '{"known_at":1.0,"policy_at":1.0}'},
            "allowed",
            "no limit is set",
            id="no limit",
        ),
        pytest.param(
            {"decision": f"{{{LIMIT}}}"}, "allowed", "tightest was 100 tokens per day", id="room"
        ),
        pytest.param(
            {"decision": '{"away":"redis"}'}, "allowed", "without limits being checked", id="away"
        ),
        pytest.param(
            {"decision": f'{{"rule":"limit",{LIMIT}}}', "status_code": 429, "upstream_host": None},
            "refused",
            "a limit had no room for it: 100 tokens per day",
            id="limit",
        ),
        pytest.param(
            {"decision": '{"rule":"role"}', "status_code": 403, "upstream_host": None},
            "refused",
            "no role of the user grants",
            id="role",
        ),
        pytest.param(
            {"decision": '{"known_at":1.0}', "status_code": 503, "flags": "RLSE",
             "upstream_host": None},
            "refused",
            "limits could not be checked",
            id="ratelimit away",
        ),
        pytest.param(
            {"decision": '{"known_at":1.0}', "status_code": 400, "upstream_host": None},
            "refused",
            "Envoy refused it",
            id="a bad body",
        ),
        pytest.param(
            {"decision": f"{{{LIMIT}}}", "status_code": 404},
            "allowed",
            "tightest",
            id="404 from upstream",
        ),
        pytest.param({"token_source": "unknown"}, "unknown", "nobody told", id="lost"),
    ],
)  # fmt: skip
def test_a_row_tells_which_rule_decided(
    cli: Parallama, fields: dict[str, Any], verdict: str, why: str
) -> None:
    cli.add(a_record("r1", timestamp=NOW, **fields))
    told = cli.json("explain", "--request", "r1")
    assert (told["verdict"], told["user"]) == (verdict, "anna")
    assert why in told["why"]


def test_counters_and_ages_are_those_of_that_moment(cli: Parallama) -> None:
    known = (NOW - timedelta(seconds=40)).timestamp()
    cli.add(a_record("r1", timestamp=NOW, decision=f'{{"known_at":{known:.3f},{LIMIT}}}'))
    told = cli.json("explain", "--request", "r1")
    assert (told["credential_age"], told["limits_age"]) == (40.0, 2.5)
    assert (told["limit"], told["used"], told["held"]) == ("100 tokens per day", 90, 8)
    assert (told["needed"], told["resets_at"]) == (20, "2026-03-01T13:00:00Z")
