"""Connections to Redis or Valkey: which one, how long it may take, and paths that are too long."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from parallama.config import Config, load
from parallama.errors import ParallamaError
from parallama.stores import connect_redis, socket_path, valkey_socket
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
    config = a_config(
        tmp_path, "redis: {host: redis.example, port: 7000, db: 3, password_file: secret}"
    )
    told = connect_redis(config).connection_pool.connection_kwargs
    assert {name: told[name] for name in ("host", "port", "db", "password")} == {
        "host": "redis.example",
        "port": 7000,
        "db": 3,
        "password": "s3cret",
    }


def test_a_server_that_is_away_is_an_error_at_once_and_tried_once(tmp_path: Path) -> None:
    (tmp_path / "state" / "run").mkdir(parents=True)

    async def story() -> float:
        async with connect_redis(a_config(tmp_path)) as redis:
            begun = time.monotonic()
            with pytest.raises(RedisConnectionError):
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
            with pytest.raises(RedisTimeoutError):
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
