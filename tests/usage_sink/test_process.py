"""The whole process: what it accepted is in the database when it has ended."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import grpc
import pytest
from envoy.service.accesslog.v3 import als_pb2 as pb
from envoy.service.accesslog.v3.als_pb2_grpc import AccessLogServiceStub

from parallama.config import load
from parallama.trail import Trail
from tests.parallama.db_on_disk import migrate
from tests.usage_sink.lines import append, lines
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
        asyncio.run(migrate(load(at / "config.yaml", {}).database))
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


# The trail.


def in_the_trail(folder: Path, *ids: object) -> None:
    trail = Trail(folder / "state" / "trail")
    trail.make()
    append(trail.current, lines(*ids))


def offset_is_kept(folder: Path) -> bool:
    return Trail(folder / "state" / "trail").waiting() == 0


async def is_so(check: Callable[[], bool]) -> None:
    while not check():  # noqa: ASYNC110 - another process writes there
        await asyncio.sleep(0.01)


def test_a_sink_that_starts_late_stores_what_it_missed(folder: Path) -> None:
    in_the_trail(folder, *range(1200))

    async def story() -> int:
        async with usage_sink(folder) as process:
            await is_stored(folder, 1200)
            process.terminate()
            return await process.wait()

    assert asyncio.run(story()) == 0
    assert stored(folder) == 1200
    assert offset_is_kept(folder)


def test_on_the_way_out_the_trail_is_read_to_its_end(folder: Path) -> None:
    async def story() -> int:
        async with usage_sink(folder) as process:
            await send(folder, 10)
            in_the_trail(folder, *(f"r{n}" for n in range(20)))
            process.terminate()
            return await process.wait()

    assert asyncio.run(story()) == 0
    assert stored(folder) == 20
    assert offset_is_kept(folder)


def test_a_sink_that_is_killed_while_it_reads_goes_on_where_it_was(folder: Path) -> None:
    in_the_trail(folder, *range(12_000))

    async def story() -> None:
        for count in (1000, 4000, 12_000):
            async with usage_sink(folder) as process:
                await is_stored(folder, count)
                process.kill()
                await process.wait()

    asyncio.run(story())
    assert stored(folder) == 12_000


def test_memory_is_flat_while_the_database_is_away_and_the_rest_waits_in_the_trail(
    folder: Path,
) -> None:
    """30,000 rows would be more than 50 MB."""

    async def feed(count: int) -> None:
        async with grpc.aio.insecure_channel(f"unix:{folder}/state/run/usage_sink.sock") as channel:
            call = AccessLogServiceStub(channel).StreamAccessLogs(wait_for_ready=True)
            for first in range(0, count, 100):
                await call.write(entries(first, 100))

    async def story() -> tuple[int, int]:
        with closing(sqlite3.connect(folder / "parallama.db", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            async with usage_sink(folder) as process:
                await send(folder, 1000)
                before = memory(process.pid)
                feeding = asyncio.create_task(feed(30_000))
                for first in range(0, 30_000, 1000):  # as Envoy does, whoever listens
                    in_the_trail(folder, *(f"r{n}" for n in range(first, first + 1000)))
                    await asyncio.sleep(0.01)
                await asyncio.sleep(1)
                assert not feeding.done()  # held back
                feeding.cancel()
                during = memory(process.pid)
                process.kill()
                await process.wait()
            database.execute("ROLLBACK")
        async with usage_sink(folder) as process:
            await is_stored(folder, 30_000)
            process.terminate()
            await process.wait()
        return before, during

    before, during = asyncio.run(story())
    assert stored(folder) == 30_000
    assert during - before < 20 * 2**20


def memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_rows_that_wait_in_the_trail_are_not_called_lost(folder: Path) -> None:
    (folder / "config.yaml").write_text(
        "{shutdown: {drain_seconds: 1}, database: {timeout_seconds: 0.1}}\n", encoding="utf-8"
    )

    async def story() -> bytes:
        with closing(sqlite3.connect(folder / "parallama.db", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            async with usage_sink(folder) as process:
                await send(folder, 7)
                in_the_trail(folder, *(f"r{n}" for n in range(7)))
                process.terminate()
                assert process.stderr is not None
                said = await process.stderr.read()
                assert await process.wait() == 0
                return said

    said = asyncio.run(story())
    assert b'"event": "rows wait in the trail", "rows": 7' in said
    assert b"rows lost" not in said


def test_old_rows_are_removed_as_configured(folder: Path) -> None:
    """Those of make.py are from March 2026."""
    in_the_trail(folder, 1, 2)

    async def story() -> None:
        async with usage_sink(folder) as process:
            await is_stored(folder, 2)
            process.terminate()
            await process.wait()
        (folder / "config.yaml").write_text("{usage: {retention_days: 1}}\n", encoding="utf-8")
        async with usage_sink(folder):
            await is_so(lambda: stored(folder) == 0)

    asyncio.run(story())
