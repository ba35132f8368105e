"""A model server at a unix socket, as Envoy shows it to the catalog: answers what it is told to."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

import h11

Raw = bytes | Callable[[asyncio.StreamReader], Awaitable[None]]
"""The bytes of an answer, or who sees to it that there is none."""


def http(
    body: bytes, status: int = 200, kind: str = "application/json", upstream: str = "upstream -"
) -> bytes:
    head = f"HTTP/1.1 {status} .\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
    return f"{head}x-parallama-upstream: {upstream}\r\n\r\n".encode() + body


@dataclass
class Behind:
    """`says` by path. What was asked is in `asked`."""

    path: str
    says: dict[str, Raw] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        method = target = ""
        headers: dict[str, str] = {}
        body = b""
        with closing(writer):
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Request):
                    method, target = event.method.decode(), event.target.decode()
                    headers = {name.decode(): value.decode() for name, value in event.headers}
                elif isinstance(event, h11.Data):
                    body += event.data
            self.asked.append((method, target, headers, body))
            says = self.says.get(target, http(b"{}", 404))
            if isinstance(says, bytes):
                writer.write(says)
                await writer.drain()
            else:
                await says(reader)


@asynccontextmanager
async def behind(folder: Path, **says: Raw) -> AsyncIterator[Behind]:
    server = Behind(str(folder / "b.sock"), dict(says))
    async with await asyncio.start_unix_server(server.handle, server.path):
        yield server


async def hangs(reader: asyncio.StreamReader) -> None:
    """Until whoever asked has gone."""
    await reader.read()
