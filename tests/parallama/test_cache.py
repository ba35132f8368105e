"""A memory that is bounded, and that never outlives a change."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from parallama.cache import Cache


def says(value: str | None) -> Callable[[], Awaitable[str | None]]:
    async def load() -> str | None:
        return value

    return load


async def never() -> str | None:
    raise AssertionError("loaded although it was known")


def test_a_value_is_loaded_once() -> None:
    async def story() -> None:
        cache: Cache[str, str] = Cache(size=2)
        assert cache.peek("a") is None
        assert await cache.get("a", says("1")) == "1"
        assert await cache.get("a", never) == "1"
        assert cache.peek("a") == "1"

    asyncio.run(story())


def test_nothing_is_not_remembered() -> None:
    async def story() -> None:
        cache: Cache[str, str] = Cache(size=2)
        assert await cache.get("a", says(None)) is None
        assert await cache.get("a", says("1")) == "1"

    asyncio.run(story())


@pytest.mark.parametrize("used", ["get", "peek"])
def test_what_was_used_longest_ago_goes_first(used: str) -> None:
    async def story() -> None:
        cache: Cache[str, str] = Cache(size=2)
        await cache.get("a", says("1"))
        await cache.get("b", says("2"))
        if used == "get":
            await cache.get("a", never)
        else:
            cache.peek("a")
        await cache.get("c", says("3"))
        assert len(cache) == 2
        assert (cache.peek("a"), cache.peek("b"), cache.peek("c")) == ("1", None, "3")

    asyncio.run(story())


def test_forgetting_is_by_key_and_value() -> None:
    async def story() -> None:
        cache: Cache[str, str] = Cache(size=9)
        for key in "abc":
            await cache.get(key, says(key.upper()))
        cache.forget(lambda key, value: key == "a" or value == "C")
        assert [cache.peek(key) for key in "abc"] == [None, "B", None]
        cache.forget_one("nobody")
        assert cache.peek("b") == "B"
        cache.forget_one("b")
        assert cache.peek("b") is None
        await cache.get("d", says("D"))
        cache.forget_all()
        assert len(cache) == 0

    asyncio.run(story())


Change = Callable[["Cache[str, str]"], None]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda cache: cache.forget(lambda key, _: key == "other"), id="forget"),
        pytest.param(lambda cache: cache.forget_one("other"), id="forget one"),
        pytest.param(lambda cache: cache.forget_all(), id="forget all"),
        pytest.param(lambda cache: cache.pause(), id="pause"),
        pytest.param(lambda cache: cache.resume(), id="resume"),
    ],
)
def test_what_was_being_loaded_during_a_change_is_used_once(change: Change) -> None:
    async def story() -> None:
        cache: Cache[str, str] = Cache(size=9)
        asked, answer = asyncio.Event(), asyncio.Event()

        async def slow() -> str:
            asked.set()
            await answer.wait()
            return "old"

        loading = asyncio.create_task(cache.get("a", slow))
        await asked.wait()
        change(cache)
        answer.set()
        assert await loading == "old"
        assert cache.peek("a") is None

    asyncio.run(story())


def test_while_paused_every_value_is_loaded_anew() -> None:
    async def story() -> None:
        cache: Cache[str, str] = Cache(size=9)
        await cache.get("a", says("1"))
        cache.pause()
        assert cache.peek("a") is None
        assert await cache.get("a", says("2")) == "2"
        assert await cache.get("a", says("3")) == "3"
        cache.resume()
        assert await cache.get("a", says("4")) == "4"
        assert await cache.get("a", never) == "4"

    asyncio.run(story())


def test_a_load_that_fails_is_not_remembered() -> None:
    async def story() -> None:
        cache: Cache[str, str] = Cache(size=9)

        async def fails() -> str:
            raise OSError("away")

        with pytest.raises(OSError, match="away"):
            await cache.get("a", fails)
        assert await cache.get("a", says("1")) == "1"

    asyncio.run(story())


def test_who_asks_at_once_shares_a_load() -> None:
    async def story() -> None:
        cache: Cache[str, str] = Cache(size=2)
        gate = asyncio.Event()
        loads = []

        async def slow() -> str:
            loads.append(1)
            await gate.wait()
            return "1"

        asking = [asyncio.create_task(cache.get("a", slow)) for _ in range(50)]
        await asyncio.sleep(0)
        asking[0].cancel()
        await asyncio.sleep(0)
        gate.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert answers[1:] == ["1"] * 49
        assert loads == [1]

    asyncio.run(story())


def test_who_asks_after_a_change_does_not_share_a_load_from_before() -> None:
    async def story() -> None:
        cache: Cache[str, str] = Cache(size=2)
        gate = asyncio.Event()

        async def old() -> str:
            await gate.wait()
            return "old"

        before = asyncio.create_task(cache.get("a", old))
        await asyncio.sleep(0)
        cache.forget_all()
        assert await cache.get("a", says("new")) == "new"
        gate.set()
        assert await before == "old"
        assert cache.peek("a") == "new"

    asyncio.run(story())


def test_a_load_that_fails_fails_for_all_and_is_tried_again() -> None:
    async def story() -> None:
        cache: Cache[str, str] = Cache(size=2)

        async def fails() -> str:
            await asyncio.sleep(0)
            raise OSError("away")

        asking = [asyncio.create_task(cache.get("a", fails)) for _ in range(3)]
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(answer) for answer in answers] == [OSError] * 3
        assert await cache.get("a", says("1")) == "1"

    asyncio.run(story())
