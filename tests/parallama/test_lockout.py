"""Lock-out on a real Valkey: guesses are counted before they are made, and nobody gets round it."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import uvloop
from redis.asyncio import Redis

from parallama.config import Authentication
from parallama.errors import Unavailable
from parallama.lockout import Locked, Lockout
from tests.valkey import Valkey

ADDRESS = "192.0.2.7"
SETTINGS = {"login_attempts": 3, "login_attempts_per_address": 6}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey(tmp_path_factory.mktemp("v"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def valkey(shared: Valkey) -> Valkey:
    shared.flush()
    return shared


def lockout(redis: Redis, **settings: Any) -> Lockout:
    told = Authentication.model_validate({**SETTINGS, **settings})
    return Lockout(redis, told, timeout=1.0)


def on(valkey: Valkey, work: Callable[[Lockout, Redis], Awaitable[None]], **settings: Any) -> None:
    async def story(redis: Redis) -> None:
        async with aclosing(lockout(redis, **settings)) as lock:
            await work(lock, redis)

    valkey.run(story)


async def guesses(lock: Lockout, count: int, name: str = "anna", address: str = ADDRESS) -> int:
    """How many of so many at once are let through."""
    results = await asyncio.gather(
        *(lock.attempt(name, address) for _ in range(count)), return_exceptions=True
    )
    assert all(isinstance(each, Locked) for each in results if isinstance(each, Exception))
    return sum(not isinstance(each, BaseException) for each in results)


async def waits(redis: Redis) -> dict[str, float]:
    """Milliseconds for which nobody is let through, by kind."""
    found = {}
    async for key in redis.scan_iter("login:*:wait"):
        found[key.decode().split(":")[-2]] = await redis.pttl(key)
    return found


async def let_time_pass(redis: Redis) -> None:
    """Until the waits are over."""
    async for key in redis.scan_iter("login:*:wait"):
        await redis.delete(key)


def test_of_many_guesses_at_once_a_few_are_made(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        assert await guesses(lock, 100) == 3
        with pytest.raises(Locked, match="try again in 1 s") as told:
            await lock.attempt("anna", "198.51.100.1")
        assert told.value.seconds == 1

    on(valkey, work)


def test_two_services_count_together(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        async with aclosing(lockout(redis)) as other:
            assert sum(await asyncio.gather(guesses(lock, 20), guesses(other, 20))) == 3

    on(valkey, work)


def test_each_wait_is_twice_the_last_up_to_the_longest(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        seen = []
        for number in range(12):
            assert await guesses(lock, 1, address=f"192.0.2.{number}") == 1
            found = await waits(redis)
            assert found.keys() <= {"account"}
            seen.append(found.get("account", 0))
            await let_time_pass(redis)
        expected = [0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
        for wait, seconds in zip(seen, expected, strict=True):
            assert seconds * 1000 - 500 < wait <= seconds * 1000 or wait == seconds == 0

    on(valkey, work, lockout_max_seconds=60)


def test_the_longest_wait_is_never_too_long_for_redis(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        await lock.attempt("anna", ADDRESS)
        async for key in redis.scan_iter("login:*:account:n"):
            await redis.set(key, 1 << 50, keepttl=True)
        assert await guesses(lock, 1) == 1
        assert (await waits(redis))["account"] <= 900_000

    on(valkey, work)


def test_an_address_that_tries_many_names_has_to_wait(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        made = [await guesses(lock, 1, name=f"user{number}") for number in range(10)]
        assert made == [1] * 6 + [0] * 4
        assert await guesses(lock, 1, name="user9", address="192.0.2.8") == 1

    on(valkey, work)


def test_who_has_to_wait_because_of_the_address_does_not_shut_out_others(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        for number in range(6):
            await guesses(lock, 1, name=f"user{number}")
        assert await guesses(lock, 50, name="anna") == 0
        assert await guesses(lock, 3, name="anna", address="192.0.2.8") == 3

    on(valkey, work)


def test_who_has_to_wait_because_of_the_name_does_not_shut_out_the_address(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        assert await guesses(lock, 50, name="anna") == 3
        assert await guesses(lock, 3, name="bert") == 3
        assert await guesses(lock, 3, name="carl") == 0

    on(valkey, work)


def test_success_makes_the_account_begin_anew_but_not_the_address(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        for _ in range(5):  # an attacker with an account of their own, between two guesses
            assert await guesses(lock, 1, name="victim") == 1
            await lock.succeeded(await lock.attempt("mallory", ADDRESS))
            await let_time_pass(redis)
        assert await guesses(lock, 1, name="victim") == 1
        assert (await waits(redis))["address"] > 0
        assert await guesses(lock, 10, name="mallory", address="192.0.2.8") == 3

    on(valkey, work)


def test_who_is_unlocked_begins_anew_and_nobody_else(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        assert await guesses(lock, 9, address="198.51.100.1") == 3
        assert await guesses(lock, 9, name="ben", address="198.51.100.2") == 3
        await lock.unlock("anna")
        assert await guesses(lock, 9, address="198.51.100.3") == 3
        assert await guesses(lock, 9, name="ben", address="198.51.100.4") == 0
        await lock.unlock("nobody")

    on(valkey, work)


def test_any_number_of_good_logins_from_one_address_is_let_through(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        for number in range(30):
            await lock.succeeded(await lock.attempt(f"user{number}", ADDRESS))
        assert await redis.keys("login:*") == []

    on(valkey, work)


def test_an_attempt_that_nobody_made_counts_for_nothing(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        for _ in range(30):
            await lock.void(await lock.attempt("anna", ADDRESS))
        assert await redis.keys("login:*") == []

    on(valkey, work)


def test_counts_end(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        await guesses(lock, 10)
        ends = {key.decode().split(":", 2)[2]: await redis.ttl(key) for key in await redis.keys()}
        assert ends["account:n"] > 86_000
        assert 3_500 < ends["address:n"] <= 3_600
        assert -1 not in ends.values()
        async for key in redis.scan_iter("login:*"):
            await redis.delete(key)
        assert await guesses(lock, 10) == 3

    on(valkey, work)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.7", "192.0.2.7", True),
        ("192.0.2.7", "192.0.2.8", False),
        ("somewhere", "somewhere", True),
    ],
)
def test_what_one_client_can_choose_is_one_address(
    one: str, other: str, same: bool, valkey: Valkey
) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        for number in range(6):
            await guesses(lock, 1, name=f"user{number}", address=one)
        assert await guesses(lock, 1, name="anna", address=other) == (0 if same else 1)

    on(valkey, work)


@pytest.mark.parametrize(
    "name", ["", "a b", "x" * 100_000, "anna}\r\nFLUSHALL\r\n", "{}", "\ud800", "\x00", "ann*"]
)
def test_any_name_is_counted_and_no_name_breaks_out(name: str, valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        await redis.set("mine", 1)
        assert await guesses(lock, 10, name=name) == 3
        assert await guesses(lock, 1, name="anna") == 1
        assert await redis.get("mine") == b"1"
        assert all(len(key) < 100 for key in await redis.keys())

    on(valkey, work)


def test_two_spellings_of_one_name_are_one(valkey: Valkey) -> None:
    async def work(lock: Lockout, redis: Redis) -> None:
        assert await guesses(lock, 2, name="zo\u00eb") == 2
        assert await guesses(lock, 2, name="zoe\u0308") == 1

    on(valkey, work)


def test_without_redis_nobody_is_let_through(tmp_path: Path) -> None:
    server = Valkey(tmp_path)

    async def work() -> None:
        async with server.client() as redis, aclosing(lockout(redis)) as lock:
            with pytest.raises(Unavailable):
                await lock.attempt("anna", ADDRESS)

    uvloop.run(work())
