"""One request, one row: whatever is killed, stopped, locked or full while requests run."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path

import httpx
import pytest

from parallama.trail import Trail, parse
from parallama.usage import UsageRecord
from tests.e2e.gateway import CHAT, EMBED, Gateway, Json, Someone, running, says, until
from tests.standin import StandIn
from tests.supervisor import supervised

PLAIN = {**CHAT, "stream": False}
SSE = {**CHAT, "stream": True}


@contextmanager
def a_gateway(folder: Path, **usage: object) -> Iterator[Gateway]:
    environ = {f"PARALLAMA_USAGE__{name.upper()}": str(value) for name, value in usage.items()}
    with (
        StandIn() as upstream,
        running(folder, upstream, complaints=True, environ=environ) as gateway,
    ):
        yield gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with a_gateway(tmp_path_factory.mktemp("trail")) as gateway:
        yield gateway


def ask(someone: Someone, n: int) -> None:
    """JSON, SSE, NDJSON, vectors, streams that are left, answers that fail."""
    tokens = 1 + n % 13
    kind = n % 7
    try:
        if kind == 0:
            someone.post("/api/chat", PLAIN, headers=says(tokens=tokens))
        elif kind == 1:
            someone.post("/v1/chat/completions", SSE, headers=says(tokens=tokens))
        elif kind == 2:
            someone.post("/api/chat", CHAT, headers=says(tokens=tokens))
        elif kind == 3:
            someone.post("/api/embed", EMBED)
        elif kind == 4:
            someone.post("/v1/chat/completions", PLAIN, headers=says(status=500))
        elif kind == 5:
            someone.post("/v1/chat/completions", SSE, headers=says(tokens=9, cut_after=4))
        else:
            behaviour = says(tokens=40, gap=0.01)
            with someone.stream("/api/chat", CHAT, headers=behaviour) as answer:
                next(answer.iter_lines())
    except httpx.TransportError:
        pass  # what was under way when something was killed


@contextmanager
def load(someone: Someone) -> Iterator[None]:
    """Requests of all kinds, eight at a time, for as long as the block runs."""
    over = threading.Event()

    def one(seed: int) -> None:
        n = seed
        while not over.is_set():
            ask(someone, n)
            n += 8
            time.sleep(0.01)  # a machine that tests share

    with ThreadPoolExecutor(8) as threads:
        work = [threads.submit(one, seed) for seed in range(8)]
        try:
            yield
        finally:
            over.set()
    for each in work:
        each.result()


def check_rows(gateway: Gateway, someone: Someone, *, seconds: float = 20) -> int:
    """One row for each request that reached the server, now or soon, and to the token."""
    until(lambda: all(seen.ended for seen in gateway.upstream.requests))
    seen = {at.header("x-request-id") or "": at for at in gateway.upstream.requests}
    assert len(seen) == len(gateway.upstream.requests)

    def missing() -> set[str]:
        return seen.keys() - {row["request_id"] for row in gateway.rows_of(someone.user_id)}

    until(lambda: not missing(), seconds)
    rows = gateway.rows_of(someone.user_id)
    assert len(rows) == len({row["request_id"] for row in rows})
    for row in rows:
        if row["request_id"] in seen and seen[row["request_id"]].finished:
            if row["endpoint"] == "/api/embed" or row["status_code"] >= 400:
                continue
            assert row["completion_tokens"] == seen[row["request_id"]].emitted, row
    assert len(rows) > 20
    return len(rows)


@contextmanager
def locked(gateway: Gateway) -> Iterator[None]:
    """Somebody else's transaction: nobody can store anything."""
    where = gateway.config.database.path
    with closing(sqlite3.connect(where, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            database.execute("ROLLBACK")


def trail_of(gateway: Gateway) -> Trail:
    return Trail(gateway.config.state_dir / "trail")


def fresh(gateway: Gateway) -> Someone:
    gateway.upstream.reset()
    return gateway.someone(tokens=100_000_000)


# A line says what the row says.


def test_a_line_of_the_trail_holds_the_row_that_the_stream_brought(gateway: Gateway) -> None:
    someone, poor = fresh(gateway), gateway.someone(requests=0)
    answers = [
        someone.post("/api/chat", PLAIN),
        someone.post("/api/chat", CHAT),
        someone.post("/v1/chat/completions", SSE),
        someone.post("/v1/chat/completions", SSE, headers=says(tokens=9, error_after=4)),
        someone.post("/v1/chat/completions", PLAIN, headers=says(status=500)),
        someone.post("/api/embed", EMBED),
        someone.get("/api/tags"),
        poor.post("/api/chat", PLAIN),
        someone.post("/api/chat", {**PLAIN, "model": 'ü🦙 "quoted" \\ \t'}),
    ]
    with someone.stream("/api/chat", CHAT, headers=says(tokens=99, gap=0.01)) as left:
        next(left.iter_lines())
    with gateway.http.stream("POST", "/api/chat", json=CHAT) as nobody:
        assert nobody.status_code == 401
    rows = [gateway.row(answer) for answer in (*answers, left)]
    assert {row["status_code"] for row in rows} >= {200, 429, 500}

    def written() -> dict[str, UsageRecord]:
        text = b"".join(path.read_bytes() for path in trail_of(gateway).files())
        found = [parse(line) for line in text.splitlines()]
        assert None not in found, "a line of nobody"
        return {one.record.request_id: one.record for one in found if one is not None}

    until(lambda: {row["request_id"] for row in rows} <= written().keys())
    records = written()
    assert nobody.headers["x-request-id"] not in records
    for row in rows:
        record = records[row["request_id"]]
        for field in fields(UsageRecord):
            mine = getattr(record, field.name)
            stored = row["gateway_type" if field.name == "gateway" else field.name]
            if field.name == "timestamp":
                assert mine.isoformat(" ", "microseconds")[:26] == stored
            elif field.name == "request_duration":
                assert mine == pytest.approx(stored, abs=0.0011)
            elif field.name == "time_to_first_token" and stored is not None:
                assert mine == pytest.approx(stored, abs=0.000002)
            else:
                assert mine == stored, field.name


def test_in_quiet_times_the_trail_brings_nothing_and_is_read_to_its_end(gateway: Gateway) -> None:
    someone = fresh(gateway)
    for n in range(50):
        ask(someone, n)
    check_rows(gateway, someone)
    before = len([at for at in gateway.events() if at["event"] == "rows found in the trail"])
    until(lambda: trail_of(gateway).waiting() == 0)
    events = [at["event"] for at in gateway.events()]
    assert events.count("rows found in the trail") == before == 0


# What is killed, stopped, locked.


def test_a_sink_that_is_killed_again_and_again_loses_nothing(gateway: Gateway) -> None:
    someone = fresh(gateway)
    chance = random.Random(7)  # noqa: S311 - the same moments in every run
    with load(someone):
        for _ in range(4):
            time.sleep(chance.uniform(0.1, 0.8))
            os.kill(gateway.child("usage_sink"), signal.SIGKILL)
    check_rows(gateway, someone)


def test_a_sink_that_stands_still_loses_nothing(gateway: Gateway) -> None:
    someone = fresh(gateway)
    with load(someone):
        pid = gateway.child("usage_sink")
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)
    check_rows(gateway, someone)


def test_a_database_that_is_away_and_a_sink_that_is_killed_meanwhile(gateway: Gateway) -> None:
    someone = fresh(gateway)
    with load(someone):
        with locked(gateway):
            time.sleep(1)
            os.kill(gateway.child("usage_sink"), signal.SIGKILL)
            time.sleep(1)
        time.sleep(0.5)
    check_rows(gateway, someone)
    until(lambda: trail_of(gateway).waiting() == 0)


def test_an_envoy_that_is_killed_had_told_the_trail(gateway: Gateway) -> None:
    """The sink hears nothing of it; 100 ms are all that an Envoy keeps for itself."""
    someone = fresh(gateway)
    sink = gateway.child("usage_sink")
    os.kill(sink, signal.SIGSTOP)
    try:
        with load(someone):
            time.sleep(1)
        until(lambda: all(seen.ended for seen in gateway.upstream.requests))
        time.sleep(0.5)
        os.kill(gateway.child("envoy"), signal.SIGKILL)
    finally:
        os.kill(sink, signal.SIGCONT)
    check_rows(gateway, someone)
    until(lambda: gateway.active_requests() == 0)


def test_half_a_line_and_a_foreign_one_cost_no_other(gateway: Gateway) -> None:
    someone = fresh(gateway)
    trail = trail_of(gateway)
    with load(someone):
        time.sleep(0.3)
        for odd in (b'{"id":"half', b'{"id":"r2","v":2}\n', b"\0\0\0\n", b"\xff" * 50):
            with trail.current.open("ab", buffering=0) as file:
                file.write(odd)
            time.sleep(0.15)
        os.kill(gateway.child("usage_sink"), signal.SIGKILL)
        time.sleep(0.5)
    check_rows(gateway, someone)
    until(lambda: len(trail.letters()) >= 3)
    aside = "lines of the trail kept aside"
    until(lambda: aside in gateway.log())
    said = [at for at in gateway.events() if at["event"] == aside]
    assert {"file", "offset", "reason"} <= said[0].keys()


# Files.


def test_files_are_turned_over_under_load_and_nothing_is_lost(tmp_path: Path) -> None:
    with a_gateway(tmp_path, trail_file_size="20K") as gateway:
        someone = fresh(gateway)
        trail = trail_of(gateway)
        with load(someone):
            until(lambda: len(trail.files()) >= 3)
            os.kill(gateway.child("usage_sink"), signal.SIGKILL)
            time.sleep(1.5)
        check_rows(gateway, someone)
        until(lambda: len(trail.files()) == 1, 40)
        assert trail.waiting() == 0
        assert len(trail.letters()) == 0


def test_a_trail_that_is_full_is_said_aloud_and_rows_go_on(tmp_path: Path) -> None:
    with a_gateway(tmp_path, trail_file_size="8K", trail_max_size="32K") as gateway:
        someone = fresh(gateway)
        trail = trail_of(gateway)
        with locked(gateway):
            with load(someone):
                until(lambda: "the trail is full" in gateway.log())
                time.sleep(1)
            size = trail.size()
            told = status(gateway)
            assert told["trail"].endswith("full")
            assert not told["ok"]
            with load(someone):
                time.sleep(1)
            assert trail.size() == size
        check_rows(gateway, someone)
        until(lambda: "the trail has room again" in gateway.log(), 40)
        before = trail.current.stat().st_size if trail.current.exists() else 0
        someone.post("/api/chat", PLAIN)
        until(lambda: trail.current.stat().st_size > before)
        assert not status(gateway)["trail"].endswith("full")


def status(gateway: Gateway) -> Json:
    done = subprocess.run(
        [supervised.UP[0], "--config", gateway.config.source, "status", "-o", "json"],
        env={**os.environ, "PARALLAMA_USAGE__TRAIL_MAX_SIZE": "32K"},
        capture_output=True,
        timeout=30,
        check=False,
    )
    told: Json = json.loads(done.stdout)
    return told


def test_a_trail_that_cannot_be_written_stops_neither_requests_nor_rows(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "trail"
    folder.mkdir(parents=True)
    (folder / "usage.jsonl").symlink_to("/dev/full")
    with a_gateway(tmp_path) as gateway:
        someone = fresh(gateway)
        with load(someone):
            time.sleep(1)
        check_rows(gateway, someone)
        until(lambda: "envoy could not write to the trail" in gateway.log(), 20)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "state" / "trail"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, timeout=10, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("this user may mount nothing")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], timeout=10, check=True)


def test_a_disk_that_is_full_for_a_while_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    with a_gateway(tmp_path) as gateway:
        someone = fresh(gateway)
        ballast = small_disk / "ballast"
        with load(someone):
            time.sleep(0.5)
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * 1000)
                except OSError:
                    pass
            time.sleep(2)
            ballast.unlink()
            time.sleep(1)
        check_rows(gateway, someone)
        until(lambda: trail_of(gateway).waiting() == 0)


# The supervisor.


def test_a_supervisor_that_is_killed_has_told_the_trail_what_it_cuts(tmp_path: Path) -> None:
    with StandIn() as upstream:
        with supervised.up(tmp_path, upstream) as gateway:
            someone = fresh(gateway)
            for n in range(14):
                ask(someone, n)
            with someone.stream("/api/chat", CHAT, headers=says(tokens=99, hold_at=5)) as answer:
                lines = answer.iter_lines()
                for _ in range(5):
                    next(lines)
                everybody = gateway.processes()
                os.kill(gateway.child("usage_sink"), signal.SIGSTOP)
                gateway.process.kill()
                for pid in everybody:
                    if "usage_sink" in command(pid):
                        os.kill(pid, signal.SIGKILL)
                with pytest.raises(httpx.TransportError):
                    list(lines)
            supervised.all_end(everybody)
            upstream.release()
        with supervised.up(tmp_path, upstream) as gateway:
            seen = {at.header("x-request-id") for at in upstream.requests}
            ids = until(
                lambda: (
                    found
                    if len(found := [r["request_id"] for r in gateway.rows_of(someone.user_id)])
                    >= len(seen)
                    else None
                )
            )
            assert sorted(ids or []) == sorted(str(id) for id in seen)
            (cut,) = gateway.rows(answer.headers["x-request-id"])
            assert (cut["completion_tokens"], cut["token_source"]) == (5, "counted")


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
