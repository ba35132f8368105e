"""
What it costs `authz` to know who calls: `python -m bench.identity`, or `make bench-identity`.

First the CPU time of one question from Envoy, without the socket: with a key and with access tokens
that were seen before, and with a token that is new each time. Then whole processes on databases of
two sizes: how soon they serve, what they take, and how long an answer takes, over their socket.
PostgreSQL is a real one from a wheel, on the same machine. Nothing is asserted.
"""

import argparse
import asyncio
import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import uvloop
import yaml
from envoy.service.auth.v3 import external_auth_pb2 as pb
from envoy.service.auth.v3.external_auth_pb2_grpc import AuthorizationStub

from authz.bearers import Bearers
from authz.issuers import trusted
from authz.keyring import Keyring
from authz.service import Authz
from bench import measure, procs
from parallama import contract as c
from parallama import keys, signing, tokens
from parallama.clock import system_clock
from parallama.config import Config, Database, load
from parallama.db import Store, database
from parallama.db.accounts import find_key
from parallama.db.manage.schema import upgrade
from parallama.supervisor import children
from tests.authz.make import no_mappings, no_signatures
from tests.postgres import Postgres

MINTED = keys.mint(lambda count: bytes([7]) * count, rounds=4)
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_AT_ONCE = 1000
_OF_EACH = 10  # keys a user


def _user(number: int) -> str:
    return str(UUID(int=number))


def _public_id(number: int) -> str:
    digits = ""
    for _ in range(12):
        number, digit = divmod(number, 62)
        digits = _BASE62[digit] + digits
    return digits


def _token(number: int) -> str:
    """All keys have one secret, and so one hash: to make so many would take minutes."""
    body = f"plm_{_public_id(number)}_{MINTED.token[17:60]}"
    return body + keys._checksum(body)


def _question(token: str) -> pb.CheckRequest:
    check = pb.CheckRequest()
    at = check.attributes
    at.source.address.socket_address.address = "127.0.0.1"
    at.request.http.method = "POST"
    at.request.http.path = "/v1/chat/completions"
    at.request.http.headers["authorization"] = f"Bearer {token}"
    route = {c.ROUTE_GATEWAY: "openai", c.ROUTE_DIALECT: "openai", c.ROUTE_BASE: ""}
    at.context_extensions.update(route)
    return check


async def _fill(store: Store, count: int) -> None:
    """`count` keys, and a user for ten of them each."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for first in range(0, count, _AT_ONCE * _OF_EACH):
        some = range(first, min(first + _AT_ONCE * _OF_EACH, count))
        people = sorted({number // _OF_EACH for number in some})
        await store.write(
            (
                "INSERT INTO users (id, username, role, is_admin, created_at, updated_at) "
                "VALUES (?, ?, 'user', ?, ?, ?)",
                [(_user(who), f"u{who}", False, now, now) for who in people],
            ),
            (
                "INSERT INTO api_keys (id, user_id, public_id, key_hash, created_at) "
                "VALUES (?, ?, ?, ?, ?)",
                [
                    (
                        str(UUID(int=number)),
                        _user(number // _OF_EACH),
                        _public_id(number),
                        MINTED.secret_hash,
                        now,
                    )
                    for number in some
                ],
            ),
        )


def _config(folder: Path, at: Database | None, algorithm: str = "RS256") -> Config:
    (folder / "state" / "run").mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {
        "authentication": {"jwt_algorithm": algorithm, "access_token_expire_minutes": 1440}
    }
    if at is not None and not at.sqlite:
        told["database"] = {name: getattr(at, name) for name in ("host", "port", "name", "user")}
        assert at.password_file is not None
        told["database"]["password_file"] = str(at.password_file.path)
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    return load(folder / "config.yaml", {})


# One question.


async def _cpu(work: Sequence[Callable[[], bytes | Awaitable[bytes]]]) -> float:
    """Microseconds of each."""
    gc.collect()
    gc.freeze()  # as in a service that has started
    begun = time.process_time()
    answers = [each() for each in work]
    answers = [each if isinstance(each, bytes) else await each for each in answers]
    spent = time.process_time() - begun
    for answer in answers:
        assert pb.CheckResponse.FromString(answer).status.code == 0
    return spent / len(work) * 1e6


async def _one_question(algorithm: str, count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        config = _config(Path(name), None, algorithm)
        await upgrade(config.database)
        signing.prepare(config, now=time.time())
        own = signing.KeyFolder(config, clock=system_clock).keys()

        def issued(jti: int) -> str:
            return tokens.issue(
                own,
                user_id=_user(0),
                jti=f"{jti:036}",
                now=time.time(),
                settings=config.authentication,
            )

        async with database(config.database) as db:
            await _fill(db, 10)
            issuers = trusted(config, db, clock=system_clock, on_withdrawn=lambda _: None)
            looking = asyncio.create_task(next(iter(issuers.values())).keys.run())
            find = partial(find_key, db)
            told = {"size": 10_000, "clock": system_clock}
            bearers = Bearers(issuers, skew=30, **told)  # type: ignore[arg-type]
            keyring = Keyring(find, bearers, size=10_000)
            service = Authz(
                keyring,
                no_signatures(),
                no_mappings(),
                gateways=("ollama", "openai"),
                clock=system_clock,
            )

            def asks(token: str) -> Callable[[], bytes | Awaitable[bytes]]:
                return partial(service.check, _question(token).SerializeToString())

            found: dict[str, list[float]] = {}
            for turn in range(rounds):
                fresh = [asks(issued(turn * count + number)) for number in range(count)]
                key, token = asks(_token(0)), asks(issued(-1))
                work = {
                    "key": [key] * count,
                    "token": [token] * count,
                    "new token": fresh,
                }
                for what, calls in work.items():
                    await _cpu(calls[:1])
                    found.setdefault(what, []).append(await _cpu(calls[1:]))
            looking.cancel()
        least = {what: min(all_of_them) for what, all_of_them in found.items()}
        told_as = "  ".join(
            f"{what} {cost:6.1f} (+{cost - least['key']:.1f})" for what, cost in least.items()
        )
        print(f"{algorithm:6}  {told_as}", flush=True)


# Whole processes.


@dataclass(frozen=True, slots=True)
class Size:
    kind: str
    keys: int
    start_ms: float
    start_cpu_ms: float
    idle_mb: float
    busy_mb: float
    cold_ms: tuple[float, float]
    warm_ms: tuple[float, float]


@contextmanager
def _valkey(config: Config) -> Iterator[None]:
    os.chdir(config.state_dir)
    command = children.valkey(config)
    with subprocess.Popen(command.argv, cwd=command.cwd) as process:
        while not (config.run_dir / "valkey.sock").exists():
            time.sleep(0.01)
        try:
            yield
        finally:
            process.terminate()


def _spread(seconds: list[float]) -> tuple[float, float]:
    """The median and the 99th percentile, in milliseconds."""
    return statistics.median(seconds) * 1e3, statistics.quantiles(seconds, n=100)[98] * 1e3


async def _ask(folder: Path, begun: float, pid: int, count: int, calls: int) -> tuple[Any, ...]:
    socket = folder / "state" / "run" / "authz.sock"
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        stub = AuthorizationStub(channel)

        async def timed(token: str) -> float:
            at = time.perf_counter()
            answer = await stub.Check(_question(token), timeout=10, wait_for_ready=True)
            assert answer.status.code == 0, answer
            return time.perf_counter() - at

        await timed(_token(0))
        start = (time.perf_counter() - begun) * 1e3
        cpu = procs.cpu_seconds({pid: "authz"})["authz"] * 1e3
        (idle,) = procs.memory({pid: "authz"})
        some = random.Random(1).sample(range(1, count), min(calls, count - 1))  # noqa: S311
        cold = [await timed(_token(number)) for number in some]
        warm = [await timed(_token(number)) for _ in range(3) for number in some]
        (busy,) = procs.memory({pid: "authz"})
        return start, cpu, idle.rss_mb, busy.rss_mb, _spread(cold), _spread(warm)


def _sized(stack: ExitStack, at: Database | None, count: int, calls: int) -> Size:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    config = _config(folder, at)

    async def prepare() -> None:
        await upgrade(config.database)
        async with database(config.database) as store:
            await _fill(store, count)

    asyncio.run(prepare())
    signing.prepare(config, now=time.time())
    with _valkey(config):
        begun = time.perf_counter()
        command = [sys.executable, "-m", "authz", "--config", str(config.source)]
        with subprocess.Popen(command, cwd=measure.ROOT) as process:
            try:
                while not (config.run_dir / "authz.sock").exists():
                    time.sleep(0.005)
                found = uvloop.run(_ask(folder, begun, process.pid, count, calls))
            finally:
                process.terminate()
    os.chdir(measure.ROOT)
    return Size("SQLite" if config.database.sqlite else "PostgreSQL", count, *found)


def _sizes(count: int, calls: int) -> Iterator[Size]:
    with ExitStack() as stack:
        for keys_there in (100, count):
            yield _sized(stack, None, keys_there, calls)
        server = Postgres()
        stack.callback(server.remove)
        for keys_there in (100, count):
            yield _sized(stack, server.migrated(), keys_there, calls)


def main() -> None:
    text = argparse.RawDescriptionHelpFormatter
    args = argparse.ArgumentParser(
        "python -m bench.identity", description=__doc__, formatter_class=text
    )
    args.add_argument("--keys", type=int, default=100_000, help="in the large databases")
    args.add_argument("--calls", type=int, default=2000, help="of each kind")
    args.add_argument("--rounds", type=int, default=5)
    chosen = args.parse_args()
    print("microseconds of CPU for one question")
    for algorithm in ("RS256", "ES256", "EdDSA"):
        uvloop.run(_one_question(algorithm, chosen.calls, chosen.rounds))
    print("\nauthz as a process; milliseconds (median, 99 %) and MB")
    heads = ("keys", "start", "(CPU)", "idle", "busy")
    print(f"{'':11}" + "".join(f"{head:>8}" for head in heads) + "    first call         later")
    for size in _sizes(chosen.keys, chosen.calls):
        cold, warm = (f"{at[0]:6.2f} {at[1]:6.2f}" for at in (size.cold_ms, size.warm_ms))
        numbers = (size.keys, size.start_ms, size.start_cpu_ms, size.idle_mb, size.busy_mb)
        print(
            f"{size.kind:11}" + "".join(f"{n:8.0f}" for n in numbers) + f" {cold} {warm}",
            flush=True,
        )


if __name__ == "__main__":
    main()
