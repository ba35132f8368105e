"""The stock ollama command before the gateway: its signed requests, through a real Envoy."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from parallama import sshkeys
from parallama.db.manage import credentials
from parallama.db.manage.credentials import ApiKey
from parallama.db.manage.schema import managed
from tests.e2e.gateway import CHAT, Gateway
from tests.ollama_cli import OllamaCommand
from tests.parallama.db_on_disk import a_desk
from tests.standin import StandIn

REFUSED = "This signed request was not accepted."


class Registered:
    """A user whose public key was registered."""

    def __init__(self, gateway: Gateway, *, base: str = "", **bounds: Any) -> None:
        self.command = OllamaCommand(base=base)
        self.gateway = gateway
        self.user = gateway.someone()

        async def register() -> ApiKey:
            async with managed(gateway.config.database) as engine:
                public_key = sshkeys.read(self.command.public_key_file)
                return await credentials.add_public_key(
                    a_desk(engine, datetime.now(UTC)), self.user.name, public_key, **bounds
                )

        self.key = asyncio.run(register())

    def ask(
        self, method: str, path: str, *, at: float | None = None, **more: object
    ) -> httpx.Response:
        target, authorization = self.command.call(method, path, at=at)
        headers = {"authorization": authorization}
        return self.gateway.http.request(method, target, headers=headers, **more)  # type: ignore[arg-type]


@pytest.fixture
def anna(gateway: Gateway) -> Registered:
    return Registered(gateway)


@pytest.mark.parametrize("base", ["", "/ollama"])
def test_the_command_is_let_in_and_nothing_of_its_signature_goes_on(
    gateway: Gateway, upstream: StandIn, base: str
) -> None:
    """Also where OLLAMA_HOST has a path. The route's rewrite still works."""
    anna = Registered(gateway, base=base)
    assert anna.ask("HEAD", "/").status_code == 200
    answer = anna.ask("POST", "/api/chat", json=CHAT)
    assert answer.status_code == 200, answer.text
    seen = gateway.seen(answer)
    assert seen.target == "/api/chat"
    assert "authorization" not in {name.lower() for name, _ in seen.headers}
    row = gateway.row(answer)
    assert (row["user_id"], row["key_id"]) == (anna.user.user_id, anna.key.id)


def test_a_replay_is_refused_without_a_hint(
    gateway: Gateway, upstream: StandIn, anna: Registered
) -> None:
    """And so is everything else that is wrong: with one answer, which the command shows."""
    now = time.time()
    assert anna.ask("POST", "/api/chat", at=now, json=CHAT).status_code == 200
    upstream.reset()
    stranger = OllamaCommand()
    target, authorization = anna.command.call("POST", "/api/chat", at=now + 1)
    theirs, unknown = stranger.call("POST", "/api/chat")
    calls = [
        anna.ask("POST", "/api/chat", at=now, json=CHAT),
        anna.ask("POST", "/api/chat", at=now - 3600, json=CHAT),
        anna.ask("POST", "/api/chat", at=now + 3600, json=CHAT),
        gateway.http.post(theirs, headers={"authorization": unknown}, json=CHAT),
        gateway.http.post(f"{target}&x=1", headers={"authorization": authorization}, json=CHAT),
        gateway.http.post("/api/chat", headers={"authorization": authorization}, json=CHAT),
        gateway.http.post(
            target.replace("chat", "generate"), headers={"authorization": authorization}, json=CHAT
        ),
        gateway.http.put(target, headers={"authorization": authorization}, json=CHAT),
    ]
    assert {call.status_code for call in calls} == {403}
    assert len({call.text for call in calls}) == 1
    assert calls[0].json()["error"].startswith(REFUSED)
    assert not upstream.requests
    both = {"authorization": authorization, "x-api-key": anna.user.token}
    assert gateway.http.post(target, headers=both, json=CHAT).status_code == 401


def test_ollama_run_works_in_one_second(gateway: Gateway, anna: Registered) -> None:
    """It shows the model twice, loads it, and chats."""
    now = time.time()
    show = {"model": "smollm2"}
    calls = [
        anna.ask("POST", "/api/show", at=now, json=show),
        anna.ask("POST", "/api/show", at=now, json=show),
        anna.ask("POST", "/api/generate", at=now, json={"model": "smollm2"}),
        anna.ask("POST", "/api/chat", at=now, json=CHAT),
    ]
    assert [call.status_code for call in calls] == [200] * 4


def test_a_revoked_public_key_is_told_so(gateway: Gateway, anna: Registered) -> None:
    assert anna.ask("GET", "/api/tags").status_code == 200
    gateway.cli("keys", "revoke", anna.key.id)
    deadline = time.monotonic() + 1
    at = time.time()
    while (answer := anna.ask("GET", "/api/version", at=at)).status_code == 200:
        at += 1
        assert time.monotonic() < deadline
    assert answer.status_code == 403
    assert "revoked" in answer.json()["error"]


def test_bounds_of_a_public_key_count(gateway: Gateway) -> None:
    bound = Registered(gateway, models=["other*"], gateways=["ollama"])
    answer = bound.ask("POST", "/api/chat", json=CHAT)
    assert (answer.status_code, answer.json()["error"]) == (
        404,
        'model "smollm2" not found, try pulling it first',
    )
    row = gateway.row(answer)
    assert row["user_id"] == bound.user.user_id
    assert '"rule":"model"' in row["decision"]
    assert '"known_at":' in row["decision"]


def test_a_query_of_others_is_left_alone(gateway: Gateway, upstream: StandIn) -> None:
    answer = gateway.someone().post("/api/chat?ts=1&x=2", CHAT)
    assert answer.status_code == 200
    assert gateway.seen(answer).target == "/api/chat?ts=1&x=2"
