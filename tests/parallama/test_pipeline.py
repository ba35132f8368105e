"""Scripts on one server of one's own: flushed scripts, silence, passwords, TLS, and bounds."""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import uvloop

from parallama.changes import Change, publish
from parallama.config import Config
from parallama.errors import Unavailable
from parallama.lanes import PAUSE
from parallama.pipeline import Pipeline
from parallama.resp import RedisError
from parallama.stores import connect_redis
from tests.parallama.servers import COUNT, Odd, Server, a_config, certificate, tls_before
from tests.parallama.test_changes import watching

ROOT = Path(__file__).parents[2]


def run(
    config: Config, story: Callable[[Pipeline], Awaitable[None]], *, timeout: float = 1.0
) -> None:
    async def told() -> None:
        async with (
            connect_redis(config) as redis,
            aclosing(Pipeline(redis, COUNT, timeout=timeout)) as pipeline,
        ):
            await story(pipeline)

    uvloop.run(told())


async def refused(pipeline: Pipeline) -> str:
    with pytest.raises(Unavailable) as told:
        await pipeline.run(COUNT, ["{a}"], [])
    return str(told.value)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("v") / "one") as server:
        yield server


def test_scripts_that_are_flushed_again_and_again_lose_no_call(
    server: Server, tmp_path: Path
) -> None:
    async def story(pipeline: Pipeline) -> None:
        async def flush() -> None:
            for _ in range(50):
                await asyncio.to_thread(server.do.script_flush)

        flushing = asyncio.create_task(flush())
        counted = 0
        while not flushing.done():
            answers = await asyncio.gather(
                *(pipeline.run(COUNT, ["{flushed}"], []) for _ in range(20))
            )
            assert sorted(answers) == [*range(counted + 1, counted + 21)]
            counted += 20
        await flushing

    run(a_config(tmp_path, f"host: 127.0.0.1, port: {server.port}"), story, timeout=5)


def test_a_server_that_takes_connections_and_says_nothing(tmp_path: Path) -> None:
    async def told() -> None:
        async with Odd(hang_up=False) as odd:
            config = a_config(tmp_path, f"host: 127.0.0.1, port: {odd.port}, timeout_seconds: 0.2")
            async with (
                connect_redis(config) as redis,
                aclosing(Pipeline(redis, COUNT, timeout=0.2)) as pipeline,
            ):
                before = len(os.listdir("/proc/self/fd"))
                for _ in range(5):
                    begun = time.monotonic()
                    answers = await asyncio.gather(
                        *(pipeline.run(COUNT, ["{a}"], []) for _ in range(50)),
                        return_exceptions=True,
                    )
                    assert time.monotonic() - begun < 0.6
                    assert {type(answer) for answer in answers} == {Unavailable}
                assert len(os.listdir("/proc/self/fd")) < before + 12

    uvloop.run(told())


def test_a_nudge_runs_a_script_before_a_call_and_is_in_nobodys_way(
    server: Server, tmp_path: Path
) -> None:
    async def story(pipeline: Pipeline) -> None:
        nudge = pipeline.prepared(COUNT, ["{nudged}"], [])
        pipeline.nudge(nudge)  # nobody is connected: a call that comes alone is slow anyhow
        assert await pipeline.run(COUNT, ["{nudged}"], []) == 1
        for counted in (3, 5):
            pipeline.nudge(nudge)
            pipeline.nudge(nudge)
            assert await pipeline.run(COUNT, ["{nudged}"], []) == counted
        under_way = pipeline.run(COUNT, ["{nudged}"], [])
        pipeline.nudge(nudge)
        assert await under_way == 6
        assert await pipeline.run(COUNT, ["{nudged}"], []) == 7
        await asyncio.to_thread(server.do.script_flush)
        pipeline.nudge(nudge)
        answers = await asyncio.gather(*(pipeline.run(COUNT, ["{other}"], []) for _ in range(3)))
        assert answers == [1, 2, 3]
        pipeline.nudge(nudge)  # and nobody calls: aclose() has nothing to wait for

    run(a_config(tmp_path, f"host: 127.0.0.1, port: {server.port}"), story)


def test_a_server_that_was_nudged_and_says_nothing_is_left_in_time(tmp_path: Path) -> None:
    async def told() -> None:
        async with Odd(hang_up=False) as odd:
            config = a_config(tmp_path, f"host: 127.0.0.1, port: {odd.port}, timeout_seconds: 0.2")
            async with (
                connect_redis(config) as redis,
                aclosing(Pipeline(redis, timeout=0.2)) as pipeline,
            ):
                nudge = pipeline.prepared(COUNT, ["{a}"], [])
                await refused(pipeline)
                for taken in (2, 3):
                    while odd.taken < taken:  # it is connected anew
                        pipeline.nudge(nudge)
                        await refused(pipeline)

    uvloop.run(told())


def test_calls_that_come_on_top_of_very_many_fail_at_once(tmp_path: Path) -> None:
    async def told() -> None:
        async with Odd(hang_up=False) as odd:
            config = a_config(tmp_path, f"host: 127.0.0.1, port: {odd.port}")
            async with (
                connect_redis(config) as redis,
                aclosing(Pipeline(redis, COUNT, timeout=1)) as pipeline,
            ):
                calls = [pipeline.run(COUNT, ["{a}"], []) for _ in range(10_010)]
                at_once = [call for call in calls if call.done()]
                assert len(at_once) == 10
                assert "too many calls wait" in str(at_once[0].exception())
                await asyncio.wait(calls)
                assert all(isinstance(call.exception(), Unavailable) for call in calls)

    uvloop.run(told())


def test_a_server_that_hangs_up_is_not_hammered(tmp_path: Path) -> None:
    async def told() -> None:
        async with Odd(hang_up=True) as odd:
            config = a_config(tmp_path, f"host: 127.0.0.1, port: {odd.port}")
            async with (
                connect_redis(config) as redis,
                aclosing(Pipeline(redis, COUNT, timeout=1)) as pipeline,
            ):
                begun = time.monotonic()
                for _ in range(20):
                    await refused(pipeline)
                assert odd.taken <= (time.monotonic() - begun) / PAUSE + 1

    uvloop.run(told())


# Passwords


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    lines = ("requirepass of-the-server", "user counter on >of-counter ~* &* +@all")
    with Server(tmp_path_factory.mktemp("v") / "one", *lines, password="of-the-server") as server:
        yield server


@pytest.mark.parametrize(
    ("user", "password", "well"),
    [
        (None, "of-the-server", True),
        (None, "wr0ng", False),
        (None, None, False),
        ("counter", "of-counter", True),
        ("counter", "of-the-server", False),
        ("nobody", "of-counter", False),
    ],
)
def test_passwords(
    user: str | None, password: str | None, well: bool, guarded: Server, tmp_path: Path
) -> None:
    redis = f"host: 127.0.0.1, port: {guarded.port}"
    if user:
        redis += f", username: {user}"
    if password:
        (tmp_path / "secret").write_text(password)
        (tmp_path / "secret").chmod(0o600)
        redis += ", password_file: secret"

    async def story(pipeline: Pipeline) -> None:
        if well:
            assert await pipeline.run(COUNT, ["{a}"], []) > 0
        else:
            told = await refused(pipeline)
            assert told.endswith("(redis.username, redis.password_file)")
            assert password is None or password not in told

    run(a_config(tmp_path, redis), story)


# TLS


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`right` is the server's certificate, `other` is somebody else's, `name` has another name."""
    folder = tmp_path_factory.mktemp("papers")
    certificate(folder, "right", "IP:127.0.0.1")
    certificate(folder, "other", "IP:127.0.0.1")
    certificate(folder, "name", "DNS:redis.example")
    return folder


@pytest.mark.parametrize(
    ("shown", "trusted", "verify", "told"),
    [
        pytest.param("right", "right", "full", "", id="the right authority"),
        pytest.param("right", "other", "full", "self-signed certificate", id="a wrong authority"),
        pytest.param("right", None, "full", "self-signed certificate", id="no authority"),
        pytest.param("name", "name", "full", "IP address mismatch", id="another name"),
        pytest.param("name", "name", "ca", "", id="another name does not matter"),
        pytest.param("right", "other", "ca", "self-signed", id="its authority matters"),
        pytest.param("right", None, "none", "", id="nothing matters"),
    ],
)
def test_tls(
    shown: str,
    trusted: str | None,
    verify: str,
    told: str,
    papers: Path,
    guarded: Server,
    tmp_path: Path,
) -> None:
    (tmp_path / "secret").write_text("of-the-server")
    (tmp_path / "secret").chmod(0o600)

    async def story() -> None:
        made, key = papers / f"{shown}.pem", papers / f"{shown}.key"
        async with tls_before(guarded.port, made, key) as port:
            redis = f"host: 127.0.0.1, port: {port}, password_file: secret, tls: true"
            redis += f", tls_verify: {verify}"
            if trusted:
                redis += f", tls_ca_file: {papers / trusted}.pem"
            config = a_config(tmp_path, redis)
            async with (
                connect_redis(config) as client,
                aclosing(Pipeline(client, COUNT, timeout=2)) as pipeline,
            ):
                if told:
                    assert told in await refused(pipeline)
                    with pytest.raises(RedisError, match=told):
                        await client.ping()
                else:
                    calls = (pipeline.run(COUNT, ["{tls}"], []) for _ in range(500))
                    assert len(set(await asyncio.gather(*calls))) == 500
                    assert await client.ping()

    uvloop.run(story())


def test_a_server_that_speaks_no_tls(guarded: Server, tmp_path: Path) -> None:
    async def story(pipeline: Pipeline) -> None:
        begun = time.monotonic()
        await refused(pipeline)
        assert time.monotonic() - begun < 1.5

    run(a_config(tmp_path, f"host: 127.0.0.1, port: {guarded.port}, tls: true"), story)


@pytest.mark.parametrize("shown", ["other", "name", None])
def test_a_server_that_asks_for_our_certificate_is_shown_it(
    shown: str | None, papers: Path, guarded: Server, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("of-the-server")
    (tmp_path / "secret").chmod(0o600)

    async def told() -> None:
        pems = papers / "right.pem", papers / "right.key"
        async with tls_before(guarded.port, *pems, of_clients=papers / "other.pem") as port:
            ours = f"tls_cert_file: {papers}/{shown}.pem, tls_key_file: {papers}/{shown}.key"
            redis = f"host: 127.0.0.1, port: {port}, password_file: secret, tls: true"
            redis += f", tls_ca_file: {papers}/right.pem"
            config = a_config(tmp_path, f"{redis}, {ours}" if shown else redis)
            async with connect_redis(config) as client:
                if shown == "other":
                    assert await client.ping()
                else:
                    with pytest.raises(RedisError):
                        await client.ping()

    uvloop.run(told())


def test_the_rights_that_the_manual_names_are_enough(guarded: Server, tmp_path: Path) -> None:
    manual = (ROOT / "docs/operations.md").read_text("utf-8")
    keys, channel = re.findall(r"needs keys `(\S+)`, channel `(\S+)`", manual)[0]
    commands = re.findall(r"`(\+hello [^`]*)`", manual)[0].split()
    guarded.do.execute_command(
        "ACL SETUSER", "manual", "reset", "on", ">of-manual", keys, channel, *commands
    )
    (tmp_path / "secret").write_text("of-manual")
    (tmp_path / "secret").chmod(0o600)
    redis = f"host: 127.0.0.1, port: {guarded.port}, db: 1"
    config = a_config(tmp_path, f"{redis}, username: manual, password_file: secret")
    texts = [file.read_text("utf-8") for file in (ROOT / "parallama/counters").glob("*.lua")]
    called = {name for text in texts for name in re.findall(r'call\(\s*["\']([A-Z]+)', text)}
    assert called

    async def told() -> None:
        async with (
            connect_redis(config) as client,
            aclosing(Pipeline(client, COUNT, timeout=2)) as pipeline,
            watching(client) as at,
        ):
            assert await client.ping()
            assert await pipeline.run(COUNT, ["{manual}"], []) == 1
            await asyncio.to_thread(guarded.do.script_flush)
            assert await pipeline.run(COUNT, ["{manual}"], []) == 2
            assert [await at.next(), await at.next()] == ["lost", "found"]
            await publish(client, Change("key", "k1"))
            assert await at.next() == Change("key", "k1")

    uvloop.run(told())
    allowed = {*guarded.do.acl_cat("read"), *guarded.do.acl_cat("write"), "time"}
    assert {name.lower() for name in called} <= {str(name) for name in allowed}
