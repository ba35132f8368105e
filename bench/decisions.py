"""
How many decisions a second `ratelimit` makes, and what one costs, by how many users there are.

`python -m bench.decisions`, or `make bench-decisions`. The service as it runs in production answers
Envoy's messages, on a Valkey and a SQLite database of its own; only the socket to Envoy is missing.
Each decision is a reservation that is settled. Nothing is asserted.
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing
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
from parallama.prices import Prices
from parallama.roles import METERED
from parallama.stores import connect_redis
from parallama.supervisor import children
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


async def _measure(config: Config, users: int, decisions: int, valkey: int) -> tuple[float, ...]:
    told = config.rate_limiting
    async with (
        database(config.database) as db,
        connect_redis(config) as redis,
        aclosing(Counters(redis, lease=900, timeout=5)) as counters,
    ):
        policies = Policies(partial(policy_of, db), size=told.cache_size)
        policies.resume()
        service = RateLimit(
            counters,
            policies,
            clock=time.time,
            zone=UTC,
            estimate=Estimate(bytes_per_token=4, default_max_tokens=512),
            prices=Prices(partial(prices_of, db)),
            rebuild=Rebuild(
                counters,
                partial(ledger.used_since, db, endpoints=METERED),
                partial(ledger.stored_ids, db),
            ),
            outage=Outage({"openai": "deny"}, processes=1, monotonic=time.monotonic),
            hard=False,
        )
        choose = random.Random(1)  # noqa: S311
        left = iter(range(decisions))

        async def caller() -> None:
            for number in left:
                user = _user(choose.randrange(users))
                await service.should_rate_limit(_reserve(user, f"r{users}-{number}"))
                service.should_rate_limit(_settle(user, f"r{users}-{number}"))

        began, cpu, theirs = time.perf_counter(), time.process_time(), _cpu(valkey)
        await asyncio.gather(*(caller() for _ in range(_AT_ONCE)))
        seconds = time.perf_counter() - began
        ours, theirs = time.process_time() - cpu, _cpu(valkey) - theirs
        await service.aclose()
        return decisions / seconds, ours / decisions * 1e6, theirs / decisions * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, nargs="*", default=[10, 1000, 100_000, 1_000_000])
    parser.add_argument("--decisions", type=int, default=30_000)
    chosen = parser.parse_args()
    print(f"{'users':>9} {'':8} {'decisions/s':>12} {'python us':>10} {'valkey us':>10}")
    for users in chosen.users:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            config = _set_up(Path(name) / "state", users)
            config.run_dir.mkdir(parents=True, exist_ok=True)
            os.chdir(config.state_dir)
            command = children.valkey(config)
            with subprocess.Popen(command.argv, cwd=command.cwd) as valkey:
                socket = config.run_dir / "valkey.sock"
                while not socket.exists():
                    time.sleep(0.01)
                for turn in ("first", "again"):
                    found = uvloop.run(_measure(config, users, chosen.decisions, valkey.pid))
                    told = " ".join(
                        f"{value:{width}.0f}"
                        for value, width in zip(found, (12, 10, 10), strict=True)
                    )
                    print(f"{users:9} {turn:8} {told}", flush=True)
                os.chdir("/")
                valkey.terminate()


if __name__ == "__main__":
    main()
