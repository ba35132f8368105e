"""A cluster: nodes die and are replaced, slots move, and everybody finds what is theirs."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import uvloop
from redis.crc import key_slot

from parallama.changes import Change, publish
from parallama.config import Config
from parallama.errors import Unavailable
from parallama.pipeline import Pipeline
from parallama.resp import RedisError
from parallama.stores import connect_redis
from tests.parallama.servers import (
    COUNT,
    Cluster,
    Load,
    Server,
    a_config,
    a_script,
    certificate,
    tls_before,
    until,
)
from tests.parallama.test_changes import watching

TIMEOUT = 1.0
BOTH = a_script("return redis.call('INCR', KEYS[1]) + redis.call('INCR', KEYS[2])")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """For tests that leave it as it is."""
    with Cluster(tmp_path_factory.mktemp("cluster") / "v", replica=False) as cluster:
        yield cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "v") as cluster:
        yield cluster


def config_of(cluster: Cluster, folder: Path, *seeds: Server) -> Config:
    return a_config(folder, f"mode: cluster, nodes: {cluster.nodes(seeds or None)}")


def a_key(cluster: Cluster, server: Server) -> str:
    """One that `server` has."""
    keys = (f"{{k{n}}}" for n in range(10_000))
    return next(key for key in keys if cluster.owner_of(key_slot(key.encode())) is server)


def test_calls_go_where_their_keys_are_from_one_seed(shared: Cluster, tmp_path: Path) -> None:
    async def told() -> None:
        async with (
            connect_redis(config_of(shared, tmp_path, shared.masters[1])) as redis,
            aclosing(Pipeline(redis, COUNT, BOTH, timeout=TIMEOUT)) as pipeline,
        ):
            calls = [(f"{{u{n}}}:a", f"{{u{n}}}:b") for n in range(300)]
            answers = await asyncio.gather(*(pipeline.run(BOTH, keys, []) for keys in calls))
            assert answers == [2] * 300
            again = (pipeline.run(COUNT, [first], []) for first, _ in calls)
            assert await asyncio.gather(*again) == [2] * 300

    uvloop.run(told())
    sizes = [server.do.dbsize() for server in shared.masters]
    assert sum(sizes) == 600
    assert min(sizes) > 100


def test_a_nudge_goes_to_the_server_that_has_its_keys(shared: Cluster, tmp_path: Path) -> None:
    async def told() -> None:
        async with (
            connect_redis(config_of(shared, tmp_path)) as redis,
            aclosing(Pipeline(redis, COUNT, timeout=TIMEOUT)) as pipeline,
        ):
            for server in shared.masters:
                key = f"{a_key(shared, server)}:nudged"
                nudge = pipeline.prepared(COUNT, [key], [])
                pipeline.nudge(nudge)  # nobody is connected to it
                assert await pipeline.run(COUNT, [key], []) == 1
                pipeline.nudge(nudge)
                assert await pipeline.run(COUNT, [key], []) == 3

    uvloop.run(told())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_master_that_dies_under_load(how: int, cluster: Cluster, tmp_path: Path) -> None:
    """Its replica takes over. The others' keys never notice; the signal comes back."""
    first, others = cluster.masters[0], cluster.masters[1:]
    key = a_key(cluster, first)

    async def told() -> None:
        config = config_of(cluster, tmp_path)
        async with (
            connect_redis(config) as redis,
            connect_redis(config) as signals,
            aclosing(Pipeline(redis, COUNT, timeout=TIMEOUT)) as pipeline,
            watching(signals) as at,
        ):
            assert [await at.next(), await at.next()] == ["lost", "found"]
            keys = [key, *(a_key(cluster, server) for server in others)]
            async with Load(pipeline, keys) as load:
                first.signal(how)
                await load.until(lambda: load.failed)
                before = len(load.counts[key])
                await load.until(lambda: len(load.counts[key]) > before + 100)
                assert {failed for failed, _ in load.failed} == {key}
                assert load.longest < TIMEOUT + 0.5
            while not at.told.empty():  # its node may have been the one that died
                await at.next()
            await publish(redis, Change("key", "k1"))
            assert await at.next() == Change("key", "k1")
            assert cluster.replica is not None
            assert int(cluster.replica.do.get(key) or 0) == load.counts[key][-1]

    uvloop.run(told())


def test_a_slot_that_moves_under_load(cluster: Cluster, tmp_path: Path) -> None:
    source, target = cluster.masters[:2]
    key = a_key(cluster, source)
    slot = key_slot(key.encode())

    async def told() -> None:
        async with (
            connect_redis(config_of(cluster, tmp_path)) as redis,
            aclosing(Pipeline(redis, COUNT, BOTH, timeout=TIMEOUT)) as pipeline,
        ):
            async with Load(pipeline, [key]) as load:
                sid, tid = cluster.id_of(source), cluster.id_of(target)
                target.do.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", sid)
                source.do.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", tid)
                source.do.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
                before = load.answered()
                await load.until(lambda: load.answered() > before + 50)  # by ASK

                # One key is there, the other nowhere: it cannot be told where both belong.
                half = pipeline.run(BOTH, [key, f"{key}:new"], [])
                with pytest.raises(Unavailable, match="TRYAGAIN"):
                    await asyncio.wait_for(half, TIMEOUT)

                for server in (target, source, *cluster.masters[2:]):
                    server.do.execute_command("CLUSTER SETSLOT", slot, "NODE", tid)
                before = load.answered()
                await load.until(lambda: load.answered() > before + 50)  # by MOVED
            assert load.failed == []
            assert load.counts[key] == [*range(1, len(load.counts[key]) + 1)]
            assert await pipeline.run(BOTH, [key, f"{key}:new"], []) > 1

    uvloop.run(told())


def test_a_slot_that_moves_as_a_whole_under_load(cluster: Cluster, tmp_path: Path) -> None:
    source, target = cluster.masters[:2]
    key = a_key(cluster, source)
    slot = key_slot(key.encode())

    async def told() -> None:
        async with (
            connect_redis(config_of(cluster, tmp_path)) as redis,
            aclosing(Pipeline(redis, COUNT, timeout=TIMEOUT)) as pipeline,
            Load(pipeline, [key, f"{key}:b"]) as load,
        ):
            move = ("CLUSTER MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE")
            await asyncio.to_thread(source.do.execute_command, *move, cluster.id_of(target))
            mine = f"CLUSTER COUNTKEYSINSLOT {slot}"
            await asyncio.to_thread(until, lambda: target.do.execute_command(mine) == 2)
            before = load.answered()
            await load.until(lambda: load.answered() > before + 100)
        assert load.failed == []
        for counts in load.counts.values():
            assert counts == [*range(1, len(counts) + 1)]

    uvloop.run(told())
    assert target.do.get(key)


def test_a_slot_that_nobody_has(cluster: Cluster, tmp_path: Path) -> None:
    source = cluster.masters[0]
    key = a_key(cluster, source)
    for server in cluster.servers:
        if server is not cluster.replica:
            server.do.execute_command("CLUSTER DELSLOTS", key_slot(key.encode()))

    async def told() -> None:
        async with (
            connect_redis(config_of(cluster, tmp_path, source)) as redis,
            aclosing(Pipeline(redis, COUNT, timeout=TIMEOUT)) as pipeline,
        ):
            with pytest.raises(Unavailable, match=r"no server of the cluster has slot|CLUSTERDOWN"):
                await asyncio.wait_for(pipeline.run(COUNT, [key], []), TIMEOUT)
            assert await pipeline.run(COUNT, [a_key(cluster, cluster.masters[1])], []) == 1

    uvloop.run(told())


def test_who_listens_to_a_node_that_was_taken_out_goes_elsewhere(
    cluster: Cluster, tmp_path: Path
) -> None:
    async def told() -> None:
        seeds = cluster.masters[2], cluster.masters[1]
        async with (
            connect_redis(config_of(cluster, tmp_path, *seeds)) as signals,
            watching(signals) as at,
        ):
            assert [await at.next(), await at.next()] == ["lost", "found"]
            out = next(
                server
                for server in cluster.servers
                if server.do.pubsub_numsub("parallama:changes")[0][1]
            )
            left = [server for server in cluster.servers if server is not out]
            gone = cluster.id_of(out)
            for server in left:
                if server is not cluster.replica or out is not cluster.masters[0]:
                    server.do.execute_command("CLUSTER FORGET", gone)
            assert await at.next() == "lost"
            assert await at.next() == "found"
            left[0].do.publish("parallama:changes", "key k1")
            assert await at.next() == Change("key", "k1")

    uvloop.run(told())


def test_a_server_that_is_no_cluster_says_so(tmp_path: Path) -> None:
    async def told(config: Config) -> None:
        async with (
            connect_redis(config) as redis,
            aclosing(Pipeline(redis, COUNT, timeout=TIMEOUT)) as pipeline,
        ):
            with pytest.raises(Unavailable, match=r"cluster support disabled \(redis.mode\)"):
                await pipeline.run(COUNT, ["{a}"], [])
            with pytest.raises(RedisError, match=r"\(redis.mode\)"):
                await redis.ping()

    with Server(tmp_path / "v") as server:
        uvloop.run(told(a_config(tmp_path, f"mode: cluster, nodes: [{server.address}]")))


def test_a_cluster_that_is_taken_for_one_server_says_so(shared: Cluster, tmp_path: Path) -> None:
    async def told(config: Config) -> None:
        async with (
            connect_redis(config) as redis,
            aclosing(Pipeline(redis, COUNT, timeout=TIMEOUT)) as pipeline,
        ):
            with pytest.raises(Unavailable, match=r"MOVED .*\(redis.mode\)"):
                await pipeline.run(COUNT, [a_key(shared, shared.masters[1])], [])

    port = shared.masters[0].port
    uvloop.run(told(a_config(tmp_path, f"host: 127.0.0.1, port: {port}")))


def test_tls(tmp_path: Path) -> None:
    """The node says under which port it is reached: that of its TLS."""
    made, key = certificate(tmp_path, "node", "IP:127.0.0.1")

    async def told(alone: Cluster) -> None:
        server = alone.servers[0]
        async with tls_before(server.port, made, key) as port:
            server.do.config_set("cluster-announce-port", port)
            until(lambda: str(port) in str(server.do.execute_command("CLUSTER NODES")))
            nodes = f"nodes: ['127.0.0.1:{port}']"
            config = a_config(tmp_path, f"mode: cluster, {nodes}, tls: true, tls_ca_file: node.pem")
            async with (
                connect_redis(config) as redis,
                aclosing(Pipeline(redis, COUNT, timeout=2)) as pipeline,
            ):
                assert await pipeline.run(COUNT, ["{a}"], []) == 1
                assert await redis.ping()

    with Cluster(tmp_path / "v", masters=1, replica=False) as alone:
        uvloop.run(told(alone))


def test_seeds_that_are_away(tmp_path: Path) -> None:
    async def told(config: Config) -> None:
        async with (
            connect_redis(config) as redis,
            aclosing(Pipeline(redis, COUNT, timeout=TIMEOUT)) as pipeline,
        ):
            with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: "):
                await pipeline.run(COUNT, ["{a}"], [])

    uvloop.run(told(a_config(tmp_path, "mode: cluster, nodes: ['127.0.0.1:1']")))
