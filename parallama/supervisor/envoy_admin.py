"""Envoy's admin interface on its unix socket: health, draining, leaving."""

import asyncio
import http.client
import json
import socket
from contextlib import closing
from pathlib import Path

_TIMEOUT_SECONDS = 5.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("admin", timeout=_TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _ask(path: str, method: str, what: str) -> str:
    with closing(_UnixConnection(path)) as connection:
        try:
            connection.request(method, what)
            answer = connection.getresponse()
            body = answer.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"envoy's admin said what is not HTTP: {error!r}") from error
    if answer.status != http.HTTPStatus.OK:
        raise OSError(f"envoy's admin answered {answer.status} to {what}")
    return body


async def ask(path: str, method: str, what: str) -> str:
    """The body of the answer. Raises OSError where Envoy does not answer with 200."""
    return await asyncio.to_thread(_ask, path, method, what)


async def active_requests(admin: str) -> int:
    name = "http.gateway.downstream_rq_active"
    answer = json.loads(await ask(admin, "GET", f"/stats?format=json&filter=^{name}$"))
    return sum(int(stat["value"]) for stat in answer["stats"])


async def drain(admin: str, *, seconds: float, flush_seconds: float, hurry: asyncio.Event) -> bool:
    """
    Let the requests that run end, and their log entries leave, then tell Envoy to exit.

    False where some still ran after `seconds`, or when `hurry` was set: those are cut. Raises
    OSError where Envoy is gone.
    """
    await ask(admin, "POST", "/healthcheck/fail")
    await ask(admin, "POST", "/drain_listeners?graceful&skip_exit")
    deadline = asyncio.get_running_loop().time() + seconds
    while (running := await active_requests(admin)) and not hurry.is_set():
        if asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.05)
    # Entries wait in Envoy for buffer_flush_interval; what is not sent by then would be lost.
    await asyncio.sleep(flush_seconds)
    await ask(admin, "POST", "/quitquitquit")
    return running == 0


async def answers_ok(host: str, port: int, path: str) -> bool:
    """Whether GET `path` is answered with 200."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    try:
        # Envoy's listeners take no HTTP/1.0.
        head = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        writer.write(head.encode())
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()


async def accepts(path: Path) -> bool:
    """Whether somebody listens on a unix socket."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    return True
