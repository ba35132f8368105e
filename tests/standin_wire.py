"""HTTP/1.1 for the stand-in: what was written is with the kernel, and a hang-up is noticed."""

import asyncio
import hashlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass


class ClientGone(Exception):
    """The peer closed or reset the connection."""


class BadRequest(Exception):
    """What came is not HTTP/1.1."""


@dataclass(slots=True)
class Request:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    keep_alive: bool
    received: int = 0
    """Bytes of the body; those of a blob are not kept."""
    sha256: str = ""
    """Of a blob."""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def get(self, name: str) -> str:
        """The first header of that lower-case name, or nothing."""
        return next((value for key, value in self.headers if key.lower() == name), "")


class Connection(asyncio.Protocol):
    """
    The bytes of one connection.

    Every wait (for bytes, room, time, a gate) is the same: sleep until something happens, then
    look again. So a client that leaves ends every wait at once.
    """

    transport: asyncio.Transport
    task: asyncio.Task[None]

    def __init__(
        self,
        everyone: "set[Connection]",
        exchange: "Callable[[Connection, Request], Awaitable[bool]]",
    ) -> None:
        """`everyone` holds the connections that are open; `exchange` says whether to go on."""
        self.gone = False
        self._everyone = everyone
        self._exchange = exchange
        self._buffer = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=0)  # so what is not held up is with the kernel
        self.transport = transport
        self._everyone.add(self)
        self.task = asyncio.get_running_loop().create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self.poke()

    def eof_received(self) -> None:
        self.gone = True  # as Go sees it: a client that stops sending has left
        self.poke()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self._everyone.discard(self)
        self.poke()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self.poke()

    def poke(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def happening(self) -> None:
        """Returns after any event; raises ClientGone."""
        if not self.gone:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.gone:
            raise ClientGone

    async def pause(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while loop.time() < until:
            timer = loop.call_at(until, self.poke)
            try:
                await self.happening()
            finally:
                timer.cancel()

    async def write(self, data: bytes) -> None:
        """Returns once the kernel has all of it."""
        if self.gone or self.transport.is_closing():
            raise ClientGone
        self.transport.write(data)
        if self.transport.is_closing():  # the write failed
            raise ClientGone
        await asyncio.sleep(0)  # others get their turn, and a hang-up is noticed
        while self._full:
            await self.happening()

    def reset(self) -> None:
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def _serve(self) -> None:
        try:
            while await self._exchange(self, await self._read()):
                pass
        except ClientGone:
            pass
        except BadRequest:
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")
        finally:
            self.transport.close()

    async def _until(self, mark: bytes) -> bytes:
        while (at := self._buffer.find(mark)) < 0:
            await self.happening()
        return self._take(at + len(mark))

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self.happening()
        return self._take(size)

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    async def _read(self) -> Request:
        lines = (await self._until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        try:
            method, target, version = lines[0].split(" ")
        except ValueError:
            raise BadRequest from None
        fields = (line.partition(":") for line in lines[1:-2])
        headers = [(name, value.strip()) for name, _, value in fields]
        request = Request(method, target, headers, b"", version == "HTTP/1.1")
        if "close" in request.get("connection").lower():
            request.keep_alive = False
        if request.get("expect").lower() == "100-continue":
            await self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.path.startswith("/api/blobs/"):
            digest = hashlib.sha256()
            async for piece in self._pieces(request):
                digest.update(piece)
                request.received += len(piece)
            request.sha256 = digest.hexdigest()
        else:
            request.body = b"".join([piece async for piece in self._pieces(request)])
            request.received = len(request.body)
        return request

    async def _pieces(self, request: Request) -> AsyncIterator[bytes]:
        """The body, as it comes."""
        if "chunked" not in request.get("transfer-encoding").lower():
            async for piece in self._some(int(request.get("content-length") or 0)):
                yield piece
            return
        while size := int((await self._until(b"\r\n")).partition(b";")[0], 16):
            async for piece in self._some(size):
                yield piece
            await self._exactly(2)
        while await self._until(b"\r\n") != b"\r\n":
            pass  # trailers

    async def _some(self, size: int) -> AsyncIterator[bytes]:
        while size:
            while not self._buffer:
                await self.happening()
            piece = self._take(size)
            size -= len(piece)
            yield piece
