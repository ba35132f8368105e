"""
gRPC for one kind of client: an Envoy on a unix socket.

The library's Python server spends 200 us of CPU and eight threads on a call whose answer takes 5 us
to find (docs/decisions/0008). This one has what Envoy needs of gRPC's PROTOCOL-HTTP2: unary calls,
client streams, cancellation, back-pressure, draining. No TLS, no compression, no server streams, no
metadata; deadlines are the client's to keep, who resets what it waits for no longer.
"""

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from contextlib import suppress
from enum import IntEnum
from typing import Any
from urllib.parse import quote

from parallama import http2

log = logging.getLogger(__name__)


class Later:
    """
    An answer that `then` makes once `asked` is done, or finds that more has to be awaited for it.

    Nothing is cancelled when the client leaves: it is an answer that nobody got, see Undo.
    """

    __slots__ = ("asked", "then")

    def __init__(
        self, asked: "asyncio.Future[Any]", then: Callable[[], "bytes | Awaitable[bytes]"]
    ) -> None:
        self.asked = asked
        self.then = then

    def __await__(self) -> Generator[Any, None, bytes]:
        return self._made().__await__()

    async def _made(self) -> bytes:
        await asyncio.wait((self.asked,))
        answer = self.then()
        return answer if isinstance(answer, bytes) else await answer


Unary = Callable[[bytes], bytes | Awaitable[bytes]]
"""
A serialised request in, a serialised answer out; at once where nothing has to be waited for.

What is awaited is cancelled when the client leaves, but for what `Later` waits for, which costs no
task. Any exception but RpcError is INTERNAL.
"""

Undo = Callable[[bytes], None]
"""Told the request of an answer that nobody got: the client left while it was on its way."""

ClientStream = Callable[[AsyncIterator[bytes]], Awaitable[bytes]]
"""
Serialised requests in, one answer at their end.

They also end, without an error, when the client leaves. It is held back while they are not taken.
"""


class Status(IntEnum):
    OK = 0
    INVALID_ARGUMENT = 3
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class RpcError(Exception):
    """A call that ends with a status other than OK. 100 characters of the message are sent."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


# A byte of the window is left over: by it a message that is too large is seen to be.
_LARGEST_MESSAGE = http2.STREAM_WINDOW - 6

_HEADERS = http2.STATUS_200 + http2.field(b"content-type", b"application/grpc")
_OK = http2.field(b"grpc-status", b"0")
_UNESCAPED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")  # in a grpc-message
_TOO_LARGE = RpcError(Status.RESOURCE_EXHAUSTED, "the message is too large")
_BACKLOG = 100
_TURNS_TO_MEET = 3  # of the event loop: to poll, to accept, to say so
_LAST_WORDS = 1.0  # seconds for what was cancelled to end


class _Call(http2.Stream):
    _task: "asyncio.Future[bytes] | None" = None

    def __init__(self, server: "Server") -> None:
        self._server = server

    def answer(self, message: bytes) -> None:
        body = b"".join((b"\0", len(message).to_bytes(4, "big"), message))
        self.connection.answer(self, _HEADERS, body, _OK)

    def fail(self, error: BaseException) -> None:
        if not isinstance(error, RpcError):
            log.error("call failed", exc_info=error)
            error = RpcError(Status.INTERNAL, "internal error")
        message = quote(error.message[:100], safe=_UNESCAPED).encode()[:126]
        self.connection.end_answer(
            self,
            _HEADERS
            + http2.field(b"grpc-status", str(int(error.status)).encode())
            + http2.field(b"grpc-message", message),
        )
        self.cancel()

    def run(self, call: Awaitable[bytes]) -> None:
        self._task = asyncio.ensure_future(call)
        self._server.tasks.add(self._task)
        self._task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Future[bytes]") -> None:
        self._server.tasks.discard(task)
        self._server.changed()
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if self.open:
            self.answer(task.result()) if error is None else self.fail(error)
        elif error is None:
            self.untaken()
        elif not isinstance(error, RpcError | asyncio.CancelledError):
            log.error("cancelled call failed", exc_info=error)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class _UnaryCall(_Call):
    def __init__(self, server: "Server", method: Unary, undo: Undo | None) -> None:
        self._server = server
        self._method = method
        self._undo = undo
        self._body: bytes | bytearray = b""
        self._request = b""
        self._then: Callable[[], bytes | Awaitable[bytes]]
        self.wants_untaken = undo is not None

    def untaken(self) -> None:
        if self._undo is not None:
            self._undo(self._request)

    def take(self, data: bytes) -> None:
        if self._body or not self.ended:
            self._body = self._body or bytearray()
            self._body += data
            if len(self._body) > _LARGEST_MESSAGE + 5:
                self.fail(_TOO_LARGE)
                return
            if not self.ended:
                return
            data = bytes(self._body)
        try:
            self._request = _message(data)
            answer = self._method(self._request)
        except Exception as error:
            self.fail(error)
            return
        if isinstance(answer, Later):
            self._then = answer.then
            self._server.tasks.add(answer.asked)
            answer.asked.add_done_callback(self._asked)
        else:
            self._give(answer)

    def _asked(self, asked: "asyncio.Future[Any]") -> None:
        self._server.tasks.discard(asked)
        self._server.changed()
        if asked.cancelled():
            self._done(asked)
        elif self.open:
            try:
                answer = self._then()
            except Exception as error:
                self.fail(error)
            else:
                self._give(answer)
        elif asked.exception() is None:
            self.untaken()

    def _give(self, answer: bytes | Awaitable[bytes]) -> None:
        if isinstance(answer, bytes):
            self.answer(answer)
        else:
            self.run(answer)


class _StreamCall(_Call):
    def __init__(self, server: "Server", consume: ClientStream) -> None:
        super().__init__(server)
        self._consume = consume
        self._body = bytearray()
        self._needed = 5  # bytes of body, before the next message can be whole
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()

    def opened(self) -> None:
        self.run(self._consume(self))

    def take(self, data: bytes) -> None:
        self._body += data
        while len(self._body) >= self._needed:
            self._needed = 5 + int.from_bytes(self._body[1:5], "big")
            if self._needed > _LARGEST_MESSAGE + 5:
                self.fail(_TOO_LARGE)
                return
            if len(self._body) >= self._needed:
                self._messages.put_nowait(bytes(self._body[: self._needed]))
                del self._body[: self._needed]
                self._needed = 5
        if self.ended:
            if self._body:
                self._messages.put_nowait(bytes(self._body))  # `_message` will complain
            self._messages.put_nowait(None)

    def cancel(self) -> None:
        """What the client had sent before it left is still to be consumed."""
        self._messages.put_nowait(None)

    def __aiter__(self) -> "_StreamCall":
        return self

    async def __anext__(self) -> bytes:
        framed = await self._messages.get()
        if framed is None:
            self._messages.put_nowait(None)
            raise StopAsyncIteration
        self.grant(len(framed))
        return _message(framed)


class _UnknownCall(_Call):
    def opened(self) -> None:
        self.fail(RpcError(Status.UNIMPLEMENTED, "no such method"))


class Server:
    """
    Serves `methods` and `streams`, by their gRPC paths, and the standard health check.

    Health says SERVING while `well`. That we leave is told by draining: an Envoy that heard of it
    here would take our successor on the same path for dead.
    """

    def __init__(
        self,
        methods: Mapping[str, Unary],
        streams: Mapping[str, ClientStream] | None = None,
        undo: Mapping[str, Undo] | None = None,
        *,
        well: Callable[[], bool] = lambda: True,
    ) -> None:
        self.serving = False
        self.connections: set[http2.Connection] = set()
        self.tasks: set[asyncio.Future[bytes]] = set()
        self._methods: dict[str, Unary] = {**methods, "/grpc.health.v1.Health/Check": self._health}
        self._streams = dict(streams or {})
        self._undo = dict(undo or {})
        self._well = well
        self._change = asyncio.Event()
        self._listener: asyncio.Server

    async def start(self, path: str) -> None:
        """
        Listen on a unix socket for this user alone. One that is there is replaced in one step: who
        connects meets the old server or this one.
        """
        loop = asyncio.get_running_loop()
        listener = bound(path)
        self.serving = True
        self._listener = await loop.create_unix_server(
            lambda: http2.Connection(self), sock=listener, backlog=_BACKLOG
        )

    async def stop(self, grace: float) -> None:
        """
        Take no more connections, let calls end for up to `grace` seconds, then cut them.

        For as long again, what clients had sent of streams may be consumed. Then that is cancelled.
        """
        await self._meet()  # a socket that closes resets whoever still waits in its backlog
        self.serving = False
        self._listener.close()
        await self._meet()  # one that was accepted and that nobody closes keeps uvloop from ending
        for connection in self.connections:
            connection.drain()
        await self._until(lambda: all(each.drained for each in self.connections), grace)
        for connection in tuple(self.connections):
            connection.hang_up()
        await self._until(self._over, grace)
        for connection in tuple(self.connections):  # of peers that do not read
            connection.abort()
        for task in tuple(self.tasks):
            if not (isinstance(task, asyncio.Task) and task.cancelling()):  # once, not twice
                task.cancel()
        await self._until(self._over, _LAST_WORDS)

    async def _meet(self) -> None:
        """Let the event loop accept who is there, and make them known to us."""
        for _ in range(_TURNS_TO_MEET):
            await asyncio.sleep(0)

    def _over(self) -> bool:
        return not self.connections and not self.tasks

    async def _until(self, reached: Callable[[], bool], seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not reached():
                    self._change.clear()
                    await self._change.wait()

    def changed(self) -> None:
        if not self.serving:  # or else nobody waits for that
            self._change.set()

    def stream(self, path: str) -> http2.Stream:
        method = self._methods.get(path)
        if method is not None:
            return _UnaryCall(self, method, self._undo.get(path))
        consume = self._streams.get(path)
        return _UnknownCall(self) if consume is None else _StreamCall(self, consume)

    def _health(self, _: bytes) -> bytes:
        """A HealthCheckResponse: field 1 is SERVING (1) or NOT_SERVING (2)."""
        return b"\x08\x01" if self._well() else b"\x08\x02"


def bound(path: str) -> socket.socket:
    """A socket that listens, in the place of one that may be there."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):  # it is not ours to remove
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)
    # No longer than the shortest name here, and nobody else's: in containers of their own two
    # services may have the same process id.
    folder, name = os.path.split(path)
    fresh = os.path.join(folder, f".{name[:1]}{os.getpid():x}")
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        with suppress(FileNotFoundError):
            os.unlink(fresh)
        listener.bind(fresh)
        listener.listen(_BACKLOG)
        os.rename(fresh, path)
    except OSError:
        listener.close()
        with suppress(OSError):
            os.unlink(fresh)
        raise
    finally:
        os.umask(before)
    return listener


def _message(framed: bytes) -> bytes:
    """What is inside gRPC's five bytes of framing."""
    if len(framed) < 5 or int.from_bytes(framed[1:5], "big") != len(framed) - 5:
        raise RpcError(Status.INVALID_ARGUMENT, "not one whole message")
    if framed[0]:
        raise RpcError(Status.UNIMPLEMENTED, "compressed messages are not understood")
    return framed[5:]
