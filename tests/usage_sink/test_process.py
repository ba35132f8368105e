"""The whole process: what it accepted is in the database when it has ended."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import grpc
import pytest
from envoy.service.accesslog.v3 import als_pb2 as pb
from envoy.service.accesslog.v3.als_pb2_grpc import AccessLogServiceStub

from parallama.config import load
from parallama.db.manage.schema import upgrade
from tests.usage_sink.make import an_entry

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: sockets are in it."""
    with tempfile.TemporaryDirectory() as name:
        at = Path(name)
        (at / "state" / "run").mkdir(parents=True)
        # Rows wait for half a minute, unless the process leaves before.
        (at / "config.yaml").write_text(
            "{usage: {flush_seconds: 0.3}, logging: {requests: false}}\n", encoding="utf-8"
        )
        asyncio.run(upgrade(load(at / "config.yaml", {}).database))
        yield at


@asynccontextmanager
async def usage_sink(folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "usage_sink", "--config", str(folder / "config.yaml")),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def entries(first: int, count: int) -> pb.StreamAccessLogsMessage:
    message = pb.StreamAccessLogsMessage()
    message.http_logs.log_entry.extend(an_entry(f"r{first + n}") for n in range(count))
    return message


async def send(folder: Path, count: int) -> None:
    """Return when the sink has accepted so many rows."""
    async with grpc.aio.insecure_channel(f"unix:{folder}/state/run/usage_sink.sock") as channel:
        call = AccessLogServiceStub(channel).StreamAccessLogs(wait_for_ready=True)
        await call.write(entries(0, count))
        await call.done_writing()
        await call


def stored(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "parallama.db")) as database:
        return int(database.execute("SELECT count(*) FROM gateway_usage_logs").fetchone()[0])


async def is_stored(folder: Path, count: int) -> None:
    """Return when it is so. The database tells nobody, so it is asked."""
    while stored(folder) < count:  # noqa: ASYNC110 - another process writes there
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_all_accepted_rows_are_stored_on_the_way_out(folder: Path, signum: signal.Signals) -> None:
    async def story() -> int:
        async with usage_sink(folder) as process:
            await send(folder, 2000)
            process.send_signal(signum)
            return await process.wait()

    assert asyncio.run(story()) == 0
    assert stored(folder) == 2000


def test_rows_wait_for_a_database_that_somebody_else_writes_to(folder: Path) -> None:
    """An operator's own transaction is longer than one batch has patience."""

    async def story() -> int:
        with closing(sqlite3.connect(folder / "parallama.db", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            async with usage_sink(folder) as process:
                await send(folder, 100)
                process.terminate()
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(process.wait(), 0.5)
                database.execute("ROLLBACK")
                return await process.wait()

    assert asyncio.run(story()) == 0
    assert stored(folder) == 100


def test_what_a_killed_sink_had_stored_stays_and_the_next_one_goes_on(folder: Path) -> None:
    async def story() -> None:
        async with usage_sink(folder) as process:
            await send(folder, 10)
            await is_stored(folder, 10)
            process.kill()
            await process.wait()
        async with usage_sink(folder) as process:
            await send(folder, 20)  # ten of them again
            process.terminate()
            assert await process.wait() == 0

    asyncio.run(story())
    assert stored(folder) == 20


def test_rows_that_the_database_never_took_are_told_on_the_way_out(folder: Path) -> None:
    (folder / "config.yaml").write_text(
        "{shutdown: {drain_seconds: 1}, database: {timeout_seconds: 0.1}}\n", encoding="utf-8"
    )

    async def story() -> tuple[int, bytes]:
        with closing(sqlite3.connect(folder / "parallama.db", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            async with usage_sink(folder) as process:
                await send(folder, 7)
                process.terminate()
                assert process.stderr is not None
                said = await process.stderr.read()
                return await process.wait(), said

    code, said = asyncio.run(story())
    assert code == 0
    assert b'"event": "rows lost: the database did not take them", "rows": 7' in said
    assert b"Traceback" not in said
