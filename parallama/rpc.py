"""
gRPC for one kind of client: an Envoy on a unix socket.

The library's Python server spends 200 us of CPU and eight threads on a call whose answer takes 5 us
to find (docs/decisions/0008). This one does what Envoy needs of HTTP/2 (RFC 9113) and gRPC (its
PROTOCOL-HTTP2 document): unary calls, client streams, cancellation, flow control, draining. No
TLS, no compression, no answers beyond 64 KiB. Header blocks are decoded by the hpack library.
"""

import asyncio
import logging
import os
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from enum import IntEnum
from typing import cast

import hpack

log = logging.getLogger(__name__)

Unary = Callable[[bytes], bytes | Awaitable[bytes]]
"""A serialised request in, a serialised answer out; at once where nothing has to be waited for."""

ClientStream = Callable[[AsyncIterator[bytes]], Awaitable[bytes]]
"""Serialised requests in, one answer at their end."""


class Status(IntEnum):
    OK = 0
    INVALID_ARGUMENT = 3
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class RpcError(Exception):
    """A call that ends with a status other than OK. `message` is ASCII."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    *(0, 1, 3, 4, 6, 7, 8, 9),
)
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_NO_ERROR, _PROTOCOL_ERROR, _FRAME_SIZE_ERROR, _CANCEL = 0, 1, 6, 8
_HEADER_TABLE_SIZE, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE = 1, 3, 4

_LARGEST_FRAME = 16384
_LARGEST_HEADERS = 65536
_LARGEST_MESSAGE = 4 << 20
_LARGEST_ANSWER = 65535  # fits the window that every stream begins with
_WINDOW = 2**31 - 1
_REFILL = 2**30
_MESSAGES_WAITING = 16  # of one client stream, before its connection is read no further
_KNOWN_BLOCKS = 1024


class _Broken(Exception):
    """The peer does not keep to the protocol: the connection ends."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return b"".join(
        (
            len(payload).to_bytes(3, "big"),
            bytes((kind, flags)),
            stream.to_bytes(4, "big"),
            payload,
        )
    )


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field as HPACK's literal without indexing; both parts are short."""
    return b"".join((b"\0", bytes((len(name),)), name, bytes((len(value),)), value))


_SETTINGS_FRAME = _frame(
    _SETTINGS,
    0,
    0,
    # Without a table a header block means the same whenever it comes, so it is decoded once.
    struct.pack(">HI", _HEADER_TABLE_SIZE, 0)
    + struct.pack(">HI", _INITIAL_WINDOW_SIZE, _WINDOW)
    + struct.pack(">HI", _MAX_CONCURRENT_STREAMS, _WINDOW),
) + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _WINDOW - 65535))
_ANSWER_HEADERS = b"\x88" + _literal(b"content-type", b"application/grpc")  # \x88 is :status 200
_OK_TRAILERS = _literal(b"grpc-status", b"0")


class _Stream:
    __slots__ = ("body", "ended", "messages", "method", "size", "task")

    def __init__(self, method: Unary | None) -> None:
        self.method = method
        self.body: list[bytes] = []
        self.size = 0
        self.ended = False
        self.messages: asyncio.Queue[bytes | None] | None = None
        self.task: asyncio.Future[bytes] | None = None

    def abandon(self) -> None:
        """The client is gone. What it had sent of a stream is still to be consumed."""
        if self.messages is not None:
            if not self.ended:
                self.ended = True
                self.messages.put_nowait(None)
        elif self.task is not None:
            self.task.cancel()


class _Connection(asyncio.Protocol):
    def __init__(self, server: "Server") -> None:
        self._server = server
        self._decoder = hpack.Decoder()
        self._known_blocks: dict[bytes, str] = {}
        self._buffer = b""
        self._greeted = False
        self._streams: dict[int, _Stream] = {}
        self._last_stream = 0
        self._block: tuple[int, int, bytes] | None = None  # header block still to be continued
        self._received = 0
        self._window = 65535
        self._stream_window = 65535
        self._blocked: deque[tuple[int, bytes]] = deque()  # answers that the window has no room for
        self._out: list[bytes] = []
        self._transport: asyncio.Transport

    # --- what asyncio tells us ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)
        self._transport.write(_SETTINGS_FRAME)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        for stream in self._streams.values():
            stream.abandon()
        self._streams.clear()
        self._server.call_ended()

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        try:
            self._buffer = data[self._take_frames(data) :]
        except _Broken as error:
            log.warning("connection broken", extra={"cause": str(error)})
            self._send(_frame(_GOAWAY, 0, 0, struct.pack(">II", self._last_stream, error.code)))
            self._flush()
            self._transport.close()
            return
        self._flush()

    # --- frames in ---

    def _take_frames(self, data: bytes) -> int:
        """Handle every whole frame; how many bytes that were."""
        at, size = 0, len(data)
        if not self._greeted:
            if data[:24] != _PREFACE[:size]:
                raise _Broken(_PROTOCOL_ERROR, "this is not HTTP/2")
            if size < 24:
                return 0
            at, self._greeted = 24, True
        while size - at >= 9:
            length = int.from_bytes(data[at : at + 3], "big")
            if length > _LARGEST_FRAME:
                raise _Broken(_FRAME_SIZE_ERROR, "a frame is larger than was agreed")
            end = at + 9 + length
            if end > size:
                break
            stream = int.from_bytes(data[at + 5 : at + 9], "big") & 0x7FFFFFFF
            self._take(data[at + 3], data[at + 4], stream, data[at + 9 : end])
            at = end
        return at

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is not None and kind != _CONTINUATION:
            raise _Broken(_PROTOCOL_ERROR, "a header block was not continued")
        if kind == _DATA:
            self._take_data(flags, stream, payload)
        elif kind == _HEADERS:
            block = _unpadded(flags, payload)
            self._take_block(flags, stream, block[5:] if flags & _PRIORITY else block)
        elif kind == _CONTINUATION:
            if self._block is None or self._block[1] != stream:
                raise _Broken(_PROTOCOL_ERROR, "a continuation of nothing")
            first, _, begun = self._block
            self._take_block(first | (flags & _END_HEADERS), stream, begun + payload)
        elif kind == _WINDOW_UPDATE:
            # Answers fit the window that a stream begins with; only the connection's can run out.
            if stream == 0:
                self._window += _uint32(payload)
                self._send_blocked()
        elif kind == _RST_STREAM:
            self._forget(stream)
        elif kind == _PING:
            if not flags & _ACK:
                self._send(_frame(_PING, _ACK, 0, payload))
        elif kind == _SETTINGS and not flags & _ACK:
            self._take_settings(payload)

    def _take_settings(self, payload: bytes) -> None:
        if len(payload) % 6:
            raise _Broken(_FRAME_SIZE_ERROR, "settings of a strange size")
        for name, value in struct.iter_unpack(">HI", payload):
            if name == _INITIAL_WINDOW_SIZE:
                self._stream_window = value
        self._send(_frame(_SETTINGS, _ACK, 0))

    def _take_block(self, flags: int, stream: int, block: bytes) -> None:
        if not flags & _END_HEADERS:
            if len(block) > _LARGEST_HEADERS:
                raise _Broken(_PROTOCOL_ERROR, "headers are too large")
            self._block = (flags, stream, block)
            return
        self._block = None
        path = self._path(block)
        if stream in self._streams:  # trailers
            self._end(stream, self._streams[stream])
            return
        if stream <= self._last_stream or not stream % 2:
            raise _Broken(_PROTOCOL_ERROR, "a stream of an impossible number")
        self._last_stream = stream
        self._open(stream, path)
        if flags & _END_STREAM and stream in self._streams:
            self._end(stream, self._streams[stream])

    def _path(self, block: bytes) -> str:
        known = self._known_blocks.get(block)
        if known is not None:
            return known
        try:
            headers = self._decoder.decode(block, raw=True)
        except hpack.HPACKError as error:
            raise _Broken(_PROTOCOL_ERROR, "headers that cannot be decoded") from error
        found = dict(headers).get(b":path", b"")
        path = found.decode("ascii", "replace") if isinstance(found, bytes) else found
        # Only where the peer uses no table does the same block always mean the same.
        if self._decoder.header_table_size == 0:
            if len(self._known_blocks) >= _KNOWN_BLOCKS:
                self._known_blocks.clear()
            self._known_blocks[block] = path
        return path

    def _take_data(self, flags: int, number: int, payload: bytes) -> None:
        self._received += len(payload)
        if self._received >= _REFILL:
            self._send(_frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", self._received)))
            self._received = 0
        stream = self._streams.get(number)
        if stream is None:  # it was answered or cancelled; the rest is on its way
            return
        stream.body.append(_unpadded(flags, payload))
        stream.size += len(payload)
        if stream.messages is not None:
            self._pass_messages(number, stream, stream.messages)
        elif stream.size > _LARGEST_MESSAGE + 5:
            self._fail(number, RpcError(Status.RESOURCE_EXHAUSTED, "the message is too large"))
            return
        if flags & _END_STREAM:
            self._end(number, stream)

    # --- calls ---

    def _open(self, number: int, path: str) -> None:
        method = self._server.methods.get(path)
        consume = self._server.streams.get(path)
        if method is None and consume is None:
            self._fail(number, RpcError(Status.UNIMPLEMENTED, "no such method"))
            return
        stream = self._streams[number] = _Stream(method)
        if consume is not None:
            stream.messages = asyncio.Queue()
            self._run(number, stream, consume(self._messages(stream.messages)))

    def _end(self, number: int, stream: _Stream) -> None:
        """The request is complete."""
        stream.ended = True
        if stream.messages is not None:
            stream.messages.put_nowait(None)
        elif stream.method is not None:
            self._call(number, stream, stream.method)

    def _call(self, number: int, stream: _Stream, method: Unary) -> None:
        try:
            answer = method(_message(b"".join(stream.body)))
        except Exception as error:
            self._fail(number, error)
            return
        if isinstance(answer, bytes):
            self._answer(number, answer)
        else:
            self._run(number, stream, answer)

    def _run(self, number: int, stream: _Stream, call: Awaitable[bytes]) -> None:
        def done(task: "asyncio.Future[bytes]") -> None:
            self._server.running.discard(task)
            self._server.call_ended()
            error = None if task.cancelled() else task.exception()
            if task.cancelled() or self._streams.get(number) is not stream:
                return
            if error is not None:
                self._fail(number, error)
            else:
                self._answer(number, task.result())

        stream.task = asyncio.ensure_future(call)
        self._server.running.add(stream.task)
        stream.task.add_done_callback(done)

    def _pass_messages(
        self, number: int, stream: _Stream, waiting: "asyncio.Queue[bytes | None]"
    ) -> None:
        """Hand the whole messages in the body of a client stream to its consumer."""
        body, at = b"".join(stream.body), 0
        while len(body) - at >= 5:
            end = at + 5 + int.from_bytes(body[at + 1 : at + 5], "big")
            if end - at > _LARGEST_MESSAGE + 5:
                self._fail(number, RpcError(Status.RESOURCE_EXHAUSTED, "the message is too large"))
                return
            if end > len(body):
                break
            waiting.put_nowait(body[at:end])
            at = end
        stream.body = [body[at:]] if at < len(body) else []
        if waiting.qsize() > _MESSAGES_WAITING:
            self._transport.pause_reading()
        if stream.size >= _REFILL:
            self._send(_frame(_WINDOW_UPDATE, 0, number, struct.pack(">I", stream.size)))
            stream.size = 0

    async def _messages(self, waiting: "asyncio.Queue[bytes | None]") -> AsyncIterator[bytes]:
        while (message := await waiting.get()) is not None:
            yield _message(message)
            if waiting.qsize() <= _MESSAGES_WAITING and not self._transport.is_closing():
                self._transport.resume_reading()

    def _forget(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is not None:
            stream.abandon()

    # --- answers out ---

    def _answer(self, number: int, message: bytes) -> None:
        if len(message) + 5 > min(_LARGEST_ANSWER, self._stream_window):
            self._fail(number, RpcError(Status.INTERNAL, "the answer is too large"))
            return
        body = b"".join((b"\0", len(message).to_bytes(4, "big"), message))
        if self._blocked or len(body) > self._window:
            self._blocked.append((number, body))
        else:
            self._send_answer(number, body)

    def _send_answer(self, number: int, body: bytes) -> None:
        self._window -= len(body)
        self._send(_frame(_HEADERS, _END_HEADERS, number, _ANSWER_HEADERS))
        for at in range(0, len(body), _LARGEST_FRAME):
            self._send(_frame(_DATA, 0, number, body[at : at + _LARGEST_FRAME]))
        self._send(_frame(_HEADERS, _END_HEADERS | _END_STREAM, number, _OK_TRAILERS))
        self._close(number)

    def _send_blocked(self) -> None:
        while self._blocked and len(self._blocked[0][1]) <= self._window:
            number, body = self._blocked.popleft()
            if number in self._streams:
                self._send_answer(number, body)

    def _fail(self, number: int, error: BaseException) -> None:
        if not isinstance(error, RpcError):
            log.error("call failed", exc_info=error)
            error = RpcError(Status.INTERNAL, "internal error")
        trailers = (
            _ANSWER_HEADERS
            + _literal(b"grpc-status", str(int(error.status)).encode())
            + _literal(b"grpc-message", error.message.encode("ascii", "replace")[:100])
        )
        self._send(_frame(_HEADERS, _END_HEADERS | _END_STREAM, number, trailers))
        self._close(number)

    def _close(self, number: int) -> None:
        """The answer is out. Where the request still comes, say that it need not (RFC 9113 8.1)."""
        stream = self._streams.pop(number, None)
        if stream is not None and not stream.ended:
            self._send(_frame(_RST_STREAM, 0, number, struct.pack(">I", _NO_ERROR)))
            stream.abandon()
        self._server.call_ended()

    def _send(self, data: bytes) -> None:
        """Answers of one turn of the event loop leave in one write."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        if self._out and not self._transport.is_closing():
            self._transport.write(b"".join(self._out))
        self._out.clear()

    # --- leaving ---

    @property
    def busy(self) -> bool:
        return bool(self._streams)

    def say_goodbye(self) -> None:
        self._send(_frame(_GOAWAY, 0, 0, struct.pack(">II", self._last_stream, _NO_ERROR)))

    def close(self) -> None:
        self._flush()
        self._transport.close()


class Server:
    """
    Serves `methods` and `streams`, by their gRPC paths, and the standard health check.

    Health says SERVING from `start` until `stop`.
    """

    def __init__(
        self, methods: Mapping[str, Unary], streams: Mapping[str, ClientStream] | None = None
    ) -> None:
        self.methods: dict[str, Unary] = {**methods, "/grpc.health.v1.Health/Check": self._health}
        self.streams = dict(streams or {})
        self.connections: set[_Connection] = set()
        self.running: set[asyncio.Future[bytes]] = set()
        self._serving = False
        self._idle = asyncio.Event()
        self._listener: asyncio.Server

    async def start(self, path: str) -> None:
        """Listen on a unix socket for this user alone; one that is left over is replaced."""
        with suppress(FileNotFoundError):
            os.unlink(path)
        loop = asyncio.get_running_loop()
        before = os.umask(0o177)
        try:
            self._listener = await loop.create_unix_server(lambda: _Connection(self), path)
        finally:
            os.umask(before)
        self._serving = True

    async def stop(self, grace: float) -> None:
        """Take no more connections, let calls end for up to `grace` seconds, then hang up."""
        self._serving = False
        self._listener.close()
        for connection in self.connections:
            connection.say_goodbye()
        await self._until(lambda: not any(one.busy for one in self.connections), grace)
        for connection in tuple(self.connections):
            connection.close()
        # What clients had sent before they were cut is still being consumed.
        await self._until(lambda: not self.connections and not self.running, grace)
        for call in tuple(self.running):
            call.cancel()

    async def _until(self, done: Callable[[], bool], seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not done():
                    self._idle.clear()
                    await self._idle.wait()

    def call_ended(self) -> None:
        self._idle.set()

    def _health(self, _: bytes) -> bytes:
        """A HealthCheckResponse: field 1 is SERVING (1) or NOT_SERVING (2)."""
        return b"\x08\x01" if self._serving else b"\x08\x02"


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise _Broken(_PROTOCOL_ERROR, "a frame that is all padding")
    return payload[1 : len(payload) - payload[0]]


def _uint32(payload: bytes) -> int:
    if len(payload) != 4:
        raise _Broken(_FRAME_SIZE_ERROR, "a window update of a strange size")
    return int.from_bytes(payload, "big") & 0x7FFFFFFF


def _message(body: bytes) -> bytes:
    """What is inside gRPC's five bytes of framing."""
    if len(body) < 5 or int.from_bytes(body[1:5], "big") != len(body) - 5:
        raise RpcError(Status.INVALID_ARGUMENT, "not one whole message")
    if body[0]:
        raise RpcError(Status.UNIMPLEMENTED, "compressed messages are not understood")
    return body[5:]
