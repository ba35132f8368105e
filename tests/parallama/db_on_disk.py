"""A migrated database, and things to put into it: valid by default, override one field."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncEngine

from parallama import keys
from parallama.config import Database
from parallama.db import Store, database
from parallama.db.manage.schema import managed, upgrade
from parallama.desk import Actor, Desk
from parallama.usage import UsageRecord

T = TypeVar("T")
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

_new: list[bytes] = []


def settings(folder: Path, **fields: Any) -> Database:
    return Database.model_validate({"path": str(folder / "parallama.db"), **fields})


async def migrate(at: Database) -> None:
    """
    What `upgrade` does. The file of a new SQLite database is a copy of one that it made: it is
    there a hundred times as quickly.
    """
    if not at.sqlite or at.path.exists():
        await upgrade(at)
        return
    if not _new:
        with TemporaryDirectory() as folder:
            made = settings(Path(folder))
            await upgrade(made)
            _new.append(made.path.read_bytes())
    at.path.touch(0o600)
    at.path.write_bytes(_new[0])


@dataclass(frozen=True)
class Opened:
    """One database, as the services see it and as people's commands do."""

    store: Store
    engine: AsyncEngine

    def desk(self, now: datetime = NOW) -> Desk:
        return a_desk(self.engine, now)


def a_desk(engine: AsyncEngine, now: datetime = NOW, *, by: str = "tester") -> Desk:
    return Desk(engine=engine, now=now, by=Actor(by, "cli"))


def on(place: Path | Database, work: Callable[[Opened], Awaitable[T]]) -> T:
    """Run `work` on a database, or on the SQLite file in a folder, migrated first."""

    async def both() -> T:
        at = settings(place) if isinstance(place, Path) else place
        await migrate(at)
        async with database(at) as store, managed(at) as engine:
            return await work(Opened(store, engine))

    return asyncio.run(both())


def a_minted(seed: int = 1) -> keys.Minted:
    return keys.mint(lambda count: bytes([seed]) * count, rounds=4)


_RECORD = UsageRecord(
    request_id="r1",
    timestamp=NOW,
    user_id="7c1f2c1e-0000-4000-8000-000000000001",
    username="anna",
    key_id=None,
    gateway="ollama",
    dialect="ollama",
    endpoint="/api/chat",
    model_name="llama3",
    served_model="llama3",
    prompt_tokens=10,
    completion_tokens=20,
    cached_tokens=None,
    tokens_used=30,
    token_source="reported",
    streamed=True,
    finished=True,
    aborted=False,
    status_code=200,
    flags="",
    error_message=None,
    request_duration=1.5,
    time_to_first_token=0.25,
    compute_ms=900.0,
    upstream_host="127.0.0.1:11434",
    cost=None,
)


def a_record(request_id: str = "r1", **fields: Any) -> UsageRecord:
    return replace(_RECORD, request_id=request_id, **fields)
