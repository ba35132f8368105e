"""The change signal: who changed something says so, and every service forgets what it cached."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from parallama.nodes import explain, until_astray
from parallama.resp import Connection, Late, Redis, RedisError, Unreachable

log = logging.getLogger(__name__)

CHANNEL = "parallama:changes"

Kind = Literal["key", "user", "token", "limits", "prices", "mappings", "everything"]

# A change must be known everywhere within a second, so a silent connection may not be trusted for
# longer than this. A ping is answered at once by a server that lives.
_PING_SECONDS = 0.25
_SILENCE_SECONDS = 0.75


@dataclass(frozen=True, slots=True)
class Change:
    """`id` is the key's, the user's, the token's, or for limits the user's; empty: of many."""

    kind: Kind
    id: str = ""


async def publish(redis: Redis, change: Change) -> None:
    """Tell every service. Call it after the change is committed. Raises RedisError."""
    message = f"{change.kind} {change.id}"
    try:
        await redis.publish(CHANNEL, message)
    except Unreachable:  # perhaps of a server that is gone; to hear it twice does no harm
        await redis.publish(CHANNEL, message)


def parse(message: bytes) -> Change:
    """A signal that nobody understands means that anything may have changed."""
    kind, _, named = message.decode(errors="replace").partition(" ")
    for known in get_args(Kind):
        if kind == known:
            return Change(known, named)
    return Change("everything")


async def watch(
    redis: Redis,
    *,
    on_change: Callable[[Change], None],
    on_lost: Callable[[], None],
    on_found: Callable[[], None],
) -> None:
    """
    Follow the signal for ever.

    `on_lost` is called as soon as changes may be missed, `on_found` once they cannot be any more.
    It starts as lost.
    """
    lost = True
    on_lost()
    connection = redis.new_connection()
    while True:
        try:
            await connection.connect()
            await connection.run("SUBSCRIBE", CHANNEL)
            if lost:
                on_found()
                lost = False
                log.info("change signal found")
            async with _lookout(connection) as astray:
                while not astray.done():
                    await _next(connection, on_change)
            raise Unreachable("another server took over")
        except RedisError as error:
            if not lost:
                on_lost()
                lost = True
                log.warning("change signal lost", extra={"cause": explain(error)})
        finally:
            connection.close()
        await asyncio.sleep(_PING_SECONDS)


@asynccontextmanager
async def _lookout(connection: Connection) -> AsyncIterator["asyncio.Task[None]"]:
    """A task that ends when those who publish have gone to another server."""
    task = asyncio.create_task(until_astray(connection), name="lookout")
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _next(connection: Connection, on_change: Callable[[Change], None]) -> None:
    """One message, or a ping that was answered. Raises where the server stays silent."""
    try:
        message = await connection.read(_PING_SECONDS)
    except Late:
        connection.send("PING")
        message = await connection.read(_SILENCE_SECONDS - _PING_SECONDS)
    if isinstance(message, list) and message[0] == b"message":
        on_change(parse(message[2]))
