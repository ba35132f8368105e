"""What a command works with: configuration, database, the time, and a way to tell the services."""

import asyncio
import getpass
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from parallama import desk as manage
from parallama.cli import running
from parallama.cli.show import note
from parallama.errors import ParallamaError, UsageError

# Loaded late: a command that only prints its help needs none of them.
if TYPE_CHECKING:
    from parallama.changes import Change
    from parallama.config import Config

T = TypeVar("T")


@dataclass(kw_only=True)
class Desk(manage.Desk):
    """That of someone at a terminal."""

    config: "Config"


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
        desk = Desk(
            engine=engine,
            now=datetime.now(UTC),
            by=operator(),
            roles=config.known_roles,
            config=config,
        )
        result = await work(desk)
    if desk.changes:
        await _tell(config, desk.changes)
    return result


def operator() -> manage.Actor:
    """Whoever runs this, by the name that the operating system has for them."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # no name and no environment, as in a small container
        name = f"uid {os.getuid()}"
    return manage.Actor(name, "cli")


async def _tell(config: "Config", changes: list["Change"]) -> None:
    if config.redis.embedded and not running.is_up(config.state_dir):
        return  # nobody to tell, and whoever starts later reads the database
    from parallama.changes import publish
    from parallama.resp import RedisError
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
