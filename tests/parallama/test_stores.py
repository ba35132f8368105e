"""Connections to Redis or Valkey: which one, how long it may take, and paths that are too long."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallama import resp
from parallama.config import Config, load
from parallama.errors import ParallamaError
from parallama.stores import connect_redis, socket_path, valkey_socket
from tests.parallama.servers import Server
from tests.valkey import Valkey


def a_config(folder: Path, text: str = "{}") -> Config:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, {})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    """At the place where the embedded one of a default configuration is."""
    run = tmp_path / "state" / "run"
    run.mkdir(parents=True)
    server = Valkey(run)
    server.socket = str(run / "valkey.sock")
    server.start()
    yield server
    server.stop()


def test_without_a_host_it_is_the_embedded_one(tmp_path: Path, server: Valkey) -> None:
    config = a_config(tmp_path)
    assert str(valkey_socket(config)) == server.socket

    async def story() -> None:
        async with connect_redis(config) as redis:
            assert await redis.ping()

    asyncio.run(story())


def test_with_a_host_it_is_that_one(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret\n")
    (tmp_path / "secret").chmod(0o600)

    async def story(config: Config) -> None:
        async with connect_redis(config) as redis:
            await redis.run("SET", "here", "1")

    with Server(tmp_path / "v", "requirepass s3cret", password="s3cret") as server:
        told = f"host: 127.0.0.1, port: {server.port}, db: 3, password_file: secret"
        asyncio.run(story(a_config(tmp_path, f"redis: {{{told}}}")))
        server.do.select(3)
        assert server.do.get("here") == b"1"


def test_after_a_refusal_it_goes_on_and_after_a_loss_it_comes_back(
    tmp_path: Path, server: Valkey
) -> None:
    async def story() -> None:
        async with connect_redis(a_config(tmp_path)) as redis:
            with pytest.raises(resp.Refused, match="unknown command"):
                await redis.run("NONSENSE")
            one = await redis.run("CLIENT", "ID")
            with pytest.raises(resp.Refused, match="wrong number"):
                await redis.run("GET")
            assert await redis.run("CLIENT", "ID") == one
            server.stop()
            with pytest.raises(resp.Unreachable):
                await redis.ping()
            server.start()
            assert await redis.ping()

    asyncio.run(story())


def test_an_answer_that_came_too_late_is_nobodys(tmp_path: Path, server: Valkey) -> None:
    config = a_config(tmp_path, "redis: {timeout_seconds: 0.2}")

    async def story() -> None:
        async with connect_redis(config) as redis:
            await redis.run("SET", "a", "of the first")
            await redis.run("SET", "b", "of the second")
            server.pause(signal.SIGSTOP)
            with pytest.raises(resp.Late):
                await redis.run("GET", "a")
            waiting = asyncio.create_task(redis.run("GET", "a"))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait((waiting,))
            server.pause(signal.SIGCONT)
            assert await redis.run("GET", "b") == b"of the second"

    asyncio.run(story())


def test_many_may_ask_at_once(tmp_path: Path, server: Valkey) -> None:
    async def story() -> None:
        async with connect_redis(a_config(tmp_path)) as redis:
            answers = await asyncio.gather(*(redis.run("INCR", "n") for _ in range(50)))
            assert answers == [*range(1, 51)]

    asyncio.run(story())


def test_a_server_that_is_away_is_an_error_at_once_and_tried_once(tmp_path: Path) -> None:
    (tmp_path / "state" / "run").mkdir(parents=True)

    async def story() -> float:
        async with connect_redis(a_config(tmp_path)) as redis:
            begun = time.monotonic()
            with pytest.raises(resp.Unreachable):
                await redis.ping()
            return time.monotonic() - begun

    assert asyncio.run(story()) < 1


def test_a_silent_server_costs_no_more_than_the_time_out(tmp_path: Path, server: Valkey) -> None:
    config = a_config(tmp_path, "redis: {timeout_seconds: 0.2}")

    async def story() -> float:
        async with connect_redis(config) as redis:
            await redis.ping()
            server.pause(signal.SIGSTOP)
            begun = time.monotonic()
            with pytest.raises(resp.Late):
                await redis.ping()
            waited = time.monotonic() - begun
            server.pause(signal.SIGCONT)
            return waited

    assert 0.1 < asyncio.run(story()) < 1.5


def test_a_path_that_is_short_enough_when_written_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    with pytest.raises(ParallamaError, match="set state_dir to a shorter one"):
        socket_path(deep / "s.sock")
    monkeypatch.chdir(deep)
    assert socket_path(deep / "s.sock") == "s.sock"


@pytest.mark.parametrize(("length", "fits"), [(107, True), (108, False)])
def test_the_kernels_bound_is_met_exactly(
    length: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/usr")  # so that the absolute spelling is the shorter one
    path = Path("/" + "x" * (length - 1))
    assert len(os.fsencode(path)) == length
    if fits:
        assert socket_path(path) == str(path)
    else:
        with pytest.raises(ParallamaError, match="too long"):
            socket_path(path)


def test_bytes_count_and_not_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    with pytest.raises(ParallamaError, match="too long"):
        socket_path(Path("/" + "ü" * 60))
