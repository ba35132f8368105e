"""Answers that run when their key is revoked, or their user disabled or deleted, are cut."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from parallama.changes import publish
from parallama.db.manage import credentials, people
from parallama.db.manage.schema import managed
from parallama.desk import Desk
from parallama.limits import Unit, Window
from parallama.roles import Role
from parallama.stores import connect_redis
from tests.e2e.gateway import CHAT, PARALLAMA, Gateway, Json, Someone, running, says, until
from tests.parallama.db_on_disk import a_desk
from tests.standin import StandIn

BOUND = 1.0  # seconds from the end of the command until the upstream is hung up on
LIMIT = 1_000_000
SSE = {**CHAT, "stream": True}
PLAIN = {**CHAT, "stream": False}

STREAMS = [
    pytest.param("/api/chat", CHAT, id="NDJSON"),
    pytest.param("/v1/chat/completions", SSE, id="SSE"),
]


def change(
    gateway: Gateway,
    work: Callable[[Desk, str], Awaitable[object]],
    whom: str,
    *,
    told: bool = True,
) -> None:
    """As a command does it; and unless the services are not `told`, they hear of it."""

    async def run() -> None:
        async with managed(gateway.config.database) as engine:
            desk = a_desk(engine, datetime.now(UTC))
            await work(desk, whom)
        if not told:
            return
        with chdir(gateway.config.state_dir):  # sockets are named by their shortest path
            async with connect_redis(gateway.config) as redis:
                for each in desk.changes:
                    await publish(redis, each)

    asyncio.run(run())


def revoke(gateway: Gateway, someone: Someone) -> None:
    change(gateway, credentials.revoke_key, someone.key_id)


@dataclass(frozen=True)
class Answer:
    """One of which the first bytes have come."""

    response: httpx.Response
    _bytes: Iterator[bytes]

    def rest(self) -> bytes:
        return b"".join(self._bytes)


@contextmanager
def begun(someone: Someone, path: str, body: Json, **how: Any) -> Iterator[Answer]:
    with someone.stream(path, body, headers=says(**{"hold_at": 5, **how})) as response:
        pieces = response.iter_raw()
        next(pieces)
        yield Answer(response, pieces)


def left(gateway: Gateway, response: httpx.Response) -> int:
    """The tokens that the upstream had written when it was hung up on."""
    seen = gateway.seen(response)
    assert seen.client_gone
    assert not seen.finished
    return seen.emitted


def cut_within(gateway: Gateway, *answers: Answer, since: float) -> None:
    for answer in answers:
        left(gateway, answer.response)
    assert time.monotonic() - since < BOUND


def runs(gateway: Gateway, answer: Answer) -> bool:
    mine = answer.response.headers["x-request-id"]
    return any(
        seen.header("x-request-id") == mine and not seen.ended for seen in gateway.upstream.requests
    )


@pytest.mark.parametrize(("path", "body"), STREAMS)
@pytest.mark.parametrize("silent", [True, False], ids=["a silent model", "a busy model"])
def test_a_stream_of_a_revoked_key_is_cut_and_recorded(
    gateway: Gateway, path: str, body: Json, silent: bool
) -> None:
    someone, other = gateway.someone(tokens=LIMIT), gateway.someone()
    how: Json = {} if silent else {"hold_at": None, "tokens": 100_000, "gap": 0.005}
    with begun(someone, path, body, **how) as answer, begun(other, path, body) as untouched:
        revoke(gateway, someone)
        cut_within(gateway, answer, since=time.monotonic())
        assert runs(gateway, untouched)
        gateway.upstream.release()
        assert untouched.rest()
    assert gateway.row(untouched.response)["token_source"] == "reported"
    row = gateway.row(answer.response)
    assert row["error_message"] == "credential_revoked"
    assert (row["status_code"], row["aborted"], row["finished"], row["flags"]) == (200, 0, 0, "")
    assert abs(row["completion_tokens"] - left(gateway, answer.response)) <= 1
    assert row["token_source"] == "counted"
    assert row["tokens_used"] == row["completion_tokens"]


def test_the_client_sees_that_the_answer_is_not_whole(gateway: Gateway) -> None:
    someone = gateway.someone()
    with begun(someone, "/api/chat", CHAT) as answer:
        revoke(gateway, someone)
        left(gateway, answer.response)
        with pytest.raises(httpx.RemoteProtocolError):
            answer.rest()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *STREAMS,
        pytest.param("/api/chat", PLAIN, id="one piece"),
        pytest.param("/v1/messages", {**SSE, "max_tokens": 9}, id="Anthropic's"),
    ],
)
def test_who_was_sent_nothing_yet_is_told_why(gateway: Gateway, path: str, body: Json) -> None:
    """The model still loads, or reads the prompt; or the answer comes in one piece."""
    someone = gateway.someone(tokens=LIMIT)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(someone.ask, "POST", path, json=body, headers=says(hold_at=0))
        gateway.upstream.wait(lambda seen: seen.held)
        revoke(gateway, someone)
        answer = asked.result()
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    told = error if path.startswith("/api/") else error["message"]
    assert "revoked" in told
    if path == "/v1/messages":
        assert error["type"] == "authentication_error"
    assert left(gateway, answer) == 0
    row = gateway.row(answer)
    assert (row["status_code"], row["tokens_used"]) == (401, 0)
    assert row["error_message"] == "credential_revoked"


@pytest.mark.parametrize("how", [people.disable_user, people.delete_user])
def test_answers_of_a_user_who_is_disabled_or_deleted_are_cut(
    gateway: Gateway, how: Callable[[Desk, str], Awaitable[object]]
) -> None:
    someone = gateway.someone()
    with begun(someone, "/api/chat", CHAT) as answer:
        change(gateway, how, someone.name)
        cut_within(gateway, answer, since=time.monotonic())
    assert gateway.row(answer.response)["error_message"] == "credential_revoked"


def test_who_logs_out_cuts_what_runs_by_that_session_alone(gateway: Gateway) -> None:
    """By access tokens from two log-ins of one user, who has a key as well."""
    someone = gateway.someone()
    password = "correct horse battery"
    settings = gateway.config.authentication
    work = partial(people.set_password, password=password, settings=settings)
    change(gateway, work, someone.name)

    def logged_in() -> Someone:
        given = {"username": someone.name, "password": password}
        answer = gateway.http.post("/auth/login", json=given)
        assert answer.status_code == 200, answer.text
        return replace(someone, token=answer.json()["access_token"])

    here, there = logged_in(), logged_in()
    with (
        begun(here, "/api/chat", CHAT) as mine,
        begun(there, "/v1/chat/completions", SSE) as others,
        begun(someone, "/api/chat", CHAT) as by_key,
    ):
        assert here.ask("POST", "/auth/logout").status_code == 204
        cut_within(gateway, mine, since=time.monotonic())
        assert runs(gateway, others)
        assert runs(gateway, by_key)
        assert there.ask("POST", "/auth/logout", json={"everywhere": True}).status_code == 204
        cut_within(gateway, others, since=time.monotonic())
        gateway.upstream.release()
        assert b'"done":true' in by_key.rest()
    assert not [each for each in (here, there) if each.token in gateway.log()]
    assert gateway.row(mine.response)["error_message"] == "credential_revoked"


def test_other_changes_leave_answers_alone(gateway: Gateway) -> None:
    someone, other = gateway.someone(), gateway.someone()
    with begun(someone, "/api/chat", CHAT) as answer:
        revoke(gateway, other)
        change(gateway, partial(people.update_user, role=Role.READONLY), someone.name)
        gateway.limit(someone.name, {(Unit.REQUESTS, Window.DAY): 0})
        asked_again(gateway)
        gateway.upstream.release()
        assert b'"done":true' in answer.rest()


def asked_again(gateway: Gateway, times: int = 4) -> None:
    """Envoy's workers have asked about their streams since, each of them."""
    name = "cluster.authz.upstream_rq_total"

    def count() -> int:
        return int(gateway.admin(f"/stats?filter=^{name}$").rpartition(":")[2])

    before = count()
    until(lambda: count() >= before + times)


def test_two_hundred_streams_at_once(gateway: Gateway) -> None:
    someone, other = gateway.someone(), gateway.someone()
    with ExitStack() as stack, ThreadPoolExecutor(20) as threads:

        def begin(whose: Someone) -> Answer:
            return stack.enter_context(begun(whose, "/api/chat", CHAT))

        answers = list(threads.map(begin, [someone, other] * 100))
        mine, untouched = answers[::2], answers[1::2]
        revoke(gateway, someone)
        cut_within(gateway, *mine, since=time.monotonic())
        assert all(runs(gateway, answer) for answer in untouched)
        gateway.upstream.release()
        whole = threads.map(lambda answer: answer.rest(), untouched)
        assert all(b'"done":true' in text for text in whole)
    until(lambda: len(gateway.rows_of(someone.user_id)) == 100)
    rows = gateway.rows_of(someone.user_id)
    assert {row["error_message"] for row in rows} == {"credential_revoked"}
    assert sum(row["completion_tokens"] for row in rows) > 100


def test_outages(tmp_path: Path) -> None:
    """
    One gateway for all: an authz that was killed, a change signal that is away, and an Envoy that
    has handed over to another.
    """
    with StandIn() as upstream, running(tmp_path, upstream, complaints=True) as gateway:
        killed, other = gateway.someone(), gateway.someone()
        with (
            begun(killed, "/api/chat", CHAT) as answer,
            begun(other, "/api/chat", CHAT, gate="last") as untouched,
        ):
            os.kill(gateway.child("authz"), signal.SIGKILL)
            change(gateway, credentials.revoke_key, killed.key_id, told=False)
            left(gateway, answer.response)
            assert runs(gateway, untouched)

            signals = gateway.child("valkey")
            deaf = gateway.someone()
            with begun(deaf, "/api/chat", CHAT) as answer:
                asked_again(gateway)
                os.kill(signals, signal.SIGSTOP)
                try:
                    until(lambda: "change signal lost" in authz_said(gateway))
                    since = time.monotonic()
                    change(gateway, credentials.revoke_key, deaf.key_id, told=False)
                    cut_within(gateway, answer, since=since)
                    assert runs(gateway, untouched)
                finally:
                    os.kill(signals, signal.SIGCONT)
            upstream.release("last")
            assert b'"done":true' in untouched.rest()

        old, leaving = gateway.child("envoy"), gateway.someone()
        with begun(leaving, "/api/chat", CHAT) as answer:
            command = [PARALLAMA, "restart", "envoy", "--config", gateway.config.source]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as restart:
                until(lambda: gateway.child("envoy") != old)
                revoke(gateway, leaving)
                cut_within(gateway, answer, since=time.monotonic())
        assert restart.returncode == 0


def authz_said(gateway: Gateway) -> list[str]:
    return [event["event"] for event in gateway.events() if event.get("service") == "authz"]
