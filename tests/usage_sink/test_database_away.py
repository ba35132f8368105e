"""The whole process, begun while its database is away: it waits, says so, and stores then."""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import pytest
from envoy.service.accesslog.v3 import als_pb2 as pb
from envoy.service.accesslog.v3.als_pb2_grpc import AccessLogServiceStub

from parallama.config import Database
from parallama.health import serves
from parallama.trail import Trail
from tests.postgres import Postgres
from tests.usage_sink.lines import append, lines
from tests.usage_sink.make import an_entry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """Of its own: it is stopped."""
    running = Postgres()
    yield running
    running.remove()


@pytest.fixture
def at(server: Postgres) -> Database:
    return server.migrated()


@pytest.fixture
def folder(at: Database) -> Iterator[Path]:
    """Short: sockets are in it."""
    assert at.password_file is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "state" / "run").mkdir(parents=True)
        (folder / "config.yaml").write_text(
            "usage: {flush_seconds: 0.01}\n"
            "logging: {format: json, requests: false}\n"
            f"database: {{host: {at.host}, port: {at.port}, name: {at.name}, user: {at.user},"
            f" password_file: {at.password_file.path}}}\n",
            encoding="utf-8",
        )
        yield folder


Process = asyncio.subprocess.Process


def told(folder: Path, story: Callable[[Process], Awaitable[None]], *more: str) -> str:
    """What it said."""

    async def inside() -> bytes:
        command = [sys.executable, "-m", "usage_sink", "--config", str(folder / "config.yaml")]
        process = await asyncio.create_subprocess_exec(
            *command, *more, cwd=ROOT, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        saying = asyncio.create_task(process.stderr.read())
        try:
            async with asyncio.timeout(30):
                await story(process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return await saying

    return asyncio.run(inside()).decode()


async def until(check: Callable[[], object]) -> None:
    while not await asyncio.to_thread(check):  # noqa: ASYNC110 - other processes tell nobody
        await asyncio.sleep(0.02)


async def send(folder: Path, *ids: str) -> None:
    message = pb.StreamAccessLogsMessage()
    message.http_logs.log_entry.extend(an_entry(id) for id in ids)
    async with grpc.aio.insecure_channel(f"unix:{folder}/state/run/usage_sink.sock") as channel:
        call = AccessLogServiceStub(channel).StreamAccessLogs(wait_for_ready=True)
        await call.write(message)
        await call.done_writing()
        await call


def test_it_waits_and_stores_what_came_meanwhile_by_both_ways(
    server: Postgres, at: Database, folder: Path
) -> None:
    socket = str(folder / "state" / "run" / "usage_sink.sock")

    def stored() -> set[str]:
        rows = server.run("SELECT request_id FROM gateway_usage_logs", database=at.name or "")
        return {id for (id,) in rows}

    async def story(process: Process) -> None:
        await send(folder, "r1", "r2")
        assert not serves(socket)
        server.start()
        await until(lambda: stored() == {"r1", "r2", "t1", "t2"})
        await until(lambda: serves(socket))
        process.terminate()
        assert await process.wait() == 0

    trail = Trail(folder / "state" / "trail")
    trail.make()
    append(trail.current, lines("t1", "t2"))
    server.stop()
    said = told(folder, story)
    assert said.count('"database away"') == said.count('"database is there"') == 1
    events = [json.loads(line) for line in said.splitlines()]
    causes = [at["cause"] for at in events if at["event"] == "rows not stored yet"]
    assert len(causes) == len(set(causes)) > 0  # each once: a server that starts is another
    assert "is the server running" in said


def test_as_a_first_start_it_does_not_wait(server: Postgres, folder: Path) -> None:
    async def story(process: Process) -> None:
        assert await process.wait() == 1

    server.stop()
    try:
        said = told(folder, story, "--no-wait")
    finally:
        server.start()
    assert said.startswith("usage_sink: the database ")
    assert "is the server running" in said
    assert said.count("\n") == 1


def test_tables_of_another_version_end_it_when_the_database_comes(
    server: Postgres, at: Database, folder: Path
) -> None:
    server.run("DELETE FROM alembic_version", database=at.name or "")

    async def story(process: Process) -> None:
        await send(folder, "r1")
        server.start()
        assert await process.wait() == 1

    server.stop()
    said = told(folder, story)
    assert "has no tables yet: run `parallama db upgrade`" in said.splitlines()[-1]
    assert "Traceback" not in said
