"""
What `parallama restart` asks of a running supervisor, over a unix socket in its folder.

One question a connection, as a line of JSON: {"restart": ["authz"]}. The answers are lines, too:
{"done": "authz"} for each, and at the end {"ok": true} or {"error": "why"}.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from parallama.errors import ParallamaError

NAME = "up.sock"
"""Of the socket, in run/."""

Restart = Callable[[Sequence[str], Callable[[str], None]], Awaitable[None]]
"""Names, and who hears of each that is done. Raises ParallamaError."""


@asynccontextmanager
async def listening(path: str, restart: Restart) -> AsyncIterator[None]:
    """For this user alone. Who asks and leaves changes nothing: what was begun is ended."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def tell(**facts: Any) -> None:
            writer.write(json.dumps(facts).encode() + b"\n")

        with suppress(OSError):
            try:
                asked = json.loads(await reader.readline())
                await restart([str(name) for name in asked["restart"]], lambda at: tell(done=at))
            except ParallamaError as error:
                tell(error=str(error))
            except (ValueError, LookupError, TypeError):
                tell(error="this is not understood: is it another version of parallama?")
            else:
                tell(ok=True)
            await writer.drain()
        writer.close()

    before = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(answer, path)
    finally:
        os.umask(before)
    try:
        yield
    finally:
        server.close()
