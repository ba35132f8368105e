"""How `parallama up` ends, and what it leaves behind: rows, and nothing else."""

import fcntl
import json
import os
import shutil
import signal
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.gateway import Gateway, Json, Someone, says, until
from tests.standin import StandIn
from tests.supervisor.supervised import (
    CHAT,
    all_end,
    exit_code,
    terminate,
    up,
    wait_for_event,
)


@pytest.fixture
def upstream() -> Iterator[StandIn]:
    with StandIn() as running:
        yield running


@contextmanager
def streaming(someone: Someone, tokens: int, hold_at: int) -> Iterator[httpx.Response]:
    """A stream that stands still after `hold_at` tokens, all of which have arrived."""
    told = says(tokens=tokens, hold_at=hold_at)
    with someone.stream("/v1/chat/completions", CHAT, headers=told) as answer:
        assert answer.status_code == 200
        someone.gateway.upstream.wait(lambda seen: seen.held)
        yield answer


def words(answer: httpx.Response) -> list[str]:
    """The text of each chunk that is still to come, and [DONE]."""
    got = []
    for line in answer.iter_lines():
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            got.append(data)
        elif data and (choices := json.loads(data)["choices"]):
            got.append(choices[0]["delta"].get("content", ""))
    return [word for word in got if word]


def only_row(gateway: Gateway, someone: Someone) -> Json:
    """Read once all has ended: what is not there by then never comes."""
    (row,) = gateway.rows_of(someone.user_id)
    return row


def refuses_connections(gateway: Gateway) -> bool:
    try:
        httpx.get(f"{gateway.url}/healthz", trust_env=False)
    except httpx.ConnectError:
        return True
    return False


@pytest.mark.parametrize("how", ["SIGTERM", "ctrl-c"])
def test_requests_that_run_are_completed(tmp_path: Path, upstream: StandIn, how: str) -> None:
    with up(tmp_path, upstream, start_new_session=True) as gateway:
        everybody = gateway.processes()
        someone = gateway.someone()
        with streaming(someone, tokens=6, hold_at=2) as answer:
            if how == "ctrl-c":
                os.killpg(gateway.process.pid, signal.SIGINT)  # as a terminal does
            else:
                terminate(gateway)
            until(lambda: refuses_connections(gateway))
            upstream.release()
            assert words(answer) == ["w0 ", "w1 ", "w2 ", "w3 ", "w4 ", "w5 ", "[DONE]"]
        assert exit_code(gateway) == 0
        all_end(everybody, 1)
        row = only_row(gateway, someone)
        assert (row["completion_tokens"], row["token_source"], row["aborted"]) == (6, "reported", 0)
        assert "warning" not in {event["level"] for event in gateway.events()}


def test_what_runs_too_long_is_cut_and_still_recorded(tmp_path: Path, upstream: StandIn) -> None:
    with up(tmp_path, upstream, "shutdown: {drain_seconds: 0.3}\n") as gateway:
        someone = gateway.someone(tokens=10_000)
        with streaming(someone, tokens=6, hold_at=4) as answer:
            terminate(gateway)
            with pytest.raises(httpx.RemoteProtocolError):
                words(answer)
        assert exit_code(gateway, 15) == 0
        row = only_row(gateway, someone)
        assert (row["completion_tokens"], row["token_source"], row["aborted"]) == (4, "counted", 1)
        wait_for_event(gateway, "requests cut", level="warning")


def test_a_second_signal_cuts_what_runs(tmp_path: Path, upstream: StandIn) -> None:
    with up(tmp_path, upstream, "shutdown: {drain_seconds: 60}\n") as gateway:
        someone = gateway.someone()
        with streaming(someone, tokens=6, hold_at=3) as answer:
            terminate(gateway)
            wait_for_event(gateway, "stopping")
            terminate(gateway)
            with pytest.raises(httpx.RemoteProtocolError):
                words(answer)
        assert exit_code(gateway, 15) == 0
        assert only_row(gateway, someone)["completion_tokens"] == 3


def test_a_terminal_that_is_closed_ends_it(tmp_path: Path, upstream: StandIn) -> None:
    ours, theirs = os.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY)

    more = {"stdin": theirs, "start_new_session": True, "preexec_fn": take_terminal}
    with up(tmp_path, upstream, **more) as gateway:
        os.close(theirs)
        everybody = gateway.processes()
        os.close(ours)
        assert exit_code(gateway) == 0
        all_end(everybody, 1)


def test_a_stop_while_it_starts_leaves_nothing(tmp_path: Path, upstream: StandIn) -> None:
    settings = "model: {bundled: true}\n"  # starts last
    with up(tmp_path, upstream, settings, until_event=("starting", {"child": "model"})) as gateway:
        everybody = gateway.processes()
        terminate(gateway)
        assert exit_code(gateway) == 0
        all_end(everybody, 1)
        assert {event["level"] for event in gateway.events()} == {"info"}


def test_a_killed_supervisor_takes_its_children_along(tmp_path: Path, upstream: StandIn) -> None:
    """Also where Valkey cannot save its counters. What usage_sink was told it stores first."""
    settings = "model: {bundled: true}\nusage: {flush_seconds: 1}\n"
    with up(tmp_path, upstream, settings) as gateway:
        everybody = gateway.processes()
        assert len(everybody) == 8
        someone = gateway.someone()
        short = CHAT | {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
        assert someone.post("/v1/chat/completions", short).status_code == 200
        wait_for_event(gateway, "request finished")
        assert gateway.rows_of(someone.user_id) == []
        shutil.rmtree(gateway.config.state_dir / "valkey")
        gateway.process.kill()
        gateway.process.wait()

        # At once, so that it finds the folder still in use, and waits.
        with up(tmp_path, upstream) as again:
            all_end(everybody, 0.1)
            assert only_row(again, someone)["completion_tokens"] == 1
