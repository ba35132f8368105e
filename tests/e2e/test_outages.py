"""A part of the gateway, or the server behind it, is away: clear answers, and back by itself."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import httpx
import pytest
from envoy.config.core.v3.base_pb2 import Metadata
from envoy.data.accesslog.v3.accesslog_pb2 import HTTPAccessLogEntry
from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage
from google.protobuf.json_format import ParseDict

from parallama import contract
from parallama.stores import socket_path
from tests.e2e.gateway import CHAT, Gateway, Json, Someone, free_port, running, says, until
from tests.standin import StandIn

PATHS = ["/api/chat", "/ollama/v1/chat/completions"]
SLOWEST = 8.0  # a time-out of five seconds, and a busy machine


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose parts may be stopped, and which serves the Ollama API alone."""
    folder = tmp_path_factory.mktemp("frail")
    with (
        StandIn(port=free_port()) as upstream,
        running(
            folder, upstream, complaints=True,
            environ={"PARALLAMA_API_GATEWAYS__ENABLED": "[ollama]"},
        ) as gateway,
    ):  # fmt: skip
        yield gateway


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process is there, and does nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def check_unavailable(answer: httpx.Response) -> str:
    """The sentence of a 503 in the dialect of its path."""
    assert answer.status_code == 503, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    if "/api/" in answer.request.url.path:
        assert isinstance(error, str)
        return error
    assert error["type"] == "server_error"
    return str(error["message"])


def works(someone: Someone, path: str = "/api/chat") -> bool:
    return someone.post(path, {**CHAT, "stream": False}).status_code == 200


def check_all_unavailable(someone: Someone) -> None:
    """In every dialect, at once, and each in time."""

    def one(path: str) -> None:
        started = time.monotonic()
        answer = someone.post(path, CHAT)
        assert time.monotonic() - started < SLOWEST
        assert "try again" in check_unavailable(answer)

    with ThreadPoolExecutor() as threads:
        list(threads.map(one, PATHS))


def test_a_gateway_that_is_not_enabled_is_not_there(fragile: Gateway) -> None:
    someone = fragile.someone()
    for path in ("/v1/chat/completions", "/openai/v1/chat/completions", "/v1/models"):
        answer = someone.ask("GET" if path == "/v1/models" else "POST", path, json=CHAT)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "unknown_endpoint"
    assert not fragile.upstream.requests
    for path in PATHS:
        assert works(someone, path)


def test_authz_that_does_not_answer_is_503_in_time_and_never_403(fragile: Gateway) -> None:
    someone = fragile.someone()
    assert works(someone)
    before = len(fragile.upstream.requests)
    with stopped(fragile.child("authz")):
        check_all_unavailable(someone)
        until(lambda: fragile.http.get("/healthz").status_code == 503, 5)
        check_all_unavailable(someone)
    assert len(fragile.upstream.requests) == before
    until(lambda: works(someone), 5)
    until(lambda: fragile.http.get("/healthz").status_code == 200, 5)


@pytest.mark.parametrize("name", ["authz", "ratelimit"])
def test_a_service_that_is_killed_is_waited_for(fragile: Gateway, name: str) -> None:
    """It is back in less time than a question may take, so its clients never know."""
    someone = fragile.someone(requests=1000)
    assert works(someone)
    before = len(fragile.upstream.requests)
    os.kill(fragile.child(name), signal.SIGKILL)
    with ThreadPoolExecutor() as threads:
        assert all(threads.map(works, [someone] * 4, PATHS * 2))
    assert len(fragile.upstream.requests) == before + 4
    until(lambda: len(fragile.rows_of(someone.user_id)) == 5)


def test_ratelimit_that_does_not_answer_is_503_in_time(fragile: Gateway) -> None:
    someone = fragile.someone(requests=1000)
    assert works(someone)
    with stopped(fragile.child("ratelimit")):
        check_all_unavailable(someone)
        assert someone.get("/api/tags").status_code == 200  # which nobody counts
    until(lambda: works(someone), 5)


def test_without_counters_the_limited_wait_and_others_pass(fragile: Gateway) -> None:
    """As `when_redis_is_away: deny` says."""
    limited, free = fragile.someone(requests=1000, tokens=1_000_000), fragile.someone()
    assert works(limited)
    assert works(free)
    with stopped(fragile.child("valkey")):
        check_all_unavailable(limited)
        assert works(free)
    until(lambda: works(limited), 5)


def test_counters_that_are_killed_come_back_by_themselves(fragile: Gateway) -> None:
    someone = fragile.someone(requests=2)
    assert works(someone)
    os.kill(fragile.child("valkey"), signal.SIGKILL)
    statuses = set()

    def back() -> bool:
        statuses.add(someone.post("/api/chat", CHAT).status_code)
        return 200 in statuses

    until(back, 10)
    assert statuses <= {200, 503}


def test_a_key_revoked_while_the_signal_is_away_stops_all_the_same(fragile: Gateway) -> None:
    someone = fragile.someone()
    assert works(someone)
    with stopped(fragile.child("valkey")):
        fragile.cli("keys", "revoke", someone.key_id)
        until(lambda: someone.post("/api/chat", CHAT).status_code == 401, 1)


def test_a_charge_is_not_lost_while_counters_are_slow(fragile: Gateway) -> None:
    """Half a second without an answer is less than the time-out."""
    someone = fragile.someone(tokens=100_000)
    with someone.stream("/api/chat", CHAT, headers=says(hold_at=4)) as answer:
        lines = answer.iter_lines()
        next(lines)
        with stopped(fragile.child("valkey")):
            fragile.upstream.release()
            assert len(list(lines)) == 7
    someone.expect_spent(fragile.row(answer)["tokens_used"], limit=100_000)


def test_a_slow_yes_is_waited_for_and_its_call_is_charged(fragile: Gateway) -> None:
    """Whoever is slow is not asked again, which would take the first question back."""
    someone = fragile.someone(tokens=100_000)
    assert works(someone)
    asked_again = "/stats?filter=^cluster.ratelimit.upstream_rq_retry$"
    before = fragile.admin(asked_again)
    with ThreadPoolExecutor() as threads:
        with stopped(fragile.child("valkey")):
            asking = threads.submit(someone.post, "/api/chat", CHAT)
            time.sleep(0.5)  # longer than a try may take that is given up too soon
            assert not asking.done()
        answer = asking.result()
    assert answer.status_code == 200
    assert fragile.admin(asked_again) == before
    until(lambda: len(fragile.rows_of(someone.user_id)) == 2)
    spent = sum(row["tokens_used"] for row in fragile.rows_of(someone.user_id))
    someone.expect_spent(spent, limit=100_000)


def an_entry(who: Someone, request_id: str) -> HTTPAccessLogEntry:
    """What Envoy tells about a finished request."""
    entry = HTTPAccessLogEntry()
    entry.request.request_id = request_id
    entry.response.response_code.value = 200
    entry.response.response_code_details = "via_upstream"
    common = entry.common_properties
    common.start_time.GetCurrentTime()
    facts: Json = {
        contract.AUTHZ: {
            contract.USER: who.user_id, contract.USERNAME: who.name, contract.KEY: who.key_id,
            contract.GATEWAY: "ollama", contract.DIALECT: "ollama", contract.ENDPOINT: "/api/chat",
        },
        contract.LUA: {contract.MODEL: "smollm2", contract.TOTAL_TOKENS: 5},
    }  # fmt: skip
    common.metadata.CopyFrom(ParseDict({"filterMetadata": facts}, Metadata()))
    return entry


def deliver(gateway: Gateway, *entries: HTTPAccessLogEntry) -> None:
    """As an Envoy of our own, to the running sink."""
    message = StreamAccessLogsMessage()
    message.http_logs.log_entry.extend(entries)
    where = socket_path(gateway.config.run_dir / "usage_sink.sock")
    with grpc.insecure_channel(f"unix:{where}") as channel:
        send = channel.stream_unary(
            "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs",
            request_serializer=StreamAccessLogsMessage.SerializeToString,
        )
        send(iter([message]), timeout=10)


def test_an_entry_that_is_delivered_twice_is_one_row(fragile: Gateway) -> None:
    someone = fragile.someone()
    twice, last = an_entry(someone, "delivered-twice"), an_entry(someone, "delivered-last")
    deliver(fragile, twice, twice)
    deliver(fragile, twice)
    deliver(fragile, last)
    until(lambda: fragile.rows("delivered-last"))
    (row,) = fragile.rows("delivered-twice")
    assert (row["tokens_used"], row["username"]) == (5, someone.name)


def test_a_sink_that_is_killed_comes_back_and_rows_are_written_again(fragile: Gateway) -> None:
    someone = fragile.someone()
    os.kill(fragile.child("usage_sink"), signal.SIGKILL)
    assert works(someone)  # nobody waits for it

    def written() -> bool:
        answer = someone.post("/api/chat", CHAT)
        try:
            return bool(until(lambda: fragile.rows(answer.headers["x-request-id"]), 0.5))
        except AssertionError:
            return False

    until(written, 10)


def test_a_server_that_is_down_is_503_and_free(fragile: Gateway) -> None:
    """The last story here: its upstream goes, and comes back on the same port."""
    someone = fragile.someone(tokens=100_000)
    assert works(someone)
    fragile.upstream.__exit__(None, None, None)
    try:
        for path in PATHS:
            answer = someone.post(path, CHAT)
            assert "model server" in check_unavailable(answer)
            row = fragile.row(answer)
            assert (row["status_code"], row["tokens_used"]) == (503, 0)
            assert "UF" in row["flags"]
    finally:
        fragile.upstream.__enter__()
    until(lambda: works(someone), 5)
