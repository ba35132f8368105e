"""Real databases that go: keys that were checked go on to work for as long as is stated."""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
from envoy.service.auth.v3 import external_auth_pb2 as pb
from envoy.service.auth.v3.external_auth_pb2_grpc import AuthorizationStub

from authz.keyring import Keyring
from authz.mapped import Mapped
from authz.service import Authz
from parallama.changes import Change
from parallama.config import Database
from parallama.db.accounts import find_key
from parallama.db.manage import credentials, people
from parallama.db.manage.schema import managed
from parallama.db.mappings import mappings_of
from parallama.health import serves
from parallama.presence import Presence, opened
from parallama.roles import Role
from tests.authz.make import MINTED, NOW, TOKEN, a_check, no_signatures, no_tokens
from tests.parallama.db_on_disk import NOW as MADE
from tests.parallama.db_on_disk import a_desk, a_minted
from tests.postgres import Postgres

ROOT = Path(__file__).parents[2]
HOUR = 3600.0
BENS = a_minted(8).token


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """Of its own: it is stopped."""
    running = Postgres()
    yield running
    running.remove()


@pytest.fixture
def at(server: Postgres) -> Iterator[Database]:
    """Anna with the key TOKEN, ben with another."""
    database = server.migrated()

    async def fill() -> None:
        async with managed(database) as engine:
            for name, minted in (("anna", MINTED), ("ben", a_minted(8))):
                await people.create_user(a_desk(engine, MADE), name, Role.USER)
                await credentials.create_key(a_desk(engine, MADE), name, minted, name=name)

    asyncio.run(fill())
    yield database
    if server._process is None:
        server.start()


class Scene:
    """The service on a real database, and a clock."""

    def __init__(self, keyring: Keyring, mapped: Mapped, presence: Presence) -> None:
        self.keyring = keyring
        self.presence = presence
        self.now = 0.0
        self._service = Authz(
            keyring, no_signatures(), mapped, gateways=("openai",), clock=lambda: NOW
        )

    async def later(self, seconds: float) -> None:
        self.now += seconds
        await self.presence.look()

    async def status(self, token: str = TOKEN) -> int:
        check = a_check(headers={"authorization": f"Bearer {token}"})
        answer = self._service.check(check.SerializeToString())
        found = pb.CheckResponse.FromString(answer if isinstance(answer, bytes) else await answer)
        if found.status.code == 0:
            return 200
        if found.denied_response.status.code == 503:
            error = json.loads(found.denied_response.body)["error"]
            assert (error["code"], error["type"]) == ("service_unavailable", "server_error")
        return int(found.denied_response.status.code)


def told(at: Database, story: Callable[[Scene], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with opened(at) as db:
            keyring = Keyring(partial(find_key, db), no_tokens(), size=100)
            scene: Scene
            presence = Presence(
                db, monotonic=lambda: scene.now, patience=HOUR, too_long=keyring.forget_all
            )
            scene = Scene(keyring, Mapped(partial(mappings_of, db)), presence)
            await presence.begin(wait=False)
            await story(scene)

    asyncio.run(inside())


def test_known_keys_work_for_the_stated_time_and_unknown_ones_are_503(
    server: Postgres, at: Database
) -> None:
    async def story(scene: Scene) -> None:
        assert await scene.status() == 200
        await scene.later(10 * HOUR)  # it is there all the time
        server.stop()
        await scene.later(1)
        assert (await scene.status(), await scene.status(BENS)) == (200, 503)
        await scene.later(HOUR - 1)
        assert await scene.status() == 200
        assert scene.presence.lately()
        await scene.later(1)
        assert (await scene.status(), await scene.status(BENS)) == (503, 503)
        assert not scene.presence.lately()
        server.start()
        assert (await scene.status(), await scene.status(BENS)) == (200, 200)
        await scene.later(1)
        assert scene.presence.lately()

    told(at, story)


def test_an_outage_that_ends_in_time_costs_nobody_a_call(server: Postgres, at: Database) -> None:
    async def story(scene: Scene) -> None:
        assert await scene.status() == 200
        for _ in range(3):
            server.stop()
            await scene.later(HOUR - 1)
            assert await scene.status() == 200
            server.start()
            await scene.later(1)  # from here on the hour is counted anew
            assert await scene.status() == 200

    told(at, story)


def test_a_change_that_is_heard_of_counts_also_while_the_database_is_away(
    server: Postgres, at: Database
) -> None:
    """What it changed to cannot be asked: so the key does not work until it can."""

    async def story(scene: Scene) -> None:
        assert await scene.status() == 200
        assert await scene.status(BENS) == 200
        known = scene.keyring.at_once(TOKEN)
        assert known is not None
        server.stop()
        await scene.later(1)
        scene.keyring.on_change(Change("key", known.id))
        assert (await scene.status(), await scene.status(BENS)) == (503, 200)

    told(at, story)


def test_without_the_change_signal_nobody_is_let_in_unseen(server: Postgres, at: Database) -> None:
    """With Redis away as well, a key that was revoked would not be heard of."""

    async def story(scene: Scene) -> None:
        assert await scene.status() == 200
        server.stop()
        scene.keyring.pause()
        assert await scene.status() == 503
        server.start()
        assert await scene.status() == 200

    told(at, story)


def test_the_process_begun_without_its_database_refuses_until_it_comes(
    server: Postgres, at: Database
) -> None:
    assert at.password_file is not None

    async def story(folder: Path) -> None:
        socket = f"{folder}/state/run/authz.sock"
        command = [sys.executable, "-m", "authz", "--config", str(folder / "config.yaml")]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=subprocess.PIPE)
        try:
            async with (
                asyncio.timeout(30),
                grpc.aio.insecure_channel(f"unix:{socket}") as channel,
            ):
                ask = partial(AuthorizationStub(channel).Check, a_check(), wait_for_ready=True)
                assert (await ask()).denied_response.status.code == 503
                assert not await asyncio.to_thread(serves, socket)
                server.start()
                assert (await ask()).status.code == 0
                while not await asyncio.to_thread(serves, socket):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                process.terminate()
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    server.stop()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "state" / "run").mkdir(parents=True)
        (folder / "config.yaml").write_text(
            f"database: {{host: {at.host}, port: {at.port}, name: {at.name}, user: {at.user},"
            f" password_file: {at.password_file.path}}}\n",
            encoding="utf-8",
        )
        asyncio.run(story(folder))
