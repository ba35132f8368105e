"""The admin API in this process, on a real database and a real Valkey, and people who call it."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx

from parallama import identity, keys, roles, signing
from parallama.admin import once
from parallama.admin.app import service
from parallama.admin.visit import Office
from parallama.changes import CHANNEL
from parallama.config import Config, Database
from parallama.counters import Counters
from parallama.db import database
from parallama.db.accounts import find_account
from parallama.db.manage import credentials, people
from parallama.db.manage.credentials import ApiKey
from parallama.db.manage.people import User
from parallama.db.manage.schema import managed
from parallama.db.manage.sessions import Sessions
from parallama.desk import Desk
from parallama.lockout import Lockout
from parallama.passwords import Checker
from parallama.pipeline import Pipeline
from tests.parallama.db_on_disk import a_desk, migrate
from tests.valkey import Valkey

T = TypeVar("T")
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
Json = dict[str, Any]


@dataclass
class House:
    """`now` is what its clock says."""

    office: Office
    app: Any
    config: Config
    now: datetime = NOW
    _count: int = field(default=0)

    def desk(self) -> Desk:
        return a_desk(self.office.engine, self.now)

    async def user(self, *, role: str = "user", name: str | None = None, **more: Any) -> User:
        self._count += 1
        return await people.create_user(self.desk(), name or f"u{self._count}", role, **more)

    async def key(self, user: User, **bounds: Any) -> ApiKey:
        return await credentials.create_key(
            self.desk(), user.id, keys.mint(os.urandom, rounds=4), **bounds
        )

    async def someone(self, *permits: str, role: str | None = None, **key: Any) -> "Caller":
        """
        Somebody with a key of their own, who may do this; by default all that the role permits.
        """
        user = await self.user(role=role or "user")
        made = await self.key(user, **key)
        return await self.caller(user, made, *permits)

    async def caller(self, user: User, key: ApiKey | None, *permits: str) -> "Caller":
        account = await find_account(self.office.store, user.id)
        assert account is not None
        granted = roles.permissions(permits) if permits else account.permissions
        kind, id = ("token", "j") if key is None else ("key", key.id)
        told = identity.headers(
            user=user.id, username=user.username, permissions=granted, kind=kind, id=id
        )
        return Caller(self, user, key, {**told, identity.ADDRESS: "192.0.2.7"})

    async def admin(self) -> "Caller":
        return await self.someone(role="admin")

    async def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """By nobody."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, **more)

    @asynccontextmanager
    async def hearing(self) -> AsyncIterator[list[str]]:
        """What the services are told until the end of the block."""
        heard: list[str] = []
        async with self.office.redis.pubsub() as channel:
            await channel.subscribe(CHANNEL)
            await channel.get_message(timeout=5)
            yield heard
            await self.office.redis.publish(CHANNEL, "end")
            while (message := await channel.get_message(timeout=5)) is not None:
                if message["data"] == b"end":
                    break
                heard.append(message["data"].decode())


@dataclass(frozen=True)
class Caller:
    house: House
    user: User
    key: ApiKey | None
    headers: dict[str, str]

    async def ask(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        given = {**self.headers, "x-request-id": "r1", **(headers or {})}
        return await self.house.ask(method, path, headers=given, **more)

    async def get(self, path: str, **more: Any) -> httpx.Response:
        return await self.ask("GET", path, **more)

    async def post(self, path: str, body: Json | None = None, **more: Any) -> httpx.Response:
        if body is not None:
            more["content"] = json.dumps(body)
            more["headers"] = {"content-type": "application/json", **more.get("headers", {})}
        return await self.ask("POST", path, **more)

    async def every(self, path: str, **query: Any) -> list[Json]:
        """All items, page by page."""
        items: list[Json] = []
        cursor: str | None = None
        while True:
            asked = {**query, **({"cursor": cursor} if cursor else {})}
            page = (await self.get(path, params=asked)).json()
            items += page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return items


def configuration(folder: Path, at: Database) -> Config:
    return Config.model_validate(
        {"state_dir": str(folder), "database": at, "authentication": {"password_hash_rounds": 10}},
        folder,
    )


@asynccontextmanager
async def opened(folder: Path, at: Database, valkey: Valkey) -> AsyncIterator[House]:
    config = configuration(folder, at)
    told = config.authentication
    signing.prepare(config, now=NOW.timestamp())
    await migrate(at)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(valkey.client())

        async def lasting(thing: Any) -> Any:
            return await stack.enter_async_context(aclosing(thing))

        def now() -> datetime:
            return house.now

        keyring = signing.KeyFolder(config, clock=lambda: house.now.timestamp())
        office = Office(
            config=config,
            engine=await stack.enter_async_context(managed(at)),
            store=await stack.enter_async_context(database(at)),
            redis=redis,
            counters=await lasting(Counters(redis, lease=900, timeout=5)),
            sessions=Sessions(
                told,
                signing=keyring,
                lockout=await lasting(Lockout(redis, told, timeout=5)),
                checker=stack.enter_context(closing(Checker(threads=1))),
                random_bytes=os.urandom,
            ),
            signing=keyring,
            now=now,
            random_bytes=os.urandom,
        )
        kept = await lasting(Pipeline(redis, *once.SCRIPTS, timeout=5))
        house = House(office, service(office, kept), config)
        yield house


def fields(answer: httpx.Response) -> set[str]:
    """Those that a refusal names."""
    return {each["field"] for each in answer.json()["errors"]}


def later(**more: int) -> str:
    return (NOW + timedelta(**more)).isoformat()


Work = Callable[[House], Awaitable[T]]
Run = Callable[[Work[T]], T]


def run(folder: Path, at: Database, valkey: Valkey, work: Work[T]) -> T:
    async def all_of_it() -> T:
        async with opened(folder, at, valkey) as house:
            return await work(house)

    return asyncio.run(all_of_it())


def names(items: Iterable[Json], field: str) -> list[Any]:
    return [each[field] for each in items]
