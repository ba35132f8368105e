"""A master that sentinels watch: it dies, it is replaced, and everybody finds the new one."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import uvloop

from parallama.changes import Change, publish
from parallama.config import Config
from parallama.errors import Unavailable
from parallama.pipeline import Pipeline
from parallama.resp import RedisError
from parallama.stores import connect_redis
from tests.parallama.servers import COUNT, Load, Odd, Watched, a_config, free_port
from tests.parallama.test_changes import BOUND, watching

TIMEOUT = 1.0


def config_of(servers: Watched, folder: Path, more: str = "") -> Config:
    name = f"sentinel_master: {servers.NAME}"
    return a_config(folder, f"mode: sentinel, nodes: {servers.nodes}, {name}{more}")


def test_a_master_that_is_killed_under_load(tmp_path: Path) -> None:
    async def told(servers: Watched) -> None:
        config = config_of(servers, tmp_path)
        async with (
            connect_redis(config) as redis,
            connect_redis(config) as signals,
            aclosing(Pipeline(redis, COUNT, timeout=TIMEOUT)) as pipeline,
            watching(signals) as at,
        ):
            assert [await at.next(), await at.next()] == ["lost", "found"]
            async with Load(pipeline, [f"{{u{n}}}" for n in range(8)]) as load:
                assert load.failed == []
                servers.master.kill()
                assert await at.next() == "lost"
                await load.until(lambda: load.failed)
                before = load.answered()
                await load.until(lambda: load.answered() > before + 100)
                assert load.longest < TIMEOUT + 0.5
                assert await at.next() == "found"
                await publish(redis, Change("key", "k1"))
                assert await at.next() == Change("key", "k1")
            assert servers.other.do.info("replication")["role"] == "master"
            assert int(servers.other.do.get("{u0}") or 0) == load.counts["{u0}"][-1]

    with Watched(tmp_path / "v", replicated=True) as servers:
        uvloop.run(told(servers))


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Watched]:
    """Two masters and one sentinel, which may name either."""
    with Watched(tmp_path / "v", replicated=False) as servers:
        yield servers


def test_a_master_that_lives_on_after_another_took_over(two: Watched, tmp_path: Path) -> None:
    """It would go on counting what nobody else sees, and stay silent when keys are revoked."""

    async def told() -> None:
        config = config_of(two, tmp_path)
        async with (
            connect_redis(config) as redis,
            connect_redis(config) as signals,
            aclosing(Pipeline(redis, COUNT, timeout=TIMEOUT)) as pipeline,
            watching(signals) as at,
        ):
            assert [await at.next(), await at.next()] == ["lost", "found"]
            async with Load(pipeline, ["{a}", "{b}"]) as load:
                begun = time.monotonic()
                await asyncio.to_thread(two.point_to, two.other)
                await load.until(lambda: two.other.do.get("{a}"))
                assert await at.next() == "lost"
                assert time.monotonic() - begun < BOUND
                assert await at.next() == "found"
                two.other.do.publish("parallama:changes", "key k1")
                assert await at.next() == Change("key", "k1")
            assert load.failed == []

    uvloop.run(told())


def test_a_master_that_was_demoted_is_left_at_its_first_refusal(
    two: Watched, tmp_path: Path
) -> None:
    async def told() -> None:
        config = config_of(two, tmp_path)
        async with (
            connect_redis(config) as redis,
            aclosing(Pipeline(redis, COUNT, timeout=TIMEOUT)) as pipeline,
        ):
            assert await pipeline.run(COUNT, ["{a}"], []) == 1
            two.point_to(two.other)
            two.master.do.replicaof("127.0.0.1", str(two.other.port))
            answers = await asyncio.gather(*(pipeline.run(COUNT, ["{a}"], []) for _ in range(9)))
            assert sorted(answers) == [*range(1, 10)]

    uvloop.run(told())


def test_a_replica_that_the_sentinels_still_call_the_master_is_not_used(
    two: Watched, tmp_path: Path
) -> None:
    async def told() -> None:
        config = config_of(two, tmp_path)
        two.master.do.replicaof("127.0.0.1", str(two.other.port))
        async with (
            connect_redis(config) as redis,
            aclosing(Pipeline(redis, COUNT, timeout=TIMEOUT)) as pipeline,
        ):
            with pytest.raises(Unavailable, match="name a server that is no master"):
                await pipeline.run(COUNT, ["{a}"], [])
            two.point_to(two.other)
            assert await pipeline.run(COUNT, ["{a}"], []) == 1

    uvloop.run(told())


async def refusal(config: Config) -> str:
    async with connect_redis(config) as redis:
        with pytest.raises(RedisError) as told:
            await redis.ping()
        return str(told.value)


def test_a_name_that_the_sentinels_do_not_know(two: Watched, tmp_path: Path) -> None:
    redis = f"mode: sentinel, nodes: {two.nodes}, sentinel_master: nobody"
    told = uvloop.run(refusal(a_config(tmp_path, redis)))
    assert "knows no master nobody (redis.sentinel_master)" in told


def test_sentinels_that_are_away(tmp_path: Path) -> None:
    nodes = f"[127.0.0.1:{free_port()}, 127.0.0.1:{free_port()}]"
    redis = f"mode: sentinel, nodes: {nodes}, sentinel_master: counters"
    told = uvloop.run(refusal(a_config(tmp_path, redis)))
    assert told.startswith("no sentinel names the master (127.0.0.1:")
    assert told.count("127.0.0.1:") >= 2


@pytest.mark.parametrize("password", ["of-the-sentinels", "wr0ng", None])
def test_the_sentinels_own_password(password: str | None, tmp_path: Path) -> None:
    more = ""
    if password:
        (tmp_path / "secret").write_text(password)
        (tmp_path / "secret").chmod(0o600)
        more = ", sentinel_password_file: secret"

    async def told(config: Config) -> None:
        async with connect_redis(config) as redis:
            assert await redis.ping()

    with Watched(tmp_path / "v", replicated=False, password="of-the-sentinels") as servers:
        config = config_of(servers, tmp_path, more)
        if password == "of-the-sentinels":
            uvloop.run(told(config))
        else:
            text = uvloop.run(refusal(config))
            assert "(redis.sentinel_password_file)" in text
            assert "wr0ng" not in text


def test_a_dead_sentinel_in_front_costs_a_part_of_the_time_only(
    two: Watched, tmp_path: Path
) -> None:
    async def told() -> None:
        async with Odd(hang_up=False) as silent:
            nodes = f"[127.0.0.1:{silent.port}, {two.sentinels[0].address}]"
            redis = f"mode: sentinel, nodes: {nodes}, sentinel_master: {two.NAME}"
            async with (
                connect_redis(a_config(tmp_path, redis)) as client,
                aclosing(Pipeline(client, COUNT, timeout=TIMEOUT)) as pipeline,
            ):
                assert await pipeline.run(COUNT, ["{a}"], []) == 1

    uvloop.run(told())
