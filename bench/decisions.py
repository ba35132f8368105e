"""
How many decisions a second `ratelimit` makes, and what one costs, by how many users there are.

`python -m bench.decisions`, or `make bench-decisions`. The service as it runs in production answers
Envoy's messages, on a Valkey and a SQLite database of its own; only the socket to Envoy is missing.
Each decision is a reservation that is settled. Nothing is asserted.

`first`: calls of users who never called before: the database is asked for their limits and for what
they used, and their counters are made. `again`: calls of those users in any order; the limits of
`rate_limiting.cache_size` of them are remembered, those of others are looked up.
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC
from functools import partial
from pathlib import Path

import uvloop
from envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest

from parallama.config import Config, load
from parallama.counters import Counters
from parallama.db import database, ledger
from parallama.db.policies import policy_of
from parallama.db.prices import prices_of
from parallama.endpoints import METERED
from parallama.prices import Prices
from parallama.stores import connect_redis
from parallama.supervisor import children
from ratelimit.charging import Charging
from ratelimit.estimate import Estimate
from ratelimit.outage import Outage
from ratelimit.policies import Policies
from ratelimit.rebuild import Rebuild
from ratelimit.service import RateLimit

_AT_ONCE = 64


def _call(entries: dict[str, str], used: int | None = None) -> bytes:
    request = RateLimitRequest(domain="parallama")
    descriptor = request.descriptors.add()
    for key, value in entries.items():
        descriptor.entries.add(key=key, value=value)
    if used is not None:
        descriptor.hits_addend.value = used
    return request.SerializeToString()


def _reserve(user: str, id: str) -> bytes:
    return _call(
        {
            "metered": "1", "user": user, "key": "k", "gateway": "openai", "dialect": "openai",
            "endpoint": "/v1/chat/completions", "model": "m", "max_tokens": "50",
            "body_bytes": "200", "request_id": id,
        }
    )  # fmt: skip


def _settle(user: str, id: str) -> bytes:
    entries = {"user": user, "reservation": id, "gateway": "openai", "model": "m"}
    return _call({**entries, "body_bytes": "200", "prompt_reported": "40"}, used=60)


def _set_up(folder: Path, users: int) -> Config:
    program = [sys.executable, "-m", "parallama"]

    def run(*words: str) -> None:
        environ = {**os.environ, "PARALLAMA_CONFIG": str(folder / "config.yaml")}
        subprocess.run([*program, *words], env=environ, check=True, capture_output=True)

    run("init", "--dir", str(folder), "--listen", "127.0.0.1:9", "--upstream", "http://127.0.0.1:9")
    given = ["--requests-per-minute", "100000", "--tokens-per-day", "1000000000"]
    run("limits", "set", "role:user", "--gateway", "*", *given)
    config = load(folder / "config.yaml", os.environ)
    import sqlite3

    with sqlite3.connect(config.database.path) as db:
        at = "2026-01-01 00:00:00.000000"
        db.executemany(
            "INSERT INTO users (id, username, role, is_admin, created_at, updated_at) "
            "VALUES (?, ?, 'user', 0, ?, ?)",
            ((_user(n), f"u{n}", at, at) for n in range(users)),
        )
    db.close()
    return config


def _user(number: int) -> str:
    return f"00000000-0000-7000-8000-{number:012d}"


def _cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@dataclass(frozen=True, slots=True)
class Measured:
    turn: str
    users: int
    """Who called."""
    rate: float
    ours: float
    """Microseconds of CPU a decision."""
    valkey: float
    memory: float
    """MB of this process."""


async def _measure(
    config: Config, users: int, decisions: int, valkey: int
) -> AsyncIterator[Measured]:
    told = config.rate_limiting
    async with (
        database(config.database) as db,
        connect_redis(config) as redis,
        aclosing(Counters(redis, lease=900, timeout=5)) as counters,
    ):
        policies = Policies(partial(policy_of, db), size=told.cache_size)
        policies.resume()
        rebuild = Rebuild(counters, partial(ledger.spending, db, endpoints=METERED))
        service = RateLimit(
            counters,
            policies,
            clock=time.time,
            zone=UTC,
            estimate=Estimate(bytes_per_token=4, default_max_tokens=512),
            prices=Prices(partial(prices_of, db)),
            rebuild=rebuild,
            charging=Charging(counters, policies, rebuild, clock=time.time, zone=UTC),
            outage=Outage({"openai": "deny"}, processes=1, monotonic=time.monotonic),
            hard=False,
        )
        drawn = random.Random(1)  # noqa: S311
        callers = drawn.sample(range(users), min(users, decisions))
        again = drawn.choices(callers, k=decisions)
        for turn, order in (("first", callers), ("again", again)):
            calls = [(_user(who), f"{turn}-{number}") for number, who in enumerate(order)]
            began, cpu, theirs = time.perf_counter(), time.process_time(), _cpu(valkey)
            await _decide(service, calls)
            seconds, count = time.perf_counter() - began, len(calls)
            ours, theirs = time.process_time() - cpu, _cpu(valkey) - theirs
            yield Measured(
                turn, len(callers), count / seconds, ours / count * 1e6, theirs / count * 1e6,
                _resident_mb(),
            )  # fmt: skip
        await service.aclose()


async def _decide(service: RateLimit, calls: list[tuple[str, str]]) -> None:
    left = iter(calls)

    async def caller() -> None:
        for user, id in left:
            asked = service.should_rate_limit(_reserve(user, id))
            assert not isinstance(asked, bytes)
            await asked
            service.should_rate_limit(_settle(user, id))

    await asyncio.gather(*(caller() for _ in range(_AT_ONCE)))


async def _all(measured: AsyncIterator[Measured]) -> list[Measured]:
    return [one async for one in measured]


HEADER = (
    f"{'users':>10}{'':>8}{'callers':>10}{'decisions/s':>13}{'python us':>11}{'valkey us':>11}"
    f"{'MB':>8}"
)


def run(users: int, decisions: int) -> Iterator[str]:
    """Lines of the table."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        config = _set_up(Path(name) / "state", users)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        before = Path.cwd()
        os.chdir(config.state_dir)  # the names of sockets are short from there
        command = children.valkey(config)
        with subprocess.Popen(command.argv, cwd=command.cwd) as valkey:
            try:
                while not (config.run_dir / "valkey.sock").exists():
                    time.sleep(0.01)
                for found in uvloop.run(_all(_measure(config, users, decisions, valkey.pid))):
                    yield (
                        f"{users:>10,}{found.turn:>8}{found.users:>10,}{found.rate:>13,.0f}"
                        f"{found.ours:>11.0f}{found.valkey:>11.0f}{found.memory:>8.0f}"
                    )
            finally:
                valkey.terminate()
                os.chdir(before)


def main() -> None:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m bench.decisions", description=__doc__, formatter_class=text
    )
    parser.add_argument("--users", type=int, nargs="*", default=[10, 10_000, 1_000_000])
    parser.add_argument("--decisions", type=int, default=30_000)
    chosen = parser.parse_args()
    print(HEADER)
    for users in chosen.users:
        for line in run(users, chosen.decisions):
            print(line, flush=True)


if __name__ == "__main__":
    main()
