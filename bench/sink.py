"""
How many usage rows a second a database takes, and what a row costs: `python -m bench.sink`, or
`make bench-sink`.

Rows go in as usage_sink stores them, batch after batch through one connection. PostgreSQL is a real
one from a wheel, with its shipped settings, on the same machine; its CPU time is that of all its
processes. SQLite works inside our process. Making the rows is not counted. Nothing is asserted.
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import uvloop

from bench import procs
from parallama.config import Database
from parallama.db import database, ledger
from parallama.db.manage.schema import upgrade
from parallama.usage import UsageRecord
from tests.postgres import Postgres

_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / (1 << 20)
_USERS = [str(UUID(int=number)) for number in range(100)]


@dataclass(slots=True)
class Measured:
    rows: int = 0
    seconds: float = 0.0
    ours: float = 0.0
    """CPU seconds."""
    server: float = 0.0
    early_mb: float = 0.0
    """Our memory after a tenth of the rows."""
    late_mb: float = 0.0


def batches(rows: int, size: int) -> Iterator[list[UsageRecord]]:
    """As a busy day brings them: ids are random, times grow."""
    start = datetime(2026, 3, 1, tzinfo=UTC)
    noise = random.Random(1)  # noqa: S311
    for first in range(0, rows, size):
        yield [
            _record(str(UUID(int=noise.getrandbits(128))), start + timedelta(milliseconds=number))
            for number in range(first, min(first + size, rows))
        ]


def _record(id: str, at: datetime) -> UsageRecord:
    return UsageRecord(
        request_id=id,
        timestamp=at,
        user_id=_USERS[at.microsecond // 1000 % 100],
        username="anna",
        key_id=_USERS[at.microsecond // 1000 % 100],
        gateway="ollama",
        dialect="openai",
        endpoint="/v1/chat/completions",
        model_name="llama3.2:3b",
        served_model="llama3.2:3b",
        prompt_tokens=812,
        completion_tokens=154,
        cached_tokens=None,
        tokens_used=966,
        token_source="reported",  # noqa: S106 - not a password
        streamed=True,
        finished=True,
        aborted=False,
        status_code=200,
        flags="",
        error_message=None,
        request_duration=3.25,
        time_to_first_token=0.25,
        compute_ms=2900.5,
        upstream_host="10.0.0.7:11434",
        cost=Decimal("0.000966"),
    )


async def measure(at: Database, rows: int, size: int, server: Callable[[], float]) -> Measured:
    done = Measured()
    await upgrade(at)
    async with database(at) as store:
        before = server()
        for batch in batches(rows, size):
            clocks = time.perf_counter(), time.process_time()
            added = await ledger.add(store, batch)
            assert added == ledger.Added(len(batch), ())
            done.seconds += time.perf_counter() - clocks[0]
            done.ours += time.process_time() - clocks[1]
            done.rows += len(batch)
            done.late_mb = _resident_mb()
            if done.rows <= max(rows // 10, size):
                done.early_mb = done.late_mb
        done.server = server() - before
    return done


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_MB


def _line(name: str, done: Measured) -> str:
    ours, server = (1e6 * spent / done.rows for spent in (done.ours, done.server))
    return (
        f"{name:<12}{done.rows:>10,}{done.rows / done.seconds:>12,.0f}"
        f"{ours:>10.1f}{server:>10.1f}{1e6 / (ours + server):>12,.0f}"
        f"{done.early_mb:>10.1f}{done.late_mb:>10.1f}"
    )


def run(rows: int, size: int, only: str | None) -> list[str]:
    lines = [
        f"{'':<12}{'rows':>10}{'rows/s':>12}{'us ours':>10}{'us server':>10}{'rows/s/core':>12}"
        f"{'MB at 10%':>10}{'MB at end':>10}"
    ]
    with ExitStack() as stack, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if only != "sqlite":
            server = Postgres(fsync="on")
            stack.callback(server.remove)
            at = server.empty()

            def spent() -> float:
                return sum(procs.cpu_seconds(procs.tree(server.pid)).values())

            lines.append(_line("PostgreSQL", runner.run(measure(at, rows, size, spent))))
        if only != "postgresql":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            at = Database.model_validate({"path": f"{folder}/parallama.db"})
            lines.append(_line("SQLite", runner.run(measure(at, rows, size, lambda: 0.0))))
    return lines


def main() -> None:
    text = argparse.RawDescriptionHelpFormatter
    args = argparse.ArgumentParser(
        "python -m bench.sink", description=__doc__, formatter_class=text
    )
    args.add_argument("--rows", type=int, default=200_000, help="default: 200000")
    args.add_argument("--batch", type=int, default=500, help="rows in one insert; default: 500")
    args.add_argument("--only", choices=["postgresql", "sqlite"])
    chosen = args.parse_args()
    for line in run(chosen.rows, chosen.batch, chosen.only):
        print(line)


if __name__ == "__main__":
    main()
