"""Several upstreams, and what becomes of calls when one of them is away, busy, silent or breaks."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from parallama.supervisor.envoy_files import packaged
from tests.e2e.gateway import CHAT, Gateway, Someone, free_port, running, says, until
from tests.standin import Behaviour, StandIn

PLAIN = {**CHAT, "stream": False}
SSE = {**CHAT, "stream": True}
BUSY = Behaviour(status=503, error="server busy, please try again.  maximum pending requests")
LIMIT = 1_000_000
SILENCE = 1
PARALLEL = 6


class Pair:
    """A gateway before two stand-ins."""

    def __init__(self, gateway: Gateway, one: StandIn, other: StandIn) -> None:
        self.gateway = gateway
        self.both = (one, other)

    def reset(self) -> None:
        for each in self.both:
            each.reset()
        until(lambda: self.alive() == 2)

    def alive(self) -> int:
        """How many of them Envoy calls."""
        told = self.gateway.admin("/stats?filter=^cluster.upstream.membership_healthy$")
        return int(told.rpartition(":")[2])

    def stat(self, name: str) -> int:
        told = self.gateway.admin(f"/stats?filter=^cluster.upstream.{name}$")
        return int(told.rpartition(":")[2])

    def calls(self) -> list[int]:
        """How many calls each of them saw."""
        return [len(each.requests) for each in self.both]


@pytest.fixture(scope="module")
def shared_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    envoy = folder / "own"
    shutil.copytree(packaged(), envoy)
    clusters = envoy / "clusters.yaml"
    clusters.write_text(clusters.read_text().replace("interval: 5s", "interval: 0.2s"))
    with (
        StandIn(port=free_port()) as one,
        StandIn(port=free_port()) as other,
        running(
            folder,
            one,
            hosts=[one.url, other.url],
            settings=f"envoy: {{dir: {envoy}}}\n",
            environ={
                "PARALLAMA_API_GATEWAYS__OLLAMA__MAX_PARALLEL": str(PARALLEL),
                "PARALLAMA_API_GATEWAYS__OLLAMA__SILENCE_SECONDS": str(SILENCE),
            },
        ) as gateway,
    ):
        yield Pair(gateway, one, other)


@pytest.fixture
def pair(shared_pair: Pair) -> Pair:
    shared_pair.reset()
    return shared_pair


@contextmanager
def away(server: StandIn) -> Iterator[None]:
    """Nothing listens where it was."""
    server.__exit__(None, None, None)
    try:
        yield
    finally:
        server.__enter__()


def at_once(someone: Someone, count: int, path: str = "/v1/chat/completions") -> list[int]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: someone.post(path, PLAIN).status_code, range(count)))


def test_calls_at_once_are_shared(pair: Pair) -> None:
    someone, calls = pair.gateway.someone(), 400
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(someone.post, "/api/chat", PLAIN) for _ in range(calls)]
        assert {each.result().status_code for each in asked} == {200}
    assert sum(pair.calls()) == calls
    assert all(calls * 0.4 <= each <= calls * 0.6 for each in pair.calls()), pair.calls()


def test_a_host_that_works_is_spared(pair: Pair) -> None:
    """What is under way counts: the one with less to do is asked."""
    someone = pair.gateway.someone()
    held = says(hold_at=1, tokens=3)
    with ExitStack() as open_ones:
        for _ in range(PARALLEL):
            open_ones.enter_context(someone.stream("/api/chat", CHAT, headers=held))
        until(lambda: sum(pair.calls()) == PARALLEL)
        assert all(1 <= each <= PARALLEL - 1 for each in pair.calls()), pair.calls()
        for server in pair.both:
            server.release()


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_one_of_two_is_dead_and_all_calls_succeed(pair: Pair, path: str) -> None:
    someone = pair.gateway.someone(tokens=LIMIT)
    one, other = pair.both
    with away(one):
        answers = [someone.post(path, PLAIN) for _ in range(12)]
        assert {answer.status_code for answer in answers} == {200}
    assert len(other.requests) == len(answers)
    rows = [pair.gateway.row(answer) for answer in answers]
    # It was asked first until Envoy left it out, and such a call is a row, and a charge, like any.
    assert max(row["attempts"] for row in rows) == 2
    someone.expect_spent(lambda: sum(row["tokens_used"] for row in rows), limit=LIMIT)
    assert len(pair.gateway.rows_of(someone.user_id)) >= len(answers)


def test_who_is_busy_is_left_alone_and_another_asked(pair: Pair) -> None:
    someone = pair.gateway.someone(tokens=LIMIT)
    one, other = pair.both
    one.default = BUSY
    answers = [someone.post("/api/chat", PLAIN) for _ in range(12)]
    assert {answer.status_code for answer in answers} == {200}
    assert len(other.requests) == 12
    assert one.requests  # or nothing was tried
    assert pair.alive() == 2  # busy is not dead
    rows = [pair.gateway.row(answer) for answer in answers]
    assert {row["attempts"] for row in rows} == {1, 2}
    someone.expect_spent(lambda: sum(row["tokens_used"] for row in rows), limit=LIMIT)


def test_where_all_are_busy_they_say_so_in_their_own_words(pair: Pair) -> None:
    for server in pair.both:
        server.default = BUSY
    answer = pair.gateway.someone().post("/api/chat", PLAIN)
    assert answer.status_code == 503
    assert answer.json() == {"error": BUSY.error}
    assert all(pair.calls())


@pytest.mark.parametrize("cut", ["close", "reset"])
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/api/embed"])
def test_what_was_sent_is_never_sent_twice(pair: Pair, path: str, cut: str) -> None:
    """Its connection broke before any answer: nobody knows whether something was generated."""
    someone = pair.gateway.someone(tokens=LIMIT)
    eager = {
        "x-envoy-retry-on": "5xx,reset,gateway-error", "x-envoy-max-retries": "5",
        "x-envoy-hedge-on-per-try-timeout": "true", "x-envoy-upstream-rq-per-try-timeout-ms": "50",
    }  # fmt: skip
    told = says(cut_before=True, cut=cut)
    for more in ({}, eager):
        for server in pair.both:
            server.reset()
        answer = someone.post(path, {**PLAIN, "input": "x"}, headers={**told, **more})
        assert answer.status_code == 503, answer.text
        assert sum(pair.calls()) == 1
        assert pair.gateway.row(answer)["attempts"] == 1
    someone.expect_spent(0, limit=LIMIT)


def test_an_answer_that_began_is_never_begun_again(pair: Pair) -> None:
    someone = pair.gateway.someone()
    told = says(tokens=9, cut_after=3)
    with someone.stream("/v1/chat/completions", SSE, headers=told) as answer:
        assert answer.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            answer.read()
    assert sum(pair.calls()) == 1


def test_a_first_byte_that_never_comes_is_504_and_asked_for_once(pair: Pair) -> None:
    """It may be being generated: to ask another would be to generate it twice."""
    someone = pair.gateway.someone(tokens=LIMIT)
    answer = someone.post("/v1/chat/completions", PLAIN, headers=says(hold_at=0))
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "upstream_timeout"
    assert sum(pair.calls()) == 1
    (seen,) = [seen for server in pair.both for seen in server.requests]
    until(lambda: seen.client_gone)  # so it can stop
    assert pair.gateway.row(answer)["tokens_used"] == 0


def test_a_stream_that_stalls_is_cut(pair: Pair) -> None:
    someone = pair.gateway.someone(tokens=LIMIT)
    with someone.stream("/api/chat", CHAT, headers=says(tokens=9, hold_at=4)) as answer:
        assert answer.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            answer.read()
    (seen,) = [seen for server in pair.both for seen in server.requests]
    until(lambda: seen.client_gone)
    row = pair.gateway.row(answer)
    assert row["completion_tokens"] == seen.emitted == 4


def test_silence_is_measured_anew_with_each_byte(pair: Pair) -> None:
    answer = pair.gateway.someone().post("/api/chat", CHAT, headers=says(tokens=8, gap=SILENCE / 4))
    assert answer.status_code == 200
    assert answer.content.rstrip().endswith(b"}")


def test_more_calls_at_once_than_allowed_are_refused_at_once(pair: Pair) -> None:
    someone = pair.gateway.someone(tokens=LIMIT)
    held = says(hold_at=1, tokens=3)
    with ExitStack() as open_ones:
        for _ in range(PARALLEL):
            open_ones.enter_context(someone.stream("/api/chat", CHAT, headers=held))
        until(lambda: sum(pair.calls()) == PARALLEL)
        for path in ("/api/chat", "/v1/chat/completions"):
            answer = someone.post(path, PLAIN)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert "all it can do" in answer.text
            assert pair.gateway.row(answer)["tokens_used"] == 0
        for server in pair.both:
            server.release()
    assert sum(pair.calls()) == PARALLEL
    until(lambda: someone.post("/api/chat", PLAIN).status_code == 200)


def test_all_are_down(pair: Pair) -> None:
    someone = pair.gateway.someone(tokens=LIMIT)
    with away(pair.both[0]), away(pair.both[1]):
        for path in ("/api/chat", "/v1/chat/completions"):
            answer = someone.post(path, PLAIN)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert "cannot be reached" in answer.text
        assert set(at_once(someone, 10)) == {503}
    until(lambda: someone.post("/api/chat", PLAIN).status_code == 200)
    someone.expect_spent(
        lambda: sum(row["tokens_used"] for row in pair.gateway.rows_of(someone.user_id)),
        limit=LIMIT,
    )


def test_a_host_that_says_it_is_not_ready_gets_no_calls(pair: Pair) -> None:
    pair.both[0].health = 503
    until(lambda: pair.alive() == 1)
    someone = pair.gateway.someone()
    assert [someone.post("/api/chat", PLAIN).status_code for _ in range(8)] == [200] * 8
    assert pair.calls() == [0, 8]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 200])
def test_a_host_that_knows_no_such_page_is_alive(pair: Pair, status: int) -> None:
    """Ollama knows no `/health`, and others want a key for it."""
    checked = pair.stat("health_check.attempt")
    for server in pair.both:
        server.health = status
    until(lambda: pair.stat("health_check.attempt") >= checked + 8)
    assert pair.alive() == 2
