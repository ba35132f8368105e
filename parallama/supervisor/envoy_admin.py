"""Questions to Envoy and to whoever else has to serve before it: is it there, is it done?"""

import asyncio
import re
from collections.abc import Awaitable
from http import HTTPStatus
from pathlib import Path

from parallama.supervisor import envoy_files

_TIMEOUT_SECONDS = 5.0
_POLL_SECONDS = 0.05
# More than buffer_flush_interval in envoy.yaml, until which an access-log entry is not sent.
_FLUSH_SECONDS = 0.25

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def drain(admin: str, folder: Path, *, seconds: float, hurry: asyncio.Event) -> bool:
    """
    Let the requests that run end and their log entries leave, then tell Envoy to exit.

    New connections are refused from the start: whoever made one now would have to be cut later.
    False where some still ran after `seconds`, or when `hurry` was set: those were cut, and their
    log entries have left, too. Raises OSError where Envoy does not answer.
    """
    await _ask(admin, "POST", "/healthcheck/fail")  # answers now say: connection: close
    await _ask(admin, "POST", "/drain_listeners")
    cut = 0
    if not await _wait_quiet(admin, seconds, hurry):
        cut, _ = await _requests(admin)
        envoy_files.close_listeners(folder)
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            await _quiet(admin)
    await _ask(admin, "POST", "/quitquitquit")
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
        await asyncio.sleep(_FLUSH_SECONDS if running == 0 else _POLL_SECONDS)


async def _requests(admin: str) -> tuple[int, int]:
    """How many run, and how many there were; nothing is counted once the listeners are gone."""
    name = "http.gateway.downstream_rq_{}"
    answer = await _ask(admin, "GET", f"/stats?filter=^{name.format('(active|total)')}$")
    counts = dict(re.findall(r"downstream_rq_(active|total): (\d+)", answer))
    return int(counts.get("active", 0)), int(counts.get("total", 0))


async def _ask(admin: str, method: str, path: str) -> str:
    status, text = await _exchange(asyncio.open_unix_connection(admin), method, path)
    if status != HTTPStatus.OK:
        raise OSError(f"envoy's admin answered {status} to {path}")
    return text


async def answers_ok(host: str, port: int, path: str) -> bool:
    """Whether GET `path` is answered with 200."""
    try:
        status, _ = await _exchange(asyncio.open_connection(host, port), "GET", path)
    except OSError:
        return False
    return status == HTTPStatus.OK


async def accepts(path: str) -> bool:
    """Whether somebody listens on a unix socket."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    return True


async def _exchange(opening: Awaitable[_Streams], method: str, path: str) -> tuple[int, str]:
    """
    Status and whole text of an answer, headers and framing included.

    Raises OSError where there is none in time.
    """
    async with asyncio.timeout(_TIMEOUT_SECONDS):
        reader, writer = await opening
        try:
            # Envoy takes no HTTP/1.0.
            head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
            writer.write(head.encode())
            text = (await reader.read()).decode(errors="replace")
        finally:
            writer.close()
    status = re.match(r"HTTP/1\.1 (\d{3}) ", text)
    if status is None:
        raise OSError(f"no HTTP answer to {path}")
    return int(status[1]), text
