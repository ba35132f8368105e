"""One fault under load, and what became of every call."""

import asyncio
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from redis import Redis

from parallama.limits import Unit, Window
from tests.e2e.gateway import Gateway, Json, Someone, until
from tests.faults.load import Load
from tests.standin import StandIn
from tests.supervisor.supervised import start, up, wait_for_event

LEASE = 3
SETTINGS = f"""
usage: {{flush_seconds: 0.01}}
rate_limiting: {{reservation_seconds: {LEASE}}}
logging: {{format: json, requests: false}}
"""
QUOTA = 10**9


@dataclass
class Outcome:
    """What a fault did. All but `calls`, `rows`, `unknown` and `refused` should be 0."""

    fault: str
    calls: int = 0
    rows: int = 0
    refused: int = 0
    """Calls that the upstream never saw."""
    unknown: int = 0
    """Rows of calls whose end nobody told."""
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)
    overcharged: int = 0
    """Tokens in the counters beyond those in the rows; below 0: too few."""
    left_open: int = 0
    held: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not (
            self.lost or self.doubled or self.inexact or self.overcharged or self.left_open
            or self.held
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.fault:22} {self.calls:6} {self.rows:6} {self.refused:7} {self.unknown:7} "
            f"{len(self.lost):5} {len(self.doubled):7} {len(self.inexact):7} "
            f"{self.overcharged:11} {self.left_open:5} {self.held:5} {self.seconds:8.1f}"
        )


HEADER = (
    f"{'fault':22} {'calls':>6} {'rows':>6} {'refused':>7} {'unknown':>7} {'lost':>5} "
    f"{'doubled':>7} {'inexact':>7} {'overcharged':>11} {'open':>5} {'held':>5} {'seconds':>8}"
)

Fault = Callable[[Gateway], None]


def kill(name: str) -> Fault:
    def fault(gateway: Gateway) -> None:
        pid = gateway.child(name)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists() or gateway.child(name) != pid)

    return fault


def kill_everything(gateway: Gateway) -> None:
    """The supervisor dies, and with it all its children; then somebody starts it again."""
    pids = gateway.processes()
    gateway.process.kill()
    gateway.process.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20)
    gateway.process = start(gateway.folder / "config.yaml")
    wait_for_event(gateway, "serving", service="up")


def stop_for(name: str, seconds: float) -> Fault:
    def fault(gateway: Gateway) -> None:
        pid = gateway.child(name)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    return fault


def lock_database_for(seconds: float) -> Fault:
    def fault(gateway: Gateway) -> None:
        with closing(sqlite3.connect(gateway.config.database.path)) as db:
            db.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)

    return fault


FAULTS: dict[str, Fault] = {
    "nothing": lambda gateway: None,
    "kill usage_sink": kill("usage_sink"),
    "kill ratelimit": kill("ratelimit"),
    "kill authz": kill("authz"),
    "kill valkey": kill("valkey"),
    "kill envoy": kill("envoy"),
    "kill supervisor": kill_everything,
    "stop usage_sink": stop_for("usage_sink", 30),
    "database away": lock_database_for(60),
}


def tell(
    folder: Path, name: str, fault: Fault, *, calls: int, at_once: int = 20, seed: int = 1
) -> Outcome:
    """Run `calls` with the fault in their midst, wait until all is quiet, and count."""
    began = time.monotonic()
    outcome = Outcome(name, calls=calls)
    with StandIn() as upstream, up(folder, upstream, SETTINGS) as gateway:
        who = gateway.someone(tokens=QUOTA, window=Window.DAY)
        load = Load(who, calls=calls, at_once=at_once, seed=seed)
        asyncio.run(_under_load(gateway, load, fault))
        _settle_down(gateway, upstream)
        _count(outcome, gateway, who, load)
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.wait(60)
    outcome.seconds = time.monotonic() - began
    return outcome


async def _under_load(gateway: Gateway, load: Load, fault: Fault) -> None:
    running = asyncio.create_task(load.run())
    while load.done < 40 and not running.done():  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await asyncio.to_thread(fault, gateway)
    await running


def _settle_down(gateway: Gateway, upstream: StandIn) -> None:
    """All answers have ended, and no reservation is open any more."""
    until(lambda: all(seen.ended for seen in upstream.requests), 60)
    with _redis(gateway) as redis:
        until(lambda: _open(redis) == 0 or None, 90 + 4 * LEASE)


@contextmanager
def _redis(gateway: Gateway) -> Iterator[Redis]:
    path = os.path.relpath(gateway.config.run_dir / "valkey.sock")
    password = gateway.config.redis.password
    secret = password.get_secret_value() if password else None
    with Redis(unix_socket_path=path, password=secret) as redis:
        yield redis


def _open(redis: Redis) -> int:
    return sum(int(redis.zcard(key)) for key in redis.keys("rl:*:open"))


def _count(outcome: Outcome, gateway: Gateway, who: Someone, load: Load) -> None:
    rows: dict[str, list[Json]] = {}
    for row in gateway.rows_of(who.user_id):
        rows.setdefault(row["request_id"], []).append(row)
    told = {call.number: call for call in load.told}
    reached = set()
    for seen in gateway.upstream.requests:
        number, id = seen.header("x-number"), seen.header("x-request-id")
        if number is None or id is None:
            continue
        reached.add(int(number))
        found = rows.get(id, [])
        call = told[int(number)]
        if not found:
            outcome.lost.append(f"{id} {call}")
            continue
        if len(found) > 1:
            outcome.doubled.append(f"{id} {call}")
        (row, *_) = found
        if call.complete and call.kind != "cut":
            spent = seen.prompt_tokens + seen.emitted
            if row["tokens_used"] != spent:
                outcome.inexact.append(f"{id} {call}: {row['tokens_used']} for {spent}")
        # What was delivered, or what Envoy had on its way to the client by then.
        elif (
            call.kind == "hang up"
            and call.status == 200
            and row["token_source"] != "unknown"
            and not call.delivered - 1 <= row["tokens_used"] <= seen.prompt_tokens + seen.emitted
        ):
            outcome.inexact.append(f"{id} {call}: {row['tokens_used']}")
    outcome.rows = sum(map(len, rows.values()))
    outcome.refused = outcome.calls - len(reached)
    sources = Counter(row["token_source"] for found in rows.values() for row in found)
    outcome.unknown = sources["unknown"]
    spent = sum(int(row["tokens_used"]) for found in rows.values() for row in found)
    with _redis(gateway) as redis:
        used = held = 0
        for key in redis.keys(f"rl:*:b:{who.user_id}:*{Unit.TOKENS}*"):
            bucket = redis.hgetall(key)
            used += int(bucket.get(b"used", 0))
            held += int(bucket.get(b"reserved", 0))
        outcome.left_open = _open(redis)
    outcome.overcharged, outcome.held = used - spent, held
