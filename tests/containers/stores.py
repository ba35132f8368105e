"""The stores of the tests in containers: the same servers to the same tests."""

import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import yaml
from redis import Redis
from redis.exceptions import RedisError

from tests.containers import engine
from tests.postgres import PASSWORD, Postgres
from tests.valkey import Valkey

_STARTS_SECONDS = 30.0
_CONTAINER = " in a container"


def image(service: str) -> str | None:
    """The one that compose.yaml names, or our stand-in for it; whichever is here."""
    named = yaml.safe_load((engine.ROOT / "compose.yaml").read_text())["services"][service]["image"]
    images = (named, f"{engine.IMAGE}-{service}")
    return next(filter(engine.present, images), None) if engine.answers() else None


@cache
def places(service: str) -> list[str]:
    """How a test can have such a server: as a process, and where that is possible, contained."""
    return [service, *[f"{service}{_CONTAINER}"] * (image(service) is not None)]


def postgres(place: str) -> Postgres:
    return ContainedPostgres() if place.endswith(_CONTAINER) else Postgres()


def valkey(place: str, folder: Path) -> Valkey:
    return ContainedValkey(folder) if place.endswith(_CONTAINER) else Valkey(folder)


class Container:
    """One that may die and come again. It shares the host's network: ports are as a process has."""

    def __init__(
        self, image: str, *command: str, user: str, folder: Path | None = None, **environ: str
    ) -> None:
        # It would be a container, too, and one that is pulled.
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer

        testcontainers_config.ryuk_disabled = True
        made = DockerContainer(image).with_command([*command]).with_envs(**environ)
        made = made.with_kwargs(network_mode="host", user=user)
        if folder is not None:
            made = made.with_volume_mapping(str(folder), str(folder), "rw")
        self._container: Any = made.start().get_wrapped_container()

    def begin(self) -> None:
        self._container.start()

    def kill(self, told: str) -> None:
        self._container.kill(told)
        self._container.wait()

    def hold(self, held: bool) -> None:
        self._container.pause() if held else self._container.unpause()

    def remove(self) -> None:
        self._container.client.close()
        self._container.remove(v=True, force=True)

    def log(self) -> str:
        return str(self._container.logs().decode())


def _until(serves: Callable[[], object], container: Container) -> None:
    end = time.monotonic() + _STARTS_SECONDS
    while True:
        try:
            serves()
            return
        except (psycopg.OperationalError, RedisError, OSError):
            assert time.monotonic() < end, container.log()
            time.sleep(0.02)


class ContainedPostgres(Postgres):
    _container: Container | None = None
    _runs = False

    def _init(self) -> None:
        """The image does it when it starts first."""

    def start(self) -> None:
        if self._container is None:
            settings = {**self._parameters, "port": str(self.port)}
            del settings["unix_socket_directories"]  # the image's first steps need one
            options = [word for item in settings.items() for word in ("-c", "=".join(item))]
            self._container = Container(
                image("postgres") or "",
                "postgres",
                *options,
                user="999",
                POSTGRES_PASSWORD=PASSWORD,
            )
        else:
            self._container.begin()
        self._runs = True
        _until(lambda: self.run("SELECT 1"), self._container)

    def stop(self) -> None:
        self._end("SIGQUIT")

    def kill(self) -> None:
        self._end("SIGKILL")

    def _end(self, told: str) -> None:
        if self._container is not None and self._runs:
            self._runs = False
            self._container.kill(told)

    def pause(self, signum: int) -> None:
        assert self._container is not None
        self._container.hold(signum == signal.SIGSTOP)

    def remove(self) -> None:
        super().remove()
        if self._container is not None:
            self._container.remove()


class ContainedValkey(Valkey):
    _container: Container | None = None

    def start(self) -> None:
        """A new one each time: it starts empty."""
        self._container = Container(
            image("valkey") or "",
            *("valkey-server", "--unixsocket", self.socket, "--port", "0", "--save", ""),
            user=f"{os.getuid()}:{os.getgid()}",
            folder=self._folder,
        )
        with Redis(unix_socket_path=self.socket) as redis:
            _until(redis.ping, self._container)

    def stop(self) -> None:
        if self._container is not None:
            self._container.remove()
            self._container = None

    def pause(self, signum: int) -> None:
        assert self._container is not None
        self._container.hold(signum == signal.SIGSTOP)
