"""Small questions over HTTP/1.1, such as those to Envoy's admin interface."""

import asyncio
import re
from collections.abc import Awaitable
from http import HTTPStatus

_TIMEOUT_SECONDS = 5.0

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def ask(socket: str, method: str, path: str) -> str:
    """The text of an answer of status 200, from a unix socket. Raises OSError where none comes."""
    status, text = await exchange(asyncio.open_unix_connection(socket), method, path)
    if status != HTTPStatus.OK:
        raise OSError(f"envoy's admin answered {status} to {path}")
    return text


async def exchange(opening: Awaitable[Streams], method: str, path: str) -> tuple[int, str]:
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
