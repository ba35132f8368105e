"""What a command works with: configuration, database, the time, and a way to tell the services."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from parallama.cli import running
from parallama.cli.show import note
from parallama.errors import ParallamaError, UsageError

# Loaded late: a command that only prints its help needs none of them.
if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from parallama.changes import Change, Kind
    from parallama.config import Config

T = TypeVar("T")


@dataclass
class Desk:
    """`changed` remembers what the services have to hear about once it is stored."""

    config: "Config"
    engine: "AsyncEngine"
    now: datetime
    changes: list["Change"] = field(default_factory=list)

    def changed(self, kind: "Kind", id: str = "") -> None:
        from parallama.changes import Change

        self.changes.append(Change(kind, id))


def load_config(path: Path | None) -> "Config":
    from parallama import config

    if path is None:
        raise UsageError("name the configuration with --config PATH or in PARALLAMA_CONFIG")
    return config.load(path, os.environ)


def run(path: Path | None, work: Callable[[Desk], Awaitable[T]]) -> T:
    """Do `work` at the database, then tell the services what changed."""
    return asyncio.run(_run(load_config(path), work))


async def _run(config: "Config", work: Callable[[Desk], Awaitable[T]]) -> T:
    from parallama.db.manage.schema import managed

    async with managed(config.database) as engine:
        desk = Desk(config, engine, datetime.now(UTC))
        result = await work(desk)
    if desk.changes:
        await _tell(config, desk.changes)
    return result


async def _tell(config: "Config", changes: list["Change"]) -> None:
    if config.redis.embedded and not running.is_up(config.state_dir):
        return  # nobody to tell, and whoever starts later reads the database
    from redis.exceptions import RedisError

    from parallama.changes import publish
    from parallama.stores import connect_redis

    try:
        async with connect_redis(config) as redis:
            for change in changes:
                await publish(redis, change)
    except (RedisError, OSError, ParallamaError) as error:
        note(
            "warning: stored, but the services that run could not be told "
            f"({error or type(error).__name__}): they may act on it late"
        )
