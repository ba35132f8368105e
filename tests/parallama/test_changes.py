"""The change signal on a real Valkey: it arrives, and its absence is noticed within a second."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis

from parallama import changes
from parallama.changes import Change, parse, publish
from tests.valkey import Valkey

# What a service may at most go on believing: see parallama/changes.py.
BOUND = 1.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path)
    server.start()
    yield server
    server.stop()


class Watching:
    """What a service is told, in order, and when."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Change | str] = asyncio.Queue()

    async def next(self) -> Change | str:
        async with asyncio.timeout(10):
            return await self.told.get()


@asynccontextmanager
async def watching(redis: Redis) -> AsyncIterator[Watching]:
    at = Watching()
    task = asyncio.create_task(
        changes.watch(
            redis,
            on_change=at.told.put_nowait,
            on_lost=lambda: at.told.put_nowait("lost"),
            on_found=lambda: at.told.put_nowait("found"),
        )
    )
    try:
        yield at
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def with_signal(server: Valkey, story: Callable[[Redis, Watching], Awaitable[None]]) -> None:
    """Run `story` where the signal has been found."""

    async def told(redis: Redis) -> None:
        async with watching(redis) as at:
            assert await at.next() == "lost"
            assert await at.next() == "found"
            await story(redis, at)
            assert at.told.empty()

    server.run(told)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (b"key k1", Change("key", "k1")),
        (b"user u1", Change("user", "u1")),
        (b"limits u1", Change("limits", "u1")),
        (b"limits ", Change("limits", "")),
        (b"limits", Change("limits", "")),
        (b"everything ", Change("everything", "")),
        (b"", Change("everything")),
        (b"mapping m1", Change("everything")),
        (b"KEY k1", Change("everything")),
        (b"\xff\xfe", Change("everything")),
        (b"key" + b"x" * 1_000_000, Change("everything")),
    ],
)
def test_what_nobody_understands_means_everything(message: bytes, change: Change) -> None:
    assert parse(message) == change


def test_changes_arrive_in_order(server: Valkey) -> None:
    sent = [Change("key", "k1"), Change("user", "u1"), Change("limits"), Change("everything")]

    async def story(redis: Redis, at: Watching) -> None:
        for change in sent:
            await publish(redis, change)
        assert [await at.next() for _ in sent] == sent

    with_signal(server, story)


def test_a_message_from_a_later_version_means_everything(server: Valkey) -> None:
    async def story(redis: Redis, at: Watching) -> None:
        await redis.publish(changes.CHANNEL, b"\xffnews\x00")
        assert await at.next() == Change("everything")

    with_signal(server, story)


def test_many_changes_at_once_all_arrive(server: Valkey) -> None:
    async def story(redis: Redis, at: Watching) -> None:
        await asyncio.gather(*(publish(redis, Change("key", str(n))) for n in range(90)))
        assert {await at.next() for _ in range(90)} == {Change("key", str(n)) for n in range(90)}

    with_signal(server, story)


def test_without_a_server_it_is_lost_from_the_start_and_found_later(tmp_path: Path) -> None:
    server = Valkey(tmp_path)

    async def told(redis: Redis) -> None:
        async with watching(redis) as at:
            assert await at.next() == "lost"
            server.start()
            assert await at.next() == "found"

    try:
        server.run(told)
    finally:
        server.stop()


def test_a_killed_server_is_noticed_at_once_and_found_again(server: Valkey) -> None:
    async def story(redis: Redis, at: Watching) -> None:
        begun = time.monotonic()
        server.stop()
        assert await at.next() == "lost"
        assert time.monotonic() - begun < BOUND
        server.start()
        assert await at.next() == "found"
        await publish(redis, Change("key", "k1"))
        assert await at.next() == Change("key", "k1")

    with_signal(server, story)


def test_a_silent_server_is_noticed_within_a_second_and_trusted_again_when_it_speaks(
    server: Valkey,
) -> None:
    async def story(redis: Redis, at: Watching) -> None:
        begun = time.monotonic()
        server.pause(signal.SIGSTOP)
        try:
            assert await at.next() == "lost"
            assert time.monotonic() - begun < BOUND
        finally:
            server.pause(signal.SIGCONT)
        assert await at.next() == "found"

    with_signal(server, story)


def test_a_connection_that_was_cut_counts_as_lost(server: Valkey) -> None:
    """The server lives, and what it said in between nobody heard."""

    async def story(redis: Redis, at: Watching) -> None:
        await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        assert await at.next() == "lost"
        assert await at.next() == "found"

    with_signal(server, story)


def test_lost_is_said_once_however_long_it_lasts(server: Valkey) -> None:
    async def story(redis: Redis, at: Watching) -> None:
        server.stop()
        assert await at.next() == "lost"
        # Long enough for several attempts: what is told next must be that it was found.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(at.told.get(), 0.8)
        server.start()
        assert await at.next() == "found"

    with_signal(server, story)
