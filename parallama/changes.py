"""The change signal: who changed something says so, and every service forgets what it cached."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from parallama.nodes import explain, until_astray

log = logging.getLogger(__name__)

CHANNEL = "parallama:changes"

Kind = Literal["key", "user", "token", "limits", "prices", "everything"]

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
    """Tell every service. Call it after the change is committed. Raises RedisError or OSError."""
    message = f"{change.kind} {change.id}"
    try:
        await redis.publish(CHANNEL, message)
    except RedisConnectionError:  # perhaps of a server that is gone; to hear it twice does no harm
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
    while True:
        try:
            async with redis.pubsub() as channel:
                await channel.subscribe(CHANNEL)
                async with _lookout(redis, channel) as astray:
                    while await _next(channel, on_change):
                        if astray.done():
                            raise RedisConnectionError("another server took over")
                        if lost:
                            on_found()
                            lost = False
                            log.info("change signal found")
        except (RedisError, OSError) as error:
            if not lost:
                on_lost()
                lost = True
                log.warning("change signal lost", extra={"cause": explain(error)})
        await asyncio.sleep(_PING_SECONDS)


@asynccontextmanager
async def _lookout(redis: Redis, channel: PubSub) -> AsyncIterator["asyncio.Task[None]"]:
    """A task that ends when those who publish have gone to another server."""
    task = asyncio.create_task(until_astray(redis, channel.connection), name="lookout")
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _next(channel: PubSub, on_change: Callable[[Change], None]) -> bool:
    """One message, or a ping that was answered. Raises where the server stays silent."""
    message = await channel.get_message(timeout=_PING_SECONDS)
    if message is None:
        await channel.ping()
        message = await channel.get_message(timeout=_SILENCE_SECONDS - _PING_SECONDS)
        if message is None:
            raise TimeoutError("no answer to a ping")
    if message["type"] == "message":
        on_change(parse(message["data"]))
    return True
