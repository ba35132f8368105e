"""The gRPC server frame by frame: what a peer may send, and what it must not."""

import asyncio
import gc
import logging
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama import http2, rpc
from tests.examples import examples

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE = 0, 1, 2, 3, 4, 5
PING, GOAWAY, WINDOW_UPDATE, CONTINUATION, UNKNOWN = 6, 7, 8, 9, 0xBE
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED = 0, 1, 3, 5
FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 6, 7, 8, 9, 11
TABLE_SIZE, INITIAL_WINDOW, MAX_FRAME = 1, 4, 5
OK, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED = 0, 3, 8, 12
LARGEST_INT = 2**31 - 1
SERVING = b"\x08\x01"  # as a HealthCheckResponse


# --- what a client writes ---


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def setting(name: int, value: int) -> bytes:
    return frame(SETTINGS, 0, 0, struct.pack(">HI", name, value))


def update(stream: int, size: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, u32(size))


def reset(stream: int) -> bytes:
    return frame(RST_STREAM, 0, stream, u32(CANCEL))


def fields(path: str) -> list[tuple[str, str]]:
    return [(":method", "POST"), (":path", path), ("te", "trailers")]


def block(path: str) -> bytes:
    """A header block that leaves the table of fields as it is."""
    return hpack.Encoder().encode(hpack.NeverIndexedHeaderTuple(*at) for at in fields(path))


def framed(message: bytes) -> bytes:
    return b"\0" + u32(len(message)) + message


def opened(stream: int, path: str = "/t/Echo", flags: int = 0) -> bytes:
    return frame(HEADERS, END_HEADERS | flags, stream, block(path))


def body(stream: int, content: bytes, flags: int = END_STREAM) -> bytes:
    """In frames, the last of which has `flags`."""
    *first, last = [content[at : at + 16384] for at in range(0, len(content), 16384)] or [b""]
    return b"".join(frame(DATA, 0, stream, part) for part in first) + frame(
        DATA, flags, stream, last
    )


def call(stream: int, message: bytes = b"hi", path: str = "/t/Echo") -> bytes:
    return opened(stream, path) + body(stream, framed(message))


GREETING = PREFACE + frame(SETTINGS, 0, 0)


# --- and reads ---


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


class Answer(NamedTuple):
    status: int
    message: bytes


class Peer:
    """One connection, seen from the client's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = hpack.Decoder()
        self._bodies: dict[int, bytes] = {}
        self.answers: dict[int, Answer] = {}
        self.granted = 0  # to the connection

    def send(self, *words: bytes) -> None:
        self._writer.write(b"".join(words))

    async def drain(self) -> None:
        await self._writer.drain()

    async def frame(self) -> Frame:
        """The next one. What belongs to answers is put together on the way."""
        head = await self._reader.readexactly(9)
        length = int.from_bytes(head[:3], "big")
        kind, flags, stream = struct.unpack_from(">BBI", head, 3)
        seen = Frame(kind, flags, stream, await self._reader.readexactly(length))
        if kind == HEADERS:
            found = dict(self._decoder.decode(seen.payload))
            assert flags & END_HEADERS
            assert found.get(":status", "200") == "200"
            if flags & END_STREAM:
                message = self._bodies.pop(stream, framed(b""))
                assert message == framed(message[5:])
                self.answers[stream] = Answer(int(found["grpc-status"]), message[5:])
            else:
                assert found["content-type"] == "application/grpc"
        elif kind == DATA:
            assert length <= 16384
            self._bodies[stream] = self._bodies.get(stream, b"") + seen.payload
        elif kind == WINDOW_UPDATE and stream == 0:
            self.granted += int.from_bytes(seen.payload, "big")
        return seen

    async def until(self, kind: int, flags: int = 0) -> Frame:
        """The next frame of a kind."""
        while (seen := await self.frame()).kind != kind or seen.flags & flags != flags:
            pass
        return seen

    async def answered(self, *streams: int) -> list[Answer]:
        while not self.answers.keys() >= set(streams):
            await self.frame()
        return [self.answers[stream] for stream in streams]

    async def heard(self) -> None:
        """Return when all that was sent has been handled, and what came of it has come back."""
        self.send(frame(PING, 0, 0, b"barrier!"))
        while (await self.until(PING, ACK)).payload != b"barrier!":
            pass

    async def part(self, stream: int) -> bytes:
        """What has come of an answer that is not whole."""
        await self.heard()
        return self._bodies.get(stream, b"")

    async def goodbye(self) -> tuple[int, int]:
        """The last stream and the code of the GOAWAY after which the server hung up."""
        seen = await self.until(GOAWAY)
        assert await self._reader.read() == b""
        last, code = struct.unpack_from(">II", seen.payload)
        return last, code

    async def end(self) -> None:
        """Say that this was all, and wait until the server has hung up."""
        self._writer.write_eof()
        await self._reader.read()

    async def close(self) -> None:
        self._writer.close()
        with suppress(ConnectionError):  # the server was quicker
            await self._writer.wait_closed()


class Wire:
    """A server with a few methods, and what happens in them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.errors: list[dict[str, Any]] = []  # that reached the event loop
        self.begun = asyncio.Event()  # of Wait
        self.go = asyncio.Event()
        self.cancelled = 0
        self.server = rpc.Server(
            {"/t/Echo": bytes, "/t/Size": self._size, "/t/Wait": self._wait},
            {"/t/Count": self._count, "/t/Stuck": self._stuck},
        )

    def _size(self, message: bytes) -> bytes:
        return bytes(int(message))

    async def _wait(self, message: bytes) -> bytes:
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return message

    async def _count(self, messages: AsyncIterator[bytes]) -> bytes:
        return b"%d" % len([message async for message in messages])

    async def _stuck(self, messages: AsyncIterator[bytes]) -> bytes:
        await self.go.wait()
        return await self._count(messages)

    @asynccontextmanager
    async def peer(self, greeting: bytes = GREETING) -> AsyncIterator[Peer]:
        peer = Peer(*await asyncio.open_unix_connection(self.path))
        try:
            peer.send(greeting)
            yield peer
        finally:
            await peer.close()

    @property
    def held(self) -> int:
        """Bytes of requests that the peers were not credited for."""
        streams = (s for each in self.server.connections for s in each.streams.values())
        return sum(stream.held for stream in streams)


Story = Callable[[Wire], Awaitable[None]]


def told(story: Story) -> None:
    """In the end nothing is left of it: no stream, no task, no connection, nothing unclosed."""

    async def story_and_end() -> None:
        with tempfile.TemporaryDirectory() as folder:
            wire = Wire(f"{folder}/s")
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: wire.errors.append(context))
            await wire.server.start(wire.path)
            async with asyncio.timeout(30):
                await story(wire)
            wire.go.set()
            await wire.server.stop(5)
            assert not wire.server.connections
            assert not wire.server.tasks
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert wire.errors == []

    asyncio.run(story_and_end())


@pytest.fixture(autouse=True)
def nothing_unclosed() -> Iterator[None]:
    yield
    gc.collect()  # what is says so here, and warnings are errors


# --- what breaks a connection ---

SETTINGS_OF_ITS_OWN = setting(INITIAL_WINDOW, 100)
WAITING = call(1, path="/t/Wait")
COUNTING = opened(1, "/t/Count")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        pytest.param(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", PROTOCOL_ERROR, id="http 1"),
        pytest.param(b"\0", PROTOCOL_ERROR, id="one wrong byte"),
        pytest.param(PREFACE + frame(PING, 0, 0, bytes(8)), PROTOCOL_ERROR, id="no settings"),
        pytest.param(PREFACE + frame(SETTINGS, ACK, 0), PROTOCOL_ERROR, id="settings: only ack"),
        pytest.param(GREETING + bytes([0, 0x40, 1]) + bytes(6), FRAME_SIZE_ERROR, id="large frame"),
        # SETTINGS
        pytest.param(GREETING + frame(SETTINGS, 0, 0, bytes(5)), FRAME_SIZE_ERROR, id="settings 5"),
        pytest.param(GREETING + frame(SETTINGS, ACK, 0, bytes(6)), FRAME_SIZE_ERROR, id="ack 6"),
        pytest.param(GREETING + frame(SETTINGS, 0, 1), PROTOCOL_ERROR, id="settings of a stream"),
        pytest.param(
            GREETING + setting(INITIAL_WINDOW, 2**31), FLOW_CONTROL_ERROR, id="initial window"
        ),
        pytest.param(GREETING + setting(MAX_FRAME, 16383), PROTOCOL_ERROR, id="frames too small"),
        pytest.param(GREETING + setting(MAX_FRAME, 2**24), PROTOCOL_ERROR, id="frames too large"),
        pytest.param(
            GREETING + WAITING + update(1, LARGEST_INT - 65535) + setting(INITIAL_WINDOW, 65536),
            FLOW_CONTROL_ERROR,
            id="settings that overflow a stream's window",
        ),
        # WINDOW_UPDATE
        pytest.param(
            GREETING + frame(WINDOW_UPDATE, 0, 0, bytes(3)), FRAME_SIZE_ERROR, id="update 3"
        ),
        pytest.param(GREETING + update(0, 0), PROTOCOL_ERROR, id="update by 0"),
        pytest.param(GREETING + WAITING + update(1, 0), PROTOCOL_ERROR, id="stream update by 0"),
        pytest.param(GREETING + update(0, LARGEST_INT), FLOW_CONTROL_ERROR, id="update too large"),
        pytest.param(
            GREETING + WAITING + update(1, LARGEST_INT), FLOW_CONTROL_ERROR, id="stream update"
        ),
        pytest.param(GREETING + update(1, 1), PROTOCOL_ERROR, id="update of no stream"),
        # RST_STREAM, PRIORITY, PING, GOAWAY, PUSH_PROMISE
        pytest.param(
            GREETING + WAITING + frame(RST_STREAM, 0, 1, bytes(3)), FRAME_SIZE_ERROR, id="reset 3"
        ),
        pytest.param(GREETING + reset(0), PROTOCOL_ERROR, id="reset of 0"),
        pytest.param(GREETING + reset(1), PROTOCOL_ERROR, id="reset of no stream"),
        pytest.param(GREETING + frame(PRIORITY, 0, 1, bytes(4)), FRAME_SIZE_ERROR, id="priority 4"),
        pytest.param(GREETING + frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL_ERROR, id="priority 0"),
        pytest.param(GREETING + frame(PING, 0, 0, bytes(7)), FRAME_SIZE_ERROR, id="ping 7"),
        pytest.param(GREETING + frame(PING, 0, 1, bytes(8)), PROTOCOL_ERROR, id="ping of a stream"),
        pytest.param(GREETING + frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL_ERROR, id="goaway"),
        pytest.param(GREETING + frame(PUSH_PROMISE, 4, 1, bytes(4)), PROTOCOL_ERROR, id="push"),
        # DATA
        pytest.param(GREETING + body(0, b"x"), PROTOCOL_ERROR, id="data of 0"),
        pytest.param(GREETING + body(1, b"x"), PROTOCOL_ERROR, id="data of no stream"),
        pytest.param(GREETING + WAITING + body(1, b"x"), STREAM_CLOSED, id="data after the end"),
        pytest.param(
            GREETING + COUNTING + frame(DATA, PADDED, 1, b"\x03ab"), PROTOCOL_ERROR, id="padding"
        ),
        pytest.param(
            GREETING + COUNTING + frame(DATA, PADDED, 1), FRAME_SIZE_ERROR, id="padding of no size"
        ),
        pytest.param(
            GREETING + opened(1, "/t/Stuck") + body(1, framed(bytes(1 << 20)) * 4),
            FLOW_CONTROL_ERROR,
            id="more than the stream's window",
        ),
        # HEADERS, CONTINUATION
        pytest.param(GREETING + opened(0), PROTOCOL_ERROR, id="headers of 0"),
        pytest.param(GREETING + opened(2), PROTOCOL_ERROR, id="headers of 2"),
        pytest.param(
            GREETING + frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, bytes(4)),
            FRAME_SIZE_ERROR,
            id="priority cut",
        ),
        pytest.param(
            GREETING + frame(HEADERS, END_HEADERS | PADDED, 1, b"\x09" + block("/t/Echo")[:4]),
            PROTOCOL_ERROR,
            id="headers that are all padding",
        ),
        pytest.param(
            GREETING + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff"),
            COMPRESSION_ERROR,
            id="hpack",
        ),
        pytest.param(
            GREETING + frame(HEADERS, END_HEADERS, 1, b"\xbe"),
            COMPRESSION_ERROR,
            id="no such field",
        ),
        pytest.param(
            GREETING + WAITING + opened(1, flags=END_STREAM), STREAM_CLOSED, id="trailers after end"
        ),
        pytest.param(GREETING + COUNTING + opened(1), PROTOCOL_ERROR, id="trailers without end"),
        pytest.param(GREETING + frame(CONTINUATION, 4, 1), PROTOCOL_ERROR, id="continues nothing"),
        pytest.param(
            GREETING + frame(HEADERS, 0, 1) + frame(CONTINUATION, END_HEADERS, 3),
            PROTOCOL_ERROR,
            id="continues another",
        ),
        pytest.param(
            GREETING + frame(HEADERS, 0, 1) + frame(PING, 0, 0, bytes(8)),
            PROTOCOL_ERROR,
            id="interrupted headers",
        ),
        pytest.param(
            GREETING + frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1, bytes(16384)) * 5,
            ENHANCE_YOUR_CALM,
            id="endless headers",
        ),
    ],
)
def test_an_error_ends_its_connection_and_no_other(
    words: bytes, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as bystander, wire.peer(words) as culprit:
            bystander.send(opened(1, "/t/Count"), body(1, framed(b"before"), 0))
            last, said = await culprit.goodbye()
            assert said == code
            assert last in (0, 1)
            bystander.send(body(1, framed(b"after")), call(3))
            assert await bystander.answered(1, 3) == [(OK, b"2"), (OK, b"hi")]

    told(story)
    assert caplog.messages == ["connection broken"]


def test_what_was_answered_before_an_error_still_arrives() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer(GREETING + call(1) + call(5) + frame(PING, 0, 0)) as peer:
            assert await peer.goodbye() == (5, FRAME_SIZE_ERROR)
            assert peer.answers == {1: (OK, b"hi"), 5: (OK, b"hi")}

    told(story)


def test_a_window_for_all_requests_bounds_what_they_hold() -> None:
    """64 MiB are held by streams that nobody reads; what is beyond them is an error."""

    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            message = framed(bytes((1 << 20) - 5))
            for stream in range(1, 33, 2):
                peer.send(opened(stream, "/t/Stuck"), body(stream, message * 4, 0))
                await peer.drain()
            await peer.heard()
            assert wire.held == 64 << 20
            peer.send(opened(33), body(33, b"x"))
            assert await peer.goodbye() == (33, FLOW_CONTROL_ERROR)

    told(story)


# --- what does not ---


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(frame(UNKNOWN, 0xFF, 77, b"whatever"), id="a frame of an unknown kind"),
        pytest.param(frame(PRIORITY, 0, 3, bytes(5)), id="priority"),
        pytest.param(frame(PRIORITY, 0, 999, bytes(5)), id="priority of no stream yet"),
        pytest.param(frame(GOAWAY, 0, 0, u32(0, NO_ERROR)), id="a goaway: calls still end"),
        pytest.param(setting(0xABC, 7), id="an unknown setting"),
        pytest.param(frame(SETTINGS, ACK, 0), id="an ack"),
        pytest.param(frame(PING, ACK, 0, bytes(8)), id="the ack of no ping"),
        pytest.param(reset(1), id="reset of a stream that was answered"),
        pytest.param(update(1, 5), id="update of a stream that was answered"),
        pytest.param(body(1, b"more"), id="data of a stream that was answered"),
        pytest.param(frame(WINDOW_UPDATE, 0, 0, u32(2**31 + 5)), id="a reserved bit"),
        pytest.param(setting(TABLE_SIZE, 0), id="no table for us"),
        pytest.param(setting(MAX_FRAME, 2**24 - 1), id="large frames for us"),
    ],
)
def test_a_connection_bears(words: bytes) -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            peer.send(call(1))
            await peer.answered(1)
            peer.send(opened(3, "/t/Count"), words, body(3, framed(b"x")), call(5))
            assert await peer.answered(3, 5) == [(OK, b"1"), (OK, b"hi")]

    told(story)


def test_a_stream_number_is_used_once() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            peer.send(call(5))
            await peer.answered(5)
            for stream in (5, 3):  # lower numbers are closed with higher ones
                peer.send(opened(stream, flags=END_STREAM))
                assert await peer.until(RST_STREAM) == (RST_STREAM, 0, stream, u32(STREAM_CLOSED))
            peer.send(call(7))
            await peer.answered(7)

    told(story)


def test_no_peer_may_open_streams_without_end() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            most = 10_000
            peer.send(*(opened(stream) for stream in range(1, 2 * most, 2)), call(2 * most + 1))
            refused = await peer.until(RST_STREAM)
            assert refused == (RST_STREAM, 0, 2 * most + 1, u32(REFUSED_STREAM))
            peer.send(reset(1), call(2 * most + 3))
            await peer.answered(2 * most + 3)

    told(story)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        pytest.param(b"", INVALID_ARGUMENT, id="nothing"),
        pytest.param(b"\0\0\0", INVALID_ARGUMENT, id="half a head"),
        pytest.param(framed(b"hi")[:-1], INVALID_ARGUMENT, id="cut"),
        pytest.param(b"\1" + framed(b"hi")[1:], UNIMPLEMENTED, id="compressed"),
        pytest.param(framed(b"hi") + b"\0", INVALID_ARGUMENT, id="one byte more"),
    ],
)
@pytest.mark.parametrize("path", ["/t/Echo", "/t/Count"])
def test_a_body_that_is_not_messages(path: str, content: bytes, status: int) -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            peer.send(opened(1, path), body(1, content, 0), body(1, b""), call(3))
            (answer, _) = await peer.answered(1, 3)
            if path == "/t/Count" and not content:
                assert answer == (OK, b"0")
            else:
                assert answer.status == status

    told(story)


def test_a_body_that_is_too_large_is_answered_before_its_end() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            peer.send(opened(1), body(1, bytes((4 << 20) + 6), 0))
            peer.send(opened(3, "/t/Count"), body(3, b"\0" + u32((4 << 20) + 1), 0))
            for stream in (1, 3):
                seen = await peer.until(RST_STREAM)
                assert seen == (RST_STREAM, 0, stream, u32(NO_ERROR))
                assert peer.answers[stream].status == RESOURCE_EXHAUSTED
            assert wire.held == 0
            peer.send(body(1, b"late"), body(3, b"late"), call(5))
            await peer.answered(5)

    told(story)


# --- one request, spelled in many ways ---

ECHO = block("/t/Echo")
MANY = framed(b"a") + framed(b"") + framed(bytes(40_000))
SPELLINGS = {
    "plain": call(1, b"message"),
    "padded": frame(HEADERS, END_HEADERS | PADDED, 1, b"\x07" + ECHO + bytes(7))
    + frame(DATA, END_STREAM | PADDED, 1, b"\xff" + framed(b"message") + bytes(255)),
    "with priority": frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, bytes(5) + ECHO)
    + body(1, framed(b"message")),
    "padded, with priority, continued": frame(
        HEADERS, PADDED | WITH_PRIORITY, 1, b"\x01" + bytes(5) + ECHO[:3] + b"\0"
    )
    + frame(CONTINUATION, 0, 1)
    + b"".join(frame(CONTINUATION, 0, 1, ECHO[at : at + 1]) for at in range(3, len(ECHO)))
    + frame(CONTINUATION, END_HEADERS, 1)
    + body(1, framed(b"message")),
    "in pieces": opened(1)
    + b"".join(frame(DATA, 0, 1, framed(b"message")[at : at + 1]) for at in range(12))
    + frame(DATA, END_STREAM, 1),
    "ended by trailers": opened(1)
    + body(1, framed(b"message"), 0)
    + frame(HEADERS, END_HEADERS | END_STREAM, 1, block("/ignored")),
    "among others": opened(1)
    + opened(3, "/t/Count")
    + frame(DATA, 0, 1, framed(b"message")[:6])
    + frame(PING, 0, 0, bytes(8))
    + body(3, b"")
    + frame(DATA, END_STREAM, 1, framed(b"message")[6:]),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_request_has_the_same_answer(spelling: str) -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            peer.send(SPELLINGS[spelling])
            assert await peer.answered(1) == [(OK, b"message")]

    told(story)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_bytes_may_come_one_by_one(spelling: str) -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer(b"") as peer:
            (connection,) = await accepted(wire)
            for byte in GREETING + SPELLINGS[spelling] + opened(5, "/t/Count") + body(5, MANY):
                connection.data_received(bytes([byte]))
            assert await peer.answered(1, 5) == [(OK, b"message"), (OK, b"3")]

    told(story)


def test_they_may_be_cut_anywhere() -> None:
    async def story(wire: Wire) -> None:
        words = GREETING + SPELLINGS["padded, with priority, continued"]
        for at in range(len(words)):
            async with wire.peer(b"") as peer:
                (connection,) = await accepted(wire)
                connection.data_received(words[:at])
                connection.data_received(words[at:])
                assert await peer.answered(1) == [(OK, b"message")]

    told(story)


async def accepted(wire: Wire) -> list[Any]:
    """The connections of the server, when there is one and no other is on its way out."""
    async with asyncio.timeout(5):
        for _ in iter(lambda: len(wire.server.connections) == 1, True):
            await asyncio.sleep(0)
    return list(wire.server.connections)


def test_a_large_message_in_tiny_frames_is_read_in_linear_time() -> None:
    """Joining all there is for each frame would copy 20 GB here."""

    async def story(wire: Wire) -> None:
        for path in ("/t/Count", "/t/Echo"):
            async with wire.peer() as peer:
                content = framed(bytes(1 << 20))
                pieces = [content[at : at + 25] for at in range(0, len(content), 25)]
                peer.send(opened(1, path), *(frame(DATA, 0, 1, piece) for piece in pieces))
                peer.send(body(1, b""), update(0, 2 << 20))
                peer.send(update(1, 2 << 20))
                await peer.answered(1)

    told(story)


# --- header blocks ---


def test_a_peer_may_keep_a_table_and_give_it_up() -> None:
    """As clients do: they keep one until they have read our settings."""

    async def story(wire: Wire) -> None:
        encoder = hpack.Encoder()
        paths = ["/t/Echo", "/t/Count", "/t/Echo", "/t/Echo", "/t/Count", "/t/Count", "/t/Echo"]
        async with wire.peer() as peer:
            for stream, path in zip(range(1, 15, 2), paths, strict=True):
                if stream == 7:
                    encoder.header_table_size = 0
                headers = encoder.encode(fields(path))
                peer.send(frame(HEADERS, END_HEADERS, stream, headers), body(stream, framed(b"x")))
            answers = await peer.answered(*range(1, 15, 2))
            assert answers == [(OK, b"x" if path == "/t/Echo" else b"1") for path in paths]

    told(story)


def test_a_block_is_remembered_only_while_there_is_no_table() -> None:
    """The third block is the second again, but then it adds to the table that the last one uses."""
    indexed_count = b"\x83\x44\x08/t/Count"  # `:method: POST`, and `:path`, to be kept in the table
    blocks = [
        b"\x20" + indexed_count,  # the table has no room,
        indexed_count,
        b"\x3f\xe1\x1f" + b"\x83\x44\x07/t/Echo",  # and now 4096 bytes
        indexed_count,
        b"\x83\xbe",  # the newest entry of the table
    ]

    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            for stream, headers in zip(range(1, 11, 2), blocks, strict=True):
                peer.send(frame(HEADERS, END_HEADERS, stream, headers), body(stream, framed(b"x")))
            echo, count = (OK, b"x"), (OK, b"1")
            assert await peer.answered(1, 3, 5, 7, 9) == [count, count, echo, count, count]

    told(story)


def test_many_different_blocks_are_all_understood() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer(PREFACE + setting(TABLE_SIZE, 0)) as peer:
            streams = range(1, 5001, 2)
            for stream in streams:
                timeout = hpack.NeverIndexedHeaderTuple("grpc-timeout", f"{stream}m")
                headers = b"\x20" + block("/t/Echo") + hpack.Encoder().encode([timeout])
                peer.send(frame(HEADERS, END_HEADERS, stream, headers), body(stream, framed(b"x")))
            await peer.answered(*streams)

    told(story)


# --- answers, as far as the windows go ---


def test_an_answer_comes_as_its_stream_is_granted() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer(PREFACE + setting(INITIAL_WINDOW, 0)) as peer:
            peer.send(call(1, b"0123456789"), call(3, b"other"))
            for size in range(15):
                assert await peer.part(1) == framed(b"0123456789")[:size]
                peer.send(update(1, 1))
            assert await peer.answered(1) == [(OK, b"0123456789")]
            assert 3 not in peer.answers
            peer.send(update(3, 1000))
            assert await peer.answered(3) == [(OK, b"other")]

    told(story)


def test_settings_change_the_windows_of_streams_that_are_open() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer(PREFACE + setting(INITIAL_WINDOW, 10)) as peer:
            answer = framed(bytes(25))
            peer.send(call(1, bytes(25)))
            assert await peer.part(1) == answer[:10]
            peer.send(setting(INITIAL_WINDOW, 0), update(1, 15))  # 10 below nothing, and 15 more
            assert await peer.part(1) == answer[:15]
            peer.send(setting(INITIAL_WINDOW, 5))
            assert await peer.part(1) == answer[:20]
            peer.send(setting(INITIAL_WINDOW, 65535))
            assert await peer.answered(1) == [(OK, bytes(25))]

    told(story)


def test_answers_wait_for_the_window_of_the_connection() -> None:
    """One is reset while it waits: the others lose nothing by it."""

    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            streams = list(range(1, 201, 2))
            peer.send(*(call(stream, b"1000", "/t/Size") for stream in streams))
            await peer.heard()
            whole = 65535 // 1005
            assert len(peer.answers) == whole
            gone = streams.pop(whole + 1)
            peer.send(reset(gone))
            while len(peer.answers) < len(streams):
                peer.send(update(0, 999))
                await peer.heard()
            assert all(answer == (OK, bytes(1000)) for answer in peer.answers.values())
            assert gone not in peer.answers

    told(story)


def test_a_large_answer_comes_in_frames_that_every_peer_takes() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            peer.send(setting(INITIAL_WINDOW, LARGEST_INT), update(0, 1 << 30))
            peer.send(call(1, b"5000000", "/t/Size"))
            assert await peer.answered(1) == [(OK, bytes(5_000_000))]

    told(story)


class Written(asyncio.Transport):
    """A transport that keeps what is written, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[Any] = []

    def write(self, data: Any) -> None:
        self.writes.append(data)

    def is_closing(self) -> bool:
        return False


def test_answers_that_are_ready_together_leave_in_one_write() -> None:
    async def story(wire: Wire) -> None:
        transport = Written()
        connection = http2.Connection(wire.server)
        connection.connection_made(transport)
        transport.writes.clear()
        connection.data_received(GREETING + b"".join(call(n) for n in range(1, 33, 2)))
        connection.data_received(b"".join(call(n, path="/t/Wait") for n in range(33, 65, 2)))
        wire.go.set()
        await asyncio.wait(wire.server.tasks)
        await asyncio.sleep(0)
        assert [written.count(b"grpc-status") for written in transport.writes] == [16, 16]
        connection.connection_lost(None)

    told(story)


# --- requests, as far as they are dealt with ---


def test_a_client_stream_is_granted_what_was_taken_of_it() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            message = framed(bytes(1 << 20))
            peer.send(opened(1, "/t/Stuck"), body(1, message * 3, 0), call(3))
            await peer.answered(3)
            await peer.heard()
            assert wire.held == 3 * len(message)
            wire.go.set()
            granted = 0
            while granted < 3 * len(message):
                seen = await peer.until(WINDOW_UPDATE)
                if seen.stream == 1:
                    granted += int.from_bytes(seen.payload, "big")
            assert granted == 3 * len(message)
            peer.send(body(1, message * 4))  # that much fits again
            assert await peer.answered(1) == [(OK, b"7")]

    told(story)


def test_padding_is_granted_at_once() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            peer.send(opened(1), frame(DATA, PADDED, 1, b"\x64" + framed(b"hi") + bytes(100)))
            assert await peer.until(WINDOW_UPDATE) == (WINDOW_UPDATE, 0, 0, u32((64 << 20) - 65535))
            assert await peer.until(WINDOW_UPDATE) == (WINDOW_UPDATE, 0, 1, u32(101))
            peer.send(body(1, b""))
            assert await peer.answered(1) == [(OK, b"hi")]

    told(story)


def test_the_connection_is_granted_what_its_requests_took() -> None:
    """More than its window passes, of requests that are answered, reset and too late alike."""

    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            stream, message, rounds = 1, framed(bytes(60_000)), 400
            for _ in range(rounds):
                peer.send(opened(stream, "/t/Count"), body(stream, message, 0), reset(stream))
                peer.send(body(stream, message), call(stream + 2, bytes(60_000), "/t/Nothing"))
                await peer.answered(stream + 2)
                stream += 4
            await peer.heard()
            # As each is either held or granted, and nothing is held:
            sent = rounds * 3 * len(message)
            assert sent - (1 << 20) < peer.granted - ((64 << 20) - 65535) <= sent
            assert sent > 64 << 20

    told(story)


# --- cancellation ---


def test_a_call_may_be_reset_in_the_breath_that_makes_it() -> None:
    """Before its task has run at all: nothing is left, and nothing `was never awaited`."""

    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            for stream in range(1, 200, 2):
                path = "/t/Wait" if stream % 4 == 1 else "/t/Count"
                peer.send(call(stream, path=path), reset(stream))
            peer.send(call(201))
            await peer.answered(201)
            await peer.heard()
            assert list(peer.answers) == [201]

    told(story)


def test_resetting_a_call_cancels_it() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            peer.send(call(1, path="/t/Wait"))
            await wire.begun.wait()
            (task,) = wire.server.tasks
            peer.send(reset(1), call(3))
            await peer.answered(3)
            await asyncio.wait([task])
            assert wire.cancelled == 1

    told(story)


def test_losing_a_connection_cancels_its_calls_and_no_others() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as other:
            async with wire.peer() as peer:
                other.send(call(1, path="/t/Wait"))
                await other.heard()
                peer.send(*(call(stream, path="/t/Wait") for stream in (1, 3, 5)))
                await peer.heard()
            await asyncio.wait(wire.server.tasks, return_when=asyncio.FIRST_COMPLETED)
            while len(wire.server.tasks) > 1:
                await asyncio.wait(wire.server.tasks, return_when=asyncio.FIRST_COMPLETED)
            assert wire.cancelled == 3
            wire.go.set()
            assert await other.answered(1) == [(OK, b"hi")]

    told(story)


def test_a_peer_that_asks_and_does_not_read_is_read_no_further() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            (connection,) = await accepted(wire)
            pings = 200_000
            peer.send(frame(PING, 0, 0, bytes(8)) * pings)
            for _ in iter(connection._transport.is_reading, False):
                await asyncio.sleep(0)
            assert connection._transport.get_write_buffer_size() < 1 << 20
            for _ in range(pings):
                await peer.until(PING, ACK)
            peer.send(call(1))
            await peer.answered(1)

    told(story)


# --- leaving ---


def test_stop_serves_what_comes_until_the_peer_has_heard_of_it() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            peer.send(call(1, path="/t/Wait"))
            await wire.begun.wait()
            stopping = asyncio.create_task(wire.server.stop(1000))
            assert (await peer.until(GOAWAY)).payload == u32(LARGEST_INT, NO_ERROR)
            ping = await peer.until(PING)
            peer.send(call(3, b"", "/grpc.health.v1.Health/Check"))
            assert await peer.answered(3) == [(OK, SERVING)]
            wire.go.set()
            assert await peer.answered(1) == [(OK, b"hi")]
            peer.send(call(5), frame(PING, ACK, 0, ping.payload))
            assert await peer.answered(5) == [(OK, b"hi")]
            assert await peer.goodbye() == (5, NO_ERROR)
            await stopping

    told(story)


def test_stop_does_not_wait_for_those_that_ask_nothing() -> None:
    """One has not said a word; the other reads, and has nothing under way."""

    async def story(wire: Wire) -> None:
        async with wire.peer(b""), wire.peer() as peer:
            peer.send(call(1))
            await peer.answered(1)
            stopping = asyncio.create_task(wire.server.stop(1000))
            peer.send(frame(PING, ACK, 0, (await peer.until(PING)).payload))
            assert await peer.goodbye() == (1, NO_ERROR)
            await stopping

    told(story)


def test_stop_hangs_up_on_a_peer_that_does_not_read() -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as peer:
            (connection,) = await accepted(wire)
            peer.send(update(0, 1 << 30), setting(INITIAL_WINDOW, LARGEST_INT))
            peer.send(call(1, b"50000000", "/t/Size"), call(3, path="/t/Wait"))
            for _ in iter(connection._transport.is_reading, False):
                await asyncio.sleep(0)
            await wire.server.stop(0)
            assert not wire.server.connections

    told(story)


# --- anything at all ---

PATHS = ["/t/Echo", "/t/Wait", "/t/Count", "/t/Stuck", "/t/Nothing", "/grpc.health.v1.Health/Check"]
STREAMS = st.sampled_from([0, 1, 3, 5, 7, 2, 9, LARGEST_INT])
CONTENTS = st.one_of(
    st.sampled_from([block(path) for path in PATHS]),
    st.sampled_from([b"\x20", b"\x3f\xe1\x1f", b"\xbe"]),
    st.binary(max_size=40).map(framed),
    st.integers(0, 2**32 - 1).map(u32),
    st.tuples(st.integers(0, 6), st.integers(0, 2**32 - 1)).map(lambda at: struct.pack(">HI", *at)),
    st.sampled_from([b"", bytes(8), bytes(300), bytes(16384)]),
    st.binary(max_size=40),
)
FLAGS = st.one_of(st.sampled_from([0, 1, 4, 5]), st.integers(0, 255))
ANY_FRAME = st.builds(frame, st.integers(0, 10), FLAGS, STREAMS, CONTENTS)
GOOD_FRAME = st.one_of(
    st.builds(opened, st.integers(0, 20).map(lambda n: 2 * n + 1), st.sampled_from(PATHS)),
    st.builds(call, STREAMS, st.binary(max_size=20), st.sampled_from(PATHS)),
    st.builds(body, STREAMS, st.binary(max_size=20).map(framed), st.sampled_from([0, END_STREAM])),
    st.builds(reset, STREAMS),
    st.builds(update, STREAMS, st.integers(1, 70_000)),
    st.builds(setting, st.just(INITIAL_WINDOW), st.integers(0, 70_000)),
)


def survives(words: bytes) -> None:
    async def story(wire: Wire) -> None:
        async with wire.peer() as bystander:
            bystander.send(opened(1, "/t/Count"), body(1, framed(b"before"), 0))
            await bystander.heard()
            async with wire.peer(words) as peer:
                await peer.end()
            bystander.send(body(1, framed(b"after")), call(3))
            assert await bystander.answered(1, 3) == [(OK, b"2"), (OK, b"hi")]
            await bystander.heard()
            assert [each.streams for each in wire.server.connections] == [{}]

    logging.disable()
    try:
        told(story)
    finally:
        logging.disable(logging.NOTSET)


@examples(300)
@given(st.lists(GOOD_FRAME, max_size=30))
def test_it_survives_frames_in_any_order(frames: list[bytes]) -> None:
    survives(GREETING + b"".join(frames))


@examples(300)
@given(st.lists(st.one_of(GOOD_FRAME, ANY_FRAME), max_size=12))
def test_it_survives_any_frames(frames: list[bytes]) -> None:
    survives(GREETING + b"".join(frames))


@examples(200)
@given(st.sampled_from([b"", PREFACE, GREETING, GREETING + call(1)]), st.binary(max_size=200))
def test_it_survives_any_bytes(begin: bytes, rest: bytes) -> None:
    survives(begin + rest)
