"""The whole process: a change made by a command counts within a second."""

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from envoy.service.auth.v3.external_auth_pb2_grpc import AuthorizationStub

from parallama.config import Config, load
from parallama.db.manage import credentials, people
from parallama.db.manage.schema import managed
from parallama.roles import Role
from parallama.supervisor.folder import claim
from tests.authz.make import MINTED, a_check
from tests.parallama.db_on_disk import a_desk, migrate
from tests.valkey import Valkey

ROOT = Path(__file__).parents[2]
BOUND = 1.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """With anna and her key in the database. Short: sockets are in it."""
    with tempfile.TemporaryDirectory() as name:
        at = Path(name)
        (at / "state" / "run").mkdir(parents=True)
        (at / "config.yaml").write_text("{}\n", encoding="utf-8")

        async def fill() -> None:
            database = a_config(at).database
            await migrate(database)
            async with managed(database) as engine:
                await people.create_user(a_desk(engine), "anna", Role.USER)
                await credentials.create_key(a_desk(engine), "anna", MINTED, name="laptop")

        asyncio.run(fill())
        with claim(at / "state", wait_seconds=0):  # commands tell nobody where nobody runs
            yield at


@pytest.fixture
def valkey(folder: Path) -> Iterator[Valkey]:
    server = Valkey(folder / "state" / "run")
    server.socket = str(folder / "state" / "run" / "valkey.sock")
    server.start()
    yield server
    server.stop()


def a_config(folder: Path) -> Config:
    return load(folder / "config.yaml", {})


class Asking:
    """Asks as Envoy does."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = AuthorizationStub(channel)

    async def status(self) -> int:
        answer = await self._stub.Check(a_check(), timeout=10, wait_for_ready=True)
        return 200 if answer.status.code == 0 else int(answer.denied_response.status.code)

    async def seconds_until(self, status: int) -> float:
        begun = time.monotonic()
        while await self.status() != status:
            assert time.monotonic() - begun < 10
        return time.monotonic() - begun


@asynccontextmanager
async def authz(folder: Path) -> AsyncIterator[Asking]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "authz", "--config", str(folder / "config.yaml")),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with (
            asyncio.timeout(60),
            grpc.aio.insecure_channel(f"unix:{folder}/state/run/authz.sock") as channel,
        ):
            yield Asking(channel)
            process.terminate()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def told(folder: Path, story: Callable[[Asking], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with authz(folder) as asking:
            assert await asking.status() == 200
            await story(asking)

    asyncio.run(inside())


async def command(folder: Path, *arguments: str) -> None:
    """One of the operator's commands, in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "parallama", "--config", str(folder / "config.yaml"), *arguments),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert await process.wait() == 0


def test_a_revoked_key_is_refused_within_a_second(folder: Path, valkey: Valkey) -> None:
    async def story(asking: Asking) -> None:
        await command(folder, "keys", "revoke", "laptop")
        assert await asking.seconds_until(401) < BOUND

    told(folder, story)


def test_a_disabled_user_is_refused_within_a_second_and_let_in_again(
    folder: Path, valkey: Valkey
) -> None:
    async def story(asking: Asking) -> None:
        await command(folder, "users", "disable", "anna")
        assert await asking.seconds_until(403) < BOUND
        await command(folder, "users", "enable", "anna")
        assert await asking.seconds_until(200) < BOUND

    told(folder, story)


def test_without_the_signal_a_revoked_key_is_refused_as_well(folder: Path, valkey: Valkey) -> None:
    """Nothing is remembered then, so keys cost more and stay true."""

    async def story(asking: Asking) -> None:
        valkey.stop()

        async def revoke() -> None:
            async with managed(a_config(folder).database) as engine:
                await credentials.revoke_key(a_desk(engine), "laptop")

        await revoke()
        assert await asking.seconds_until(401) < BOUND

    told(folder, story)


def test_it_serves_before_there_is_any_valkey(folder: Path) -> None:
    async def story(asking: Asking) -> None:
        assert await asking.status() == 200

    told(folder, story)
