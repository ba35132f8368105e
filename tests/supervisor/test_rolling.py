"""New processes in the place of running ones: no call is cut, and no row is lost."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from redis import Redis

from parallama.supervisor.envoy_files import packaged
from tests.e2e.gateway import Gateway, Someone, says, until
from tests.faults.load import Load
from tests.standin import StandIn
from tests.supervisor.supervised import (
    CHAT,
    ENVIRON,
    UP,
    alive,
    all_end,
    exit_code,
    made,
    terminate,
    up,
    wait_for_event,
)

SETTINGS = """
usage: {flush_seconds: 0.01}
shutdown: {drain_seconds: 4}
"""
CALLS = 250
EVERYTHING = ("authz", "ratelimit", "usage_sink", "admin", "envoy")


@pytest.fixture(scope="module")
def upstream() -> Iterator[StandIn]:
    with StandIn() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: StandIn) -> Iterator[Gateway]:
    with up(tmp_path_factory.mktemp("up"), upstream, SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def someone(gateway: Gateway) -> Someone:
    return gateway.someone(tokens=10**9)


def restart(config: Path, *services: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [UP[0], "restart", *services, "--config", config],
        env=ENVIRON, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


class Asked:
    """A restart that was asked for, and what became of it."""

    def __init__(self, gateway: Gateway, *services: str) -> None:
        self.done: list[str] = []
        self.error: str | None = None
        self.ok = False
        self._gateway = gateway
        path = os.path.relpath(gateway.config.run_dir / "up.sock")
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(path)
        self._connection.sendall(json.dumps({"restart": services}).encode() + b"\n")
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        with self._connection as connection, connection.makefile() as lines:
            for line in lines:
                told = json.loads(line)
                self.done += [told["done"]] if "done" in told else []
                self.error = told.get("error", self.error)
                self.ok = told.get("ok", self.ok)

    def ended(self, seconds: float = 20) -> "Asked":
        """Wait for it. Nobody keeps a connection to an old Envoy open meanwhile."""
        hang_up(self._gateway)
        self._thread.join(seconds)
        assert not self._thread.is_alive()
        return self


def hang_up(gateway: Gateway) -> None:
    if "http" in vars(gateway):
        gateway.http.close()
        del gateway.http


@contextmanager
def streaming(someone: Someone, gate: str) -> Iterator[httpx.Response]:
    """A stream of five tokens that stands still after the second."""
    headers = {**someone.headers, **says(tokens=5, hold_at=2, gate=gate)}
    url = f"{someone.gateway.url}/v1/chat/completions"
    with (
        httpx.Client(trust_env=False, timeout=60) as client,
        client.stream("POST", url, json=CHAT, headers=headers) as answer,
    ):
        someone.gateway.upstream.wait(lambda seen: seen.held)
        yield answer


def works(someone: Someone) -> bool:
    answer = someone.post("/v1/chat/completions", CHAT)
    return answer.status_code == 200 and someone.gateway.row(answer)["tokens_used"] > 0


def serves_again(someone: Someone) -> bool:
    """As `works`, where it is right that nobody listened for a moment."""
    with suppress(httpx.TransportError):
        return works(someone)
    return False


def open_reservations(gateway: Gateway) -> int:
    password = gateway.config.redis.password
    path = os.path.relpath(gateway.config.run_dir / "valkey.sock")
    secret = password.get_secret_value() if password else None
    with Redis(unix_socket_path=path, password=secret) as redis:
        return sum(int(redis.zcard(key)) for key in redis.keys("rl:*:open"))


# --- under load ---


async def _knock(gateway: Gateway) -> None:
    """Who connects is let in, at any moment."""
    while True:
        _, writer = await asyncio.open_connection(*gateway.address)
        writer.close()
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("name", EVERYTHING)
def test_under_load_no_call_fails_and_each_has_its_row(
    gateway: Gateway, upstream: StandIn, name: str
) -> None:
    someone = gateway.someone(tokens=10**9)
    load = Load([(someone, 1)], calls=CALLS, at_once=12, seed=7)
    before = gateway.child(name)
    seen_before = len(upstream.requests)

    async def under_load() -> Asked:
        running = asyncio.create_task(load.run())
        knocking = asyncio.create_task(_knock(gateway))
        while load.done < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        asked = Asked(gateway, name)
        await asyncio.to_thread(asked.ended)
        load.enough = True
        await running
        knocking.cancel()
        with suppress(asyncio.CancelledError):
            await knocking  # raises where somebody was not let in
        return asked

    asked = asyncio.run(under_load())
    assert (asked.ok, asked.error, asked.done) == (True, None, [name])
    assert gateway.child(name) != before
    assert not alive(before)

    for call in load.told:
        if call.kind in ("json", "sse", "ndjson"):
            assert call.complete, call
        elif call.kind == "hang up":
            assert call.status == 200, call
    seen = upstream.requests[seen_before:]
    numbers = list(range(1, load.done + 1))
    assert sorted(int(at.header("x-number") or -1) for at in seen) == numbers

    until(lambda: len(gateway.rows_of(someone.user_id)) >= load.done)
    rows = {row["request_id"]: row for row in gateway.rows_of(someone.user_id)}
    assert len(rows) == len(gateway.rows_of(someone.user_id)) == load.done
    told = {call.number: call for call in load.told}
    for at in seen:
        if told[int(at.header("x-number") or -1)].kind in ("json", "sse", "ndjson"):
            row = rows[at.header("x-request-id") or ""]
            assert row["tokens_used"] == at.prompt_tokens + at.emitted
    until(lambda: open_reservations(gateway) == 0)


def test_the_command_restarts_all_one_after_the_other(gateway: Gateway, someone: Someone) -> None:
    before = [gateway.child(name) for name in EVERYTHING]
    hang_up(gateway)
    done = restart(gateway.config.source)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{name} restarted" for name in EVERYTHING]
    after = [gateway.child(name) for name in EVERYTHING]
    assert not set(before) & set(after)
    assert not any(map(alive, before))
    assert works(someone)
    assert len(gateway.processes()) == 7
    assert gateway.cli("status")["ok"] is True


def test_new_processes_read_the_configuration_anew(gateway: Gateway, someone: Someone) -> None:
    config = gateway.config.source
    before = config.read_text()
    config.write_text(before.replace("drain_seconds: 4", "drain_seconds: 5"))
    assert Asked(gateway).ended().ok
    gateway.process.send_signal(signal.SIGHUP)
    wait_for_event(gateway, "upstream and routes reloaded")
    assert "what else changed needs a restart" not in {at["event"] for at in gateway.events()}
    argv = Path(f"/proc/{gateway.child('envoy')}/cmdline").read_text().split("\0")
    assert argv[argv.index("--parent-shutdown-time-s") + 1] == "125"
    assert works(someone)


# --- Envoy hands over ---


def test_a_stream_survives_envoys_restart(
    gateway: Gateway, someone: Someone, upstream: StandIn
) -> None:
    old = gateway.child("envoy")
    with streaming(someone, "survives") as answer:
        asked = Asked(gateway, "envoy")
        until(lambda: asked.done)
        assert gateway.child("envoy") != old
        assert works(someone)  # on a connection to the new one
        upstream.release("survives")
        assert answer.read().endswith(b"data: [DONE]\n\n")
        assert alive(old)
    asked.ended()
    assert asked.ok
    assert not alive(old)
    row = gateway.row(answer)
    seen = gateway.seen(answer)
    assert (row["tokens_used"], row["finished"]) == (seen.prompt_tokens + seen.emitted, 1)


def test_a_stream_that_does_not_end_is_cut_and_its_row_says_so(
    gateway: Gateway, upstream: StandIn
) -> None:
    someone = gateway.someone()
    with streaming(someone, "cut") as answer:
        asked = Asked(gateway, "envoy")
        with pytest.raises(httpx.RemoteProtocolError):
            answer.read()
        asked.ended()
    upstream.release("cut")
    assert asked.ok
    row = gateway.row(answer)
    assert (row["completion_tokens"], row["token_source"], row["aborted"]) == (2, "counted", 1)


def test_the_trail_is_renamed_while_an_old_envoy_leaves(
    gateway: Gateway, someone: Someone, upstream: StandIn
) -> None:
    """Both write into the new file from then on: the old one is told to by a signal."""
    trail = gateway.config.state_dir / "trail"
    with streaming(someone, "renamed") as answer:
        asked = Asked(gateway, "envoy")
        until(lambda: asked.done)
        os.rename(trail / "usage.jsonl", trail / "usage.90000000.jsonl")
        # usage_sink tells the new one, which opens it for the next line.
        until(lambda: works(someone) and (trail / "usage.jsonl").exists())
        time.sleep(0.3)  # the time in which the old one is told
        upstream.release("renamed")
        answer.read()
    assert asked.ended().ok
    until(lambda: answer.headers["x-request-id"] in (trail / "usage.jsonl").read_text())


def test_an_envoy_that_is_killed_comes_back_while_the_old_one_leaves(
    gateway: Gateway, someone: Someone, upstream: StandIn
) -> None:
    with streaming(someone, "killed") as answer:
        asked = Asked(gateway, "envoy")
        until(lambda: asked.done)
        killed = gateway.child("envoy")
        os.kill(killed, signal.SIGKILL)
        until(lambda: not alive(killed))
        until(lambda: gateway.child("envoy") != killed)
        upstream.release("killed")
        assert answer.read().endswith(b"data: [DONE]\n\n")
    assert asked.ended().ok
    until(lambda: works(someone))
    again = Asked(gateway, "envoy").ended()
    assert again.ok, again.error
    assert works(someone)


# --- what cannot be done ---


def test_a_service_that_does_not_start_leaves_the_old_one(
    gateway: Gateway, someone: Someone
) -> None:
    old = gateway.child("authz")
    with closing(sqlite3.connect(gateway.config.database.path)) as db:
        (version,) = db.execute("SELECT version_num FROM alembic_version").fetchone()
        db.execute("DELETE FROM alembic_version")
        db.commit()
        try:
            said = restart(gateway.config.source, "authz")
            asked = Asked(gateway, "authz", "ratelimit").ended()
        finally:
            db.execute("INSERT INTO alembic_version VALUES (?)", (version,))
            db.commit()
    assert said.returncode == 1
    assert "parallama db upgrade" in said.stderr
    assert (asked.ok, asked.done) == (False, [])
    assert "the old process goes on: authz does not start (code 1)" in (asked.error or "")
    assert gateway.child("authz") == old
    assert works(someone)
    assert Asked(gateway, "authz").ended().ok
    assert works(someone)


def test_an_envoy_that_does_not_start_leaves_the_old_one(
    gateway: Gateway, someone: Someone
) -> None:
    old = gateway.child("envoy")
    admin = gateway.config.run_dir / "envoy-admin.sock"
    admin.unlink()
    admin.mkdir()
    try:
        asked = Asked(gateway, "envoy").ended()
    finally:
        admin.rmdir()
    assert not asked.ok
    assert "the old process goes on: envoy does not start (code 1)" in (asked.error or "")
    assert gateway.child("envoy") == old
    assert works(someone)
    assert Asked(gateway, "envoy").ended().ok
    assert gateway.child("envoy") != old
    assert works(someone)


def _misspelt(envoy: Path) -> None:
    text = (envoy / "envoy.yaml").read_text()
    (envoy / "envoy.yaml").write_text(text.replace("failure_mode_allow", "failure_mode_allowx"))


def _without_authz(envoy: Path) -> None:
    """It takes this, and is never well."""
    text = (envoy / "envoy.yaml").read_text()
    (envoy / "envoy.yaml").write_text(text.replace("path: run/authz.sock", "path: run/nobody.sock"))


@pytest.mark.parametrize(
    ("change", "why"),
    [(_misspelt, "Envoy refuses its files"), (_without_authz, "does not find authz and ratelimit")],
)
def test_envoy_files_that_are_no_good_leave_everything_as_it_was(
    gateway: Gateway,
    someone: Someone,
    upstream: StandIn,
    tmp_path: Path,
    change: Callable[[Path], None],
    why: str,
) -> None:
    envoy, config = tmp_path / "envoy", gateway.config.source
    shutil.copytree(packaged(), envoy)
    change(envoy)
    before, text = [gateway.child(name) for name in EVERYTHING], config.read_text()
    config.write_text(f"{text}\nenvoy: {{dir: {envoy}}}\n")
    try:
        with streaming(someone, f"as it was: {why}") as answer:
            asked = Asked(gateway).ended()
            upstream.release(f"as it was: {why}")
            assert answer.read().endswith(b"data: [DONE]\n\n")
    finally:
        config.write_text(text)
    assert (asked.ok, asked.done) == (False, [])
    assert why in (asked.error or "")
    assert [gateway.child(name) for name in EVERYTHING] == before
    assert works(someone)


def test_an_envoy_that_took_over_and_failed_leaves_the_files_of_the_old_one(
    gateway: Gateway, someone: Someone
) -> None:
    """So the old one, which has to start anew then, starts as it was."""
    placed = gateway.config.state_dir / "envoy"
    before = {path.name: path.read_bytes() for path in placed.glob("*.yaml")}
    known, old = set(gateway.processes()), gateway.child("envoy")
    asked = Asked(gateway, "envoy")

    def coming() -> int | None:
        """The new one: it says which epoch it is."""
        for pid in set(gateway.processes()) - known:
            with suppress(OSError):
                if b"--restart-epoch" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    os.kill(until(coming) or 0, signal.SIGKILL)
    asked.ended()
    assert not asked.ok
    assert "envoy does not start (SIGKILL)" in (asked.error or "")
    if "starts anew" in (asked.error or ""):
        until(lambda: gateway.child("envoy") != old)
        until(lambda: serves_again(someone))
    assert {path.name: path.read_bytes() for path in placed.glob("*.yaml")} == before
    until(lambda: works(someone))
    again = Asked(gateway, "envoy").ended()
    if not again.ok:  # after one that was killed: Envoy itself crashes then, one time in ten
        assert "the old process starts anew: envoy does not start (SIGSEGV)" in (again.error or "")
        until(lambda: serves_again(someone))
        again = Asked(gateway, "envoy").ended()
    assert again.ok, again.error
    assert works(someone)


@pytest.mark.parametrize("name", EVERYTHING[:3])
def test_a_service_that_has_died_is_replaced_too(
    gateway: Gateway, someone: Someone, name: str
) -> None:
    killed = gateway.child(name)
    os.kill(killed, signal.SIGKILL)
    assert Asked(gateway, name).ended().ok
    assert gateway.child(name) != killed
    until(lambda: works(someone))  # Envoy may have taken it for dead, and looks once a second


def test_a_service_that_is_back_from_the_dead_would_have_waited_for_the_database(
    gateway: Gateway, someone: Someone
) -> None:
    """The first start and each restart want it at once, so that mistakes are told to who asked."""

    def waits() -> bool:
        argv = Path(f"/proc/{gateway.child('authz')}/cmdline").read_text().split("\0")
        return "--no-wait" not in argv

    assert Asked(gateway, "authz").ended().ok
    assert not waits()
    killed = gateway.child("authz")
    os.kill(killed, signal.SIGKILL)
    until(lambda: gateway.child("authz") != killed)
    assert waits()
    until(lambda: works(someone))


def test_one_restart_at_a_time(gateway: Gateway, someone: Someone, upstream: StandIn) -> None:
    with streaming(someone, "one at a time") as answer:
        first = Asked(gateway, "envoy")
        until(lambda: first.done)
        second = restart(gateway.config.source, "authz")
        upstream.release("one at a time")
        answer.read()
    assert first.ended().ok
    assert second.returncode == 1
    assert second.stderr.startswith("error: another restart is under way")


def _with_another_state_dir(text: str) -> str:
    return re.sub(r"(?m)^state_dir: .*$", "state_dir: elsewhere", text)


def _with_a_model(text: str) -> str:
    return text + "\nmodel: {bundled: true}\n"


@pytest.mark.parametrize("change", [_with_another_state_dir, _with_a_model])
def test_what_needs_a_stop_is_refused(gateway: Gateway, change: Callable[[str], str]) -> None:
    config = gateway.config.source
    before = config.read_text()
    config.write_text(change(before))
    try:
        asked = Asked(gateway).ended()
    finally:
        config.write_text(before)
    assert asked.done == []
    assert "that needs a stop and a start" in (asked.error or "")


def test_what_is_not_there_cannot_be_restarted(gateway: Gateway) -> None:
    assert "valkey cannot be restarted here" in (Asked(gateway, "valkey").ended().error or "")
    assert restart(gateway.config.source, "valkey").returncode == 2


def test_without_up_there_is_nothing_to_restart(tmp_path: Path) -> None:
    done = restart(made(tmp_path, "http://127.0.0.1:9"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: nothing runs on ")


def test_only_its_user_may_ask(gateway: Gateway) -> None:
    assert (gateway.config.run_dir / "up.sock").stat().st_mode & 0o777 == 0o600


# --- the end in the middle of it ---


def test_a_stop_lets_the_streams_of_both_envoys_end(tmp_path: Path, upstream: StandIn) -> None:
    with up(tmp_path, upstream, SETTINGS) as gateway:
        someone = gateway.someone()
        with streaming(someone, "old") as old:
            asked = Asked(gateway, "envoy")
            until(lambda: asked.done)
            with streaming(someone, "new") as new:
                everybody = gateway.processes()
                assert len(everybody) == 8
                terminate(gateway)
                asked.ended()
                assert asked.error == "`up` was told to stop in the middle of it"
                upstream.release("new")
                assert new.read().endswith(b"data: [DONE]\n\n")
                upstream.release("old")
                assert old.read().endswith(b"data: [DONE]\n\n")
        assert exit_code(gateway) == 0
        assert not any(map(alive, everybody))
        assert len(gateway.rows_of(someone.user_id)) == 2


def test_a_stop_while_a_new_process_starts_leaves_nothing(
    tmp_path: Path, upstream: StandIn
) -> None:
    with up(tmp_path, upstream, SETTINGS) as gateway:
        already = sum(event["event"] == "starting" for event in gateway.events())
        asked = Asked(gateway, "authz")
        until(lambda: sum(at["event"] == "starting" for at in gateway.events()) > already)
        everybody = gateway.processes()
        terminate(gateway)
        assert asked.ended().error == "`up` was told to stop in the middle of it"
        assert exit_code(gateway) == 0
        assert not any(map(alive, everybody))


def test_a_killed_supervisor_takes_both_envoys_along(tmp_path: Path, upstream: StandIn) -> None:
    with up(tmp_path, upstream, SETTINGS) as gateway:
        with streaming(gateway.someone(), "taken along"):
            asked = Asked(gateway, "envoy")
            until(lambda: asked.done)
            everybody = gateway.processes()
            assert len(everybody) == 8
            gateway.process.kill()
            all_end(everybody)
            asked.ended()
            assert not asked.ok
        with up(tmp_path, upstream) as again:
            assert Asked(again, "envoy").ended().ok
    upstream.release("taken along")
