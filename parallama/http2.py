"""The server's side of HTTP/2 (RFC 9113), as far as gRPC behind an Envoy needs it."""

import asyncio
import logging
import os
import struct
from contextlib import suppress
from functools import partial
from typing import Protocol, cast

import hpack

log = logging.getLogger(__name__)

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS = 0, 1, 2, 3, 4
_PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 5, 6, 7, 8, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_PLAIN = _END_HEADERS | _PADDED | _WITH_PRIORITY  # headers in one frame have the first alone
_HEADER_TABLE_SIZE, _MAX_STREAMS, _INITIAL_WINDOW, _MAX_FRAME = 1, 3, 4, 5
_NO_ERROR, _PROTOCOL_ERROR, _FLOW_CONTROL_ERROR, _STREAM_CLOSED = 0, 1, 3, 5
_FRAME_SIZE_ERROR, _REFUSED_STREAM, _COMPRESSION_ERROR, _ENHANCE_YOUR_CALM = 6, 7, 9, 11

# Frames that have one size, and those that are about one stream or about none.
_SIZES = {_PRIORITY: 5, _RST_STREAM: 4, _PING: 8, _WINDOW_UPDATE: 4}
_OF_A_STREAM = frozenset((_PRIORITY, _RST_STREAM))
_OF_THE_CONNECTION = frozenset((_SETTINGS, _PING, _GOAWAY))

_LARGEST_READ = 262144
_LARGEST_FRAME = 16384
_LARGEST_HEADERS = 65536
_LARGEST_INT = 2**31 - 1
_FIRST_WINDOW = 65535  # of every connection and stream, until a peer says otherwise
_MOST_STREAMS = 10_000
_KNOWN_BLOCKS, _LARGEST_KNOWN_BLOCK = 1024, 1024
_LATELY = 1000  # answers that a reset may still cross: all that can be on their way

STREAM_WINDOW = (4 << 20) + 6
"""What a stream may send before `Stream.grant` gives it more."""

_WINDOW = 64 << 20  # what all requests of a connection may hold that are not yet dealt with
_REFILL = 1 << 20  # of which the peer hears in portions of this size

_HEAD = struct.Struct(">HBBBI")  # the length of a frame is 24 bits: two and one of these


class _Broken(Exception):
    """The peer does not keep to the protocol: the connection ends."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def _frame(kind: int, flags: int, stream: int, payload: bytes | memoryview = b"") -> bytes:
    size = len(payload)
    return _HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream) + payload


def _grant(stream: int, size: int) -> bytes:
    return _frame(_WINDOW_UPDATE, 0, stream, size.to_bytes(4, "big"))


_GREETING = _frame(
    _SETTINGS,
    0,
    0,
    # Without a table a header block means the same whenever it comes, so it is decoded once.
    struct.pack(">HI", _HEADER_TABLE_SIZE, 0)
    + struct.pack(">HI", _MAX_STREAMS, _MOST_STREAMS)
    + struct.pack(">HI", _INITIAL_WINDOW, STREAM_WINDOW),
) + _grant(0, _WINDOW - _FIRST_WINDOW)


def field(name: bytes, value: bytes) -> bytes:
    """A header field for an answer. Each part is shorter than 127 bytes."""
    return b"".join((b"\0", bytes((len(name),)), name, bytes((len(value),)), value))


STATUS_200 = b"\x20\x88"
"""
What the header block of every answer begins with.

\\x88 is the field. \\x20 says that our table of fields is empty: a peer that allows us none has to
be told so first.
"""


class Stream:
    """One request and its answer. A subclass knows what is in them."""

    connection: "Connection"
    number: int
    open = True  # until it is answered or reset, or the connection is lost
    ended = False  # the request is complete
    held = 0  # bytes of the request that the peer may not send again yet
    credit = 0  # what the peer granted beyond the initial window, less what was sent
    unsent = memoryview(b"")  # of the answer, for lack of window
    trailers = b""
    wants_untaken = False

    def opened(self) -> None:
        """The connection is known now, and it may be answered."""

    def take(self, data: bytes) -> None:
        """A part of the request; the last one if `ended`."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""

    def untaken(self) -> None:
        """The answer was sent, and crossed a reset: the peer has thrown it away."""

    def grant(self, size: int) -> None:
        """So many bytes of the request are dealt with: the peer may send as many again."""
        if self.open:
            self.held -= size
            self.connection.release(size)
            if not self.ended:
                self.connection.send(_grant(self.number, size))


class Host(Protocol):
    """What connections belong to."""

    connections: "set[Connection]"
    serving: bool

    def stream(self, path: str) -> Stream:
        """A new one for each request."""
        ...

    def changed(self) -> None:
        """A connection is lost, or one that drains is nearer to its end."""
        ...


class Connection(asyncio.Protocol):
    def __init__(self, host: Host) -> None:
        self.streams: dict[int, Stream] = {}
        self._host = host
        self._decoder = hpack.Decoder(_LARGEST_HEADERS)
        self._paths: dict[bytes, str] = {}  # by header block
        self._block: tuple[int, int, bytearray] | None = None  # that is still to be continued
        self._buffer = b""
        self._greeted = False
        self._answered_lately: dict[int, Stream] = {}
        self._last_stream = 0
        self._room = _WINDOW  # what the peer may send ...
        self._released = 0  # ... and may send again, but was not told of yet
        self._window = self._initial_window = _FIRST_WINDOW  # what we may send
        self._blocked: dict[int, Stream] = {}
        self._out: list[bytes] = []
        self._reading = False
        self._draining = False
        self._drain_heard = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport

    # --- what asyncio tells us ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._host.connections.add(self)
        self._transport.write(_GREETING)
        if not self._host.serving:
            self.hang_up()

    def data_received(self, data: bytes) -> None:
        self._reading = True
        try:
            data = self._buffer + data if self._buffer else data
            self._buffer = data[self._take_frames(data) :]
        except _Broken as error:
            log.warning("connection broken", extra={"cause": str(error)})
            self.hang_up(error.code)
        finally:
            self._reading = False
            self._flush()

    def pause_writing(self) -> None:
        """A peer that does not read its answers gets no more of them."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._take_last_words()
        self._drop_streams()
        self._host.connections.discard(self)
        self._host.changed()

    def _take_last_words(self) -> None:
        """
        A peer that was killed may have spoken before. An event loop that cannot write to it any
        more reads no more of it either.
        """
        socket, words = self._transport.get_extra_info("socket").fileno(), list[bytes]()
        with suppress(OSError):
            words.extend(iter(partial(os.read, socket, _LARGEST_READ), b""))
        self.data_received(b"".join(words))

    # --- frames in ---

    def _take_frames(self, data: bytes) -> int:
        """Handle every whole frame; how many bytes that were."""
        at, size = 0, len(data)
        if not self._greeted:
            if data[:24] != _PREFACE[:size]:
                raise _Broken(_PROTOCOL_ERROR, "this is not HTTP/2")
            if size < 24 + 9:
                return 0
            if data[27] != _SETTINGS or data[28] & _ACK:
                raise _Broken(_PROTOCOL_ERROR, "the first frame is not settings")
            at, self._greeted = 24, True
        while size - at >= 9:
            high, low, kind, flags, number = _HEAD.unpack_from(data, at)
            length = high << 8 | low
            if length > _LARGEST_FRAME:
                raise _Broken(_FRAME_SIZE_ERROR, "a frame is larger than was agreed")
            end = at + 9 + length
            if end > size:
                break
            payload = data[at + 9 : end]
            if self._block is None and kind == _DATA:
                self._take_data(flags, number & _LARGEST_INT, payload)
            elif self._block is None and kind == _HEADERS and flags & _PLAIN == _END_HEADERS:
                self._take_block(flags, number & _LARGEST_INT, payload)
            else:
                self._take(kind, flags, number & _LARGEST_INT, payload)
            at = end
        return at

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block is not None and kind != _CONTINUATION:
            raise _Broken(_PROTOCOL_ERROR, "a header block was not continued")
        if kind == _HEADERS:
            self._take_headers(flags, number, payload)
        elif kind == _CONTINUATION:
            self._take_continuation(flags, number, payload)
        else:
            self._take_control(kind, flags, number, payload)

    def _take_data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self._room -= size
        if self._room < 0:
            raise _Broken(_FLOW_CONTROL_ERROR, "more than the connection's window")
        stream = self.streams.get(number)
        if stream is None:
            if number == 0 or number > self._last_stream:
                raise _Broken(_PROTOCOL_ERROR, "data of a stream that was not opened")
            self.release(size)  # it was answered or reset, and this was on its way
            return
        if stream.ended:
            raise _Broken(_STREAM_CLOSED, "data after the end")
        stream.held += size
        if stream.held > STREAM_WINDOW:
            raise _Broken(_FLOW_CONTROL_ERROR, "more than the stream's window")
        if flags & _PADDED:
            payload = _unpadded(flags, payload)
            stream.grant(size - len(payload))
        if flags & _END_STREAM:
            stream.ended = True
        stream.take(payload)

    def _take_headers(self, flags: int, number: int, payload: bytes) -> None:
        if flags & (_PADDED | _WITH_PRIORITY):
            payload = _unpadded(flags, payload)
            if flags & _WITH_PRIORITY:
                if len(payload) < 5:
                    raise _Broken(_FRAME_SIZE_ERROR, "a priority that is not whole")
                payload = payload[5:]
        if flags & _END_HEADERS:
            self._take_block(flags, number, payload)
        else:
            self._block = (flags, number, bytearray(payload))

    def _take_continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self._block is None or self._block[1] != number:
            raise _Broken(_PROTOCOL_ERROR, "a continuation of nothing")
        begun_with, _, block = self._block
        block += payload
        if len(block) > _LARGEST_HEADERS:
            raise _Broken(_ENHANCE_YOUR_CALM, "headers are too large")
        if flags & _END_HEADERS:
            self._block = None
            self._take_block(begun_with, number, bytes(block))

    def _take_block(self, flags: int, number: int, block: bytes) -> None:
        path = self._paths.get(block)
        if path is None:
            path = self._path(block)  # of every block, for it may change the table of fields
        if number > self._last_stream:
            if number % 2 == 0:
                raise _Broken(_PROTOCOL_ERROR, "a stream of an even number")
            self._last_stream = number
            if len(self.streams) >= _MOST_STREAMS:
                self._reset(number, _REFUSED_STREAM)
                return
            stream = self.streams[number] = self._host.stream(path)
            stream.connection, stream.number = self, number
            stream.ended = bool(flags & _END_STREAM)
            stream.opened()
            if stream.ended and stream.open:
                stream.take(b"")
        elif number == 0:
            raise _Broken(_PROTOCOL_ERROR, "headers of no stream")
        elif number in self.streams:
            self._take_trailers(self.streams[number], flags)
        else:
            self._reset(number, _STREAM_CLOSED)

    def _take_trailers(self, stream: Stream, flags: int) -> None:
        if stream.ended:
            raise _Broken(_STREAM_CLOSED, "trailers after the end")
        if not flags & _END_STREAM:
            raise _Broken(_PROTOCOL_ERROR, "trailers that end nothing")
        stream.ended = True
        stream.take(b"")

    def _path(self, block: bytes) -> str:
        try:
            fields = dict(self._decoder.decode(block, raw=True))
        except hpack.HPACKError as error:
            raise _Broken(_COMPRESSION_ERROR, "headers that cannot be decoded") from error
        path = fields.get(b":path", b"").decode("ascii", "replace")
        # Only while the peer keeps no table, a block changes nothing and always means the same.
        if self._decoder.header_table_size or len(self._paths) >= _KNOWN_BLOCKS:
            self._paths.clear()
        if not self._decoder.header_table_size and len(block) <= _LARGEST_KNOWN_BLOCK:
            self._paths[block] = path
        return path

    def _take_control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != _SIZES.get(kind, len(payload)):
            raise _Broken(_FRAME_SIZE_ERROR, "a frame of a strange size")
        if kind in (_OF_THE_CONNECTION if number else _OF_A_STREAM):
            raise _Broken(_PROTOCOL_ERROR, "a frame of the wrong stream")
        if kind == _PING:
            self._take_ping(flags, payload)
        elif kind == _SETTINGS:
            self._take_settings(flags, payload)
        elif kind in (_WINDOW_UPDATE, _RST_STREAM):
            if number > self._last_stream:
                raise _Broken(_PROTOCOL_ERROR, "a stream that was not opened")
            if kind == _WINDOW_UPDATE:
                self._take_window_update(number, int.from_bytes(payload, "big") & _LARGEST_INT)
            elif number in self.streams:
                self._drop(self.streams[number])
            elif number in self._answered_lately:
                self._answered_lately.pop(number).untaken()
        elif kind == _PUSH_PROMISE:
            raise _Broken(_PROTOCOL_ERROR, "a client cannot push")

    def _take_ping(self, flags: int, payload: bytes) -> None:
        if not flags & _ACK:
            self.send(_frame(_PING, _ACK, 0, payload))
        elif self._draining:
            self._drain_heard = True
            self._host.changed()

    def _take_settings(self, flags: int, payload: bytes) -> None:
        if len(payload) % 6 or (flags & _ACK and payload):
            raise _Broken(_FRAME_SIZE_ERROR, "settings of a strange size")
        if flags & _ACK:
            return
        for name, value in struct.iter_unpack(">HI", payload):
            if name == _INITIAL_WINDOW:
                self._initial_window = value
                credit = max((stream.credit for stream in self.streams.values()), default=0)
                _check_window(value + max(credit, 0))
            elif name == _MAX_FRAME and not _LARGEST_FRAME <= value < 2**24:
                raise _Broken(_PROTOCOL_ERROR, "an impossible size of frames")
        self.send(_frame(_SETTINGS, _ACK, 0))
        self._push_blocked()

    def _take_window_update(self, number: int, size: int) -> None:
        if size == 0:
            raise _Broken(_PROTOCOL_ERROR, "a window that grows by nothing")
        if number == 0:
            self._window += size
            _check_window(self._window)
            self._push_blocked()
        elif (stream := self.streams.get(number)) is not None:
            stream.credit += size
            _check_window(self._initial_window + stream.credit)
            if stream.unsent:
                self._push(stream)

    # --- answers out ---

    def send(self, data: bytes) -> None:
        """What is sent in one turn of the event loop leaves in one write."""
        if not self._out and not self._reading:
            self._loop.call_soon(self._flush)
        self._out.append(data)

    def answer(self, stream: Stream, headers: bytes, body: bytes, trailers: bytes) -> None:
        """An answer with a body, once, for a stream that is open."""
        number, size = stream.number, len(body)
        if size <= min(self._window, self._initial_window + stream.credit, _LARGEST_FRAME):
            self._window -= size
            self.send(
                b"".join(
                    (
                        _HEAD.pack(0, len(headers), _HEADERS, _END_HEADERS, number),
                        headers,
                        _HEAD.pack(size >> 8, size & 0xFF, _DATA, 0, number),
                        body,
                        _HEAD.pack(0, len(trailers), _HEADERS, _END_HEADERS | _END_STREAM, number),
                        trailers,
                    )
                )
            )
            self._answered(stream)
            return
        self.send(_frame(_HEADERS, _END_HEADERS, number, headers))
        stream.unsent, stream.trailers = memoryview(body), trailers
        self._push(stream)

    def _push(self, stream: Stream) -> None:
        """Send of an answer what the windows have room for."""
        while stream.unsent:
            room = min(self._window, self._initial_window + stream.credit, _LARGEST_FRAME)
            if room <= 0:
                self._blocked[stream.number] = stream
                return
            part, stream.unsent = stream.unsent[:room], stream.unsent[room:]
            self._window -= len(part)
            stream.credit -= len(part)
            self.send(_frame(_DATA, 0, stream.number, part))
        self.end_answer(stream, stream.trailers)

    def _push_blocked(self) -> None:
        for stream in tuple(self._blocked.values()):
            if self._window <= 0:
                break
            self._push(stream)

    def end_answer(self, stream: Stream, headers: bytes) -> None:
        """What an answer ends with, or all of it, for a stream that is open."""
        self.send(_frame(_HEADERS, _END_HEADERS | _END_STREAM, stream.number, headers))
        self._answered(stream)

    def _answered(self, stream: Stream) -> None:
        self._close(stream)
        if not stream.ended:  # the rest of the request need not come (RFC 9113, 8.1)
            self._reset(stream.number, _NO_ERROR)
        if stream.wants_untaken:
            self._answered_lately[stream.number] = stream
            if len(self._answered_lately) > _LATELY:
                del self._answered_lately[next(iter(self._answered_lately))]

    def _reset(self, number: int, code: int) -> None:
        self.send(_frame(_RST_STREAM, 0, number, code.to_bytes(4, "big")))

    def _close(self, stream: Stream) -> None:
        stream.open = False
        del self.streams[stream.number]
        self._blocked.pop(stream.number, None)
        self.release(stream.held)
        if self._draining:
            self._host.changed()

    def release(self, size: int) -> None:
        """So many bytes of requests are held no longer."""
        self._released += size
        if self._released >= _REFILL:
            self._room += self._released
            self.send(_grant(0, self._released))
            self._released = 0

    def _flush(self) -> None:
        if self._out and not self._transport.is_closing():
            self._transport.write(b"".join(self._out))
        self._out.clear()

    # --- leaving ---

    @property
    def drained(self) -> bool:
        """The peer knows that we leave, and nothing of it is under way."""
        return not self.streams and (self._drain_heard or not self._greeted)

    def drain(self) -> None:
        """Ask for no more streams. Those that come before the peer hears of it are served."""
        self._draining = True
        self._say_goodbye(_LARGEST_INT, _NO_ERROR)
        self.send(_frame(_PING, 0, 0, bytes(8)))

    def hang_up(self, code: int = _NO_ERROR) -> None:
        """Cancel what runs, and close when the peer took what was sent to it."""
        self._say_goodbye(self._last_stream, code)
        self._flush()
        self._transport.close()
        self._drop_streams()

    def abort(self) -> None:
        self._transport.abort()

    def _say_goodbye(self, last_stream: int, code: int) -> None:
        self.send(_frame(_GOAWAY, 0, 0, struct.pack(">II", last_stream, code)))

    def _drop_streams(self) -> None:
        for stream in tuple(self.streams.values()):
            self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        self._close(stream)
        stream.cancel()


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & _PADDED:
        return payload
    if not payload:
        raise _Broken(_FRAME_SIZE_ERROR, "padding of no size")
    if payload[0] >= len(payload):
        raise _Broken(_PROTOCOL_ERROR, "a frame that is all padding")
    return payload[1 : len(payload) - payload[0]]


def _check_window(size: int) -> None:
    if size > _LARGEST_INT:
        raise _Broken(_FLOW_CONTROL_ERROR, "a window larger than there can be")
