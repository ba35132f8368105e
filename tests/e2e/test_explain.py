"""Each row says why its request was let in or refused, and `explain` reads it to people."""

import json
import time

from parallama import trail
from parallama.limits import Unit, Window
from parallama.roles import Role
from tests.e2e.gateway import CHAT, Gateway, Json, until

# What a decision may add to a row, with the usual names.
_SMALL = 200


def decision_in_the_trail(gateway: Gateway, request_id: str) -> str | None:
    """What Envoy wrote down for it."""

    def find() -> trail.Finished | None:
        folder = gateway.config.state_dir / "trail"
        lines = (line for file in folder.glob("usage*") for line in file.read_bytes().splitlines())
        return next(
            (trail.parse(line) for line in lines if trail.request_id(line) == request_id), None
        )

    finished = until(find, 20)  # Envoy writes its files with some delay
    assert finished is not None
    return finished.record.decision


def decided(row: Json) -> Json:
    assert len(row["decision"].encode()) < _SMALL
    told = json.loads(row["decision"])
    assert isinstance(told, dict)
    assert 0 <= time.time() - told["known_at"] < 60
    return told


def test_a_row_says_which_limit_was_tightest(gateway: Gateway) -> None:
    anna = gateway.someone(requests=100, tokens=100_000)
    gateway.row(anna.post("/api/chat", CHAT | {"options": {"num_predict": 50}}))
    answer = anna.post("/api/chat", CHAT | {"options": {"num_predict": 90_000}})
    assert answer.status_code == 200
    told = decided(gateway.row(answer))
    assert told["limit"] == "100000 tokens per day"
    assert told["ends"] == Window.DAY.bounds(time.time())[1]
    assert told["held"] == told["needs"] > 90_000
    assert 0 <= told["used"] < 1000
    assert told["known_at"] - 1 < told["policy_at"] < time.time()
    id = answer.headers["x-request-id"]
    assert decision_in_the_trail(gateway, id) == gateway.row(answer)["decision"]


def test_refusals_name_their_rule_and_explain_says_it_in_words(gateway: Gateway) -> None:
    anna = gateway.someone(role=Role.READONLY)
    role = gateway.row(anna.post("/v1/chat/completions", CHAT))
    assert decided(role)["rule"] == "role"

    ben = gateway.someone(models=["other"])
    hidden = gateway.row(ben.post("/v1/chat/completions", CHAT))
    assert decided(hidden)["rule"] == "model"

    carl = gateway.someone()
    gateway.limit(carl.user_id, {(Unit.REQUESTS, Window.DAY): 0})
    answer = carl.post("/v1/chat/completions", CHAT)
    assert answer.status_code == 429
    told = decided(gateway.row(answer))
    assert (told["rule"], told["limit"]) == ("limit", "0 requests per day")
    id = answer.headers["x-request-id"]
    assert decision_in_the_trail(gateway, id) == gateway.row(answer)["decision"]

    said = gateway.cli("explain", "--request", id)
    assert (said["verdict"], said["rule"], said["status"]) == ("refused", "limit", 429)
    assert (said["user"], said["limit"], said["used"]) == (carl.name, "0 requests per day", 0)
    assert said["credential_age"] < 60

    now = gateway.cli(
        "explain", "--key", carl.key_id, "--path", "/v1/chat/completions", "--model", "smollm2"
    )
    assert (now["verdict"], now["status"]) == ("refused", 429)
    assert now["message"] == answer.json()["error"]["message"]


def test_ages_grow_with_what_is_remembered(gateway: Gateway) -> None:
    anna = gateway.someone(requests=100)
    first, second = (
        json.loads(gateway.row(anna.post("/api/chat", CHAT))["decision"]) for _ in range(2)
    )
    assert first["known_at"] == second["known_at"]
    assert first["policy_at"] == second["policy_at"]
    assert second["used"] == first["used"] + 1


def test_a_list_has_no_limit_to_speak_of(gateway: Gateway) -> None:
    row = gateway.row(gateway.someone(requests=0).get("/api/tags"))
    assert set(decided(row)) == {"known_at"}
