"""Questions to Envoy and to whoever else has to serve before it: is it there, is it done?"""

import asyncio
import re
import socket
import struct
from http import HTTPStatus
from pathlib import Path

from parallama.http1 import ask, exchange
from parallama.supervisor import envoy_files

_TIMEOUT_SECONDS = 5.0
_POLL_SECONDS = 0.05
_PEER = struct.Struct("3i")  # process, user, group of who listens

FLUSH_SECONDS = 0.25
"""More than buffer_flush_interval in envoy.yaml, until which an access-log entry is not sent."""


async def drain(admin: str, folder: Path, *, seconds: float, hurry: asyncio.Event) -> bool:
    """
    Let the requests that run end and their log entries leave, then tell Envoy to exit.

    New connections are refused from the start: whoever made one now would have to be cut later.
    False where some still ran after `seconds`, or when `hurry` was set: those were cut, and their
    log entries have left, too. Raises OSError where Envoy does not answer.
    """
    await ask(admin, "POST", "/healthcheck/fail")  # answers now say: connection: close
    await ask(admin, "POST", "/drain_listeners")
    cut = 0
    if not await _wait_quiet(admin, seconds, hurry):
        cut, _ = await _requests(admin)
        envoy_files.close_listeners(folder)
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            await _quiet(admin)
    await ask(admin, "POST", "/quitquitquit")
    return cut == 0


async def _wait_quiet(admin: str, seconds: float, hurry: asyncio.Event) -> bool:
    quiet = asyncio.create_task(_quiet(admin))
    hurried = asyncio.create_task(hurry.wait())
    try:
        await asyncio.wait((quiet, hurried), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if quiet.done():
            quiet.result()
        return quiet.done()
    finally:
        quiet.cancel()
        hurried.cancel()


async def _quiet(admin: str) -> None:
    """Return when no request runs, and none has for as long as log entries wait."""
    before = None
    while True:
        running, total = await _requests(admin)
        if running == 0 and total == before:
            return
        before = total if running == 0 else None
        await asyncio.sleep(FLUSH_SECONDS if running == 0 else _POLL_SECONDS)


async def _requests(admin: str) -> tuple[int, int]:
    """How many run, and how many there were; nothing is counted once the listeners are gone."""
    name = "http.gateway.downstream_rq_{}"
    answer = await ask(admin, "GET", f"/stats?filter=^{name.format('(active|total)')}$")
    counts = dict(re.findall(r"downstream_rq_(active|total): (\d+)", answer))
    return int(counts.get("active", 0)), int(counts.get("total", 0))


async def lives(admin: str, host: str, port: int, pid: int) -> bool:
    """Whether the Envoy with this process id takes requests, and the gateway is well."""
    try:
        if not await accepts(admin, pid):
            return False
        await ask(admin, "GET", "/ready")
    except OSError:
        return False
    return await answers_ok(host, port, "/healthz", pid)


async def healthz(path: str) -> int | None:
    """The status of /healthz at a unix socket; None where nobody answers."""
    try:
        status, _ = await exchange(asyncio.open_unix_connection(path), "GET", "/healthz")
    except OSError:
        return None
    return status


async def answers_ok(host: str, port: int, path: str, _: int) -> bool:
    """Whether GET `path` is answered with 200."""
    try:
        status, _text = await exchange(asyncio.open_connection(host, port), "GET", path)
    except OSError:
        return False
    return status == HTTPStatus.OK


async def accepts(path: str, pid: int) -> bool:
    """Whether the process with this id listens on a unix socket."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    writer.close()
    return bool(pid == _PEER.unpack(peer)[0])
