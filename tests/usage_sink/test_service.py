"""Envoy's stream over a real socket, into a real database."""

import asyncio
import logging
import struct
import tempfile
from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop
from envoy.data.accesslog.v3 import accesslog_pb2 as data
from envoy.service.accesslog.v3 import als_pb2 as pb
from envoy.service.accesslog.v3.als_pb2_grpc import AccessLogServiceStub

from parallama import contract as c
from parallama import rpc
from parallama.db import Store, database
from parallama.db.ledger import Added, add
from parallama.usage import UsageRecord
from tests.parallama.db_on_disk import migrate, settings
from tests.usage_sink.make import STREAM, an_entry
from usage_sink.counting import Counting
from usage_sink.service import STREAM as METHOD
from usage_sink.service import UsageSink
from usage_sink.storing import Storing
from usage_sink.writer import Settled, Writer, writing

Add = Callable[[Sequence[UsageRecord]], Awaitable[Added]]


class Sink:
    """A sink that runs, seen from Envoy's side; what it stored is read when it has ended."""

    def __init__(self, path: str, stub: AccessLogServiceStub, writer: Writer) -> None:
        self.path = path
        self.stub = stub
        self.writer = writer

    async def send(self, *messages: pb.StreamAccessLogsMessage) -> None:
        """Return when the sink has read all of it and said so."""
        call = self.stub.StreamAccessLogs()
        for message in messages:
            await call.write(message)
        await call.done_writing()
        await call


def entries(*each: data.HTTPAccessLogEntry) -> pb.StreamAccessLogsMessage:
    message = pb.StreamAccessLogsMessage()
    message.http_logs.log_entry.extend(each)
    return message


def stored_after(
    story: Callable[[Sink], Awaitable[None]],
    *,
    through: Callable[[Add], Add] = lambda add: add,
    queue_rows: int = 1000,
    log_requests: bool = False,
    counting: Counting | None = None,
) -> list[tuple[str, str]]:
    """The rows by request id, with their user names, once the sink has left."""

    async def told(folder: Path) -> list[tuple[str, str]]:
        await migrate(settings(folder))
        path = str(folder / "s.sock")
        async with asyncio.timeout(30), database(settings(folder)) as store:
            writer = Writer(
                Storing(through(partial(add, store)), set_aside=list),
                Settled(),
                batch_rows=100,
                flush_seconds=0.01,
                queue_rows=queue_rows,
            )
            async with writing(writer, deadline=10):
                sink = UsageSink(writer, log_requests=log_requests, counting=counting)
                server = rpc.Server({}, {METHOD: sink.stream_access_logs})
                await server.start(path)
                try:
                    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                        await story(Sink(path, AccessLogServiceStub(channel), writer))
                finally:
                    await server.stop(1)
            return await rows(store)

    with tempfile.TemporaryDirectory() as folder:
        return uvloop.run(told(Path(folder)))


async def rows(store: Store) -> list[tuple[str, str]]:
    query = "SELECT request_id, username FROM gateway_usage_logs ORDER BY request_id"
    return [(row[0], row[1]) for row in await store.read(query)]


def ids(count: int) -> list[str]:
    return [f"r{n:04}" for n in range(count)]


def test_the_same_entry_twice_is_one_row() -> None:
    async def story(sink: Sink) -> None:
        await sink.send(entries(an_entry("r1")), entries(an_entry("r1"), an_entry("r2")))
        await sink.writer.drain()
        await sink.send(entries(an_entry("r1")))  # Envoy sends again what it is not sure of

    assert stored_after(story) == [("r1", "anna"), ("r2", "anna")]


def test_many_entries_in_many_messages_are_all_stored() -> None:
    async def story(sink: Sink) -> None:
        await sink.send(
            *(entries(*(an_entry(id) for id in ids(600)[n::20])) for n in range(20)),
        )

    assert [id for id, _ in stored_after(story)] == ids(600)


def unreadable() -> data.HTTPAccessLogEntry:
    entry = an_entry("bad")
    entry.common_properties.start_time.seconds = 2**60
    return entry


def test_an_entry_that_cannot_be_read_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def story(sink: Sink) -> None:
        await sink.send(
            entries(an_entry("r1"), unreadable(), an_entry("r2")), entries(unreadable())
        )
        await sink.send(entries(an_entry("r3")))

    assert [id for id, _ in stored_after(story)] == ["r1", "r2", "r3"]
    said = [at for at in caplog.records if at.message == "entry not understood"]
    assert [at.request_id for at in said] == ["bad", "bad"]  # type: ignore[attr-defined]


def test_messages_without_entries_and_of_other_kinds_are_nothing() -> None:
    async def story(sink: Sink) -> None:
        tcp = pb.StreamAccessLogsMessage()
        tcp.tcp_logs.log_entry.add()
        named = pb.StreamAccessLogsMessage()
        named.identifier.log_name = "usage"
        await sink.send(tcp, named, pb.StreamAccessLogsMessage(), entries(an_entry("r1")))

    assert [id for id, _ in stored_after(story)] == ["r1"]


def test_bytes_that_are_no_log_end_their_stream_and_nothing_else() -> None:
    async def story(sink: Sink) -> None:
        async with grpc.aio.insecure_channel(f"unix:{sink.path}") as channel:
            call = channel.stream_unary(METHOD)()
            await call.write(entries(an_entry("r1")).SerializeToString())
            await call.write(b"\xff\xff\xff")
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        await sink.send(entries(an_entry("r2")))

    assert [id for id, _ in stored_after(story)] == ["r1", "r2"]


@pytest.mark.parametrize(
    "entry",
    [
        an_entry("odd", lua={**STREAM, c.MODEL: "\x00", c.RESPONSE_MODEL: "x" * 200_000}),
        an_entry("odd", lua={**STREAM, c.TOTAL_TOKENS: 1e300, c.COMPUTE_MS: float("nan")}),
        an_entry("odd", lua={**STREAM, c.COMPUTE_MS: float("inf"), c.PROMPT_TOKENS: -5}),
    ],
    ids=["names", "huge", "infinite"],
)
def test_values_no_column_was_made_for_cost_neither_their_row_nor_another(
    entry: data.HTTPAccessLogEntry,
) -> None:
    async def story(sink: Sink) -> None:
        await sink.send(entries(an_entry("first"), entry, an_entry("last")))

    assert [id for id, _ in stored_after(story)] == ["first", "last", "odd"]


def test_a_slow_database_holds_envoy_back_and_loses_nothing() -> None:
    gate = asyncio.Event()

    def slow(add: Add) -> Add:
        async def after(records: Sequence[UsageRecord]) -> Added:
            await gate.wait()
            return await add(records)

        return after

    async def story(sink: Sink) -> None:
        sending = asyncio.create_task(sink.send(*(entries(an_entry(id)) for id in ids(300))))
        await asyncio.wait([sending], timeout=0.2)
        assert not sending.done()
        assert sink.writer.waiting <= 10 + 10 + 1  # in the queue, in hand, and the one being put
        gate.set()
        await sending

    stored = stored_after(story, through=slow, queue_rows=10)
    assert [id for id, _ in stored] == ids(300)


# Text that is to be counted.

SECRET = "what nobody else may read"
TEXT = {c.PROMPT: b64encode(SECRET.encode() * 99).decode(), "1": b64encode(b"yes").decode()}
COUNTED = {**STREAM, c.USAGE_SOURCE: "counted"}


@pytest.mark.parametrize("does", [len, None], ids=["counts", "fails"])
def test_text_is_counted_and_leaves_no_trace(
    does: Callable[[str], int] | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    batches: list[UsageRecord] = []

    def noted(add: Add) -> Add:
        async def after(records: Sequence[UsageRecord]) -> Added:
            batches.extend(records)
            return await add(records)

        return after

    def count(text: str) -> int:
        if does is None:
            raise ValueError(text)
        return does(text)

    async def story(sink: Sink) -> None:
        await sink.send(
            entries(
                an_entry("r1", lua=COUNTED, text=TEXT),
                an_entry("r2"),
                an_entry("r3", text=TEXT),
            )
        )

    stored = stored_after(story, through=noted, log_requests=True, counting=Counting(count))
    assert [id for id, _ in stored] == ["r1", "r2", "r3"]
    wanted = (31, "counted") if does is None else (99 * len(SECRET) + 3, "estimated")
    told = {at.request_id: (at.tokens_used, at.token_source) for at in batches}
    assert told == {"r1": wanted, "r2": (31, "reported"), "r3": (31, "reported")}
    (line,) = (at for at in lines(caplog) if at["request_id"] == "r1")
    assert line["source"] == wanted[1]
    for trace in (caplog.text, repr([vars(at) for at in caplog.records]), repr(batches)):
        assert SECRET not in trace


def test_without_counting_text_is_nothing() -> None:
    async def story(sink: Sink) -> None:
        await sink.send(entries(an_entry("r1", lua=COUNTED, text=TEXT)))

    assert [id for id, _ in stored_after(story)] == ["r1"]


def test_the_largest_text_fits_into_a_message() -> None:
    """Both ways to the bound that Lua keeps, in as many entries as Envoy puts into one message."""
    most = b64encode(b"x" * 65536).decode()
    pieces = {str(n): b64encode(b"x" * 1024).decode() for n in range(1, 65)}

    async def story(sink: Sink) -> None:
        text = {c.PROMPT: most, **pieces}
        await sink.send(entries(*(an_entry(id, lua=COUNTED, text=text) for id in ids(10))))

    assert len(stored_after(story, counting=Counting(len))) == 10


# What Envoy's own connection looks like at the end of its life, in bytes.

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS = 0, 1, 3, 4
_END_STREAM, _END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def field(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def reset(stream: int) -> bytes:
    cancel = 8
    return frame(_RST_STREAM, 0, stream, struct.pack(">I", cancel))


def a_stream_of(stream: int, *messages: pb.StreamAccessLogsMessage) -> bytes:
    headers = (
        field(b":method", b"POST")
        + field(b":scheme", b"http")
        + field(b":path", METHOD.encode())
        + field(b":authority", b"usage_sink")
        + field(b"content-type", b"application/grpc")
        + field(b"te", b"trailers")
    )
    body = b"".join(
        b"\0" + struct.pack(">I", len(text)) + text
        for text in (message.SerializeToString() for message in messages)
    )
    return frame(_HEADERS, _END_HEADERS, stream, headers) + b"".join(
        frame(_DATA, 0, stream, body[at : at + 16384]) for at in range(0, len(body), 16384)
    )


async def say(sink: Sink, words: bytes) -> None:
    """Send it all at once, hang up, and wait until the sink has hung up as well."""
    reader, writer = await asyncio.open_unix_connection(sink.path)
    writer.write(_PREFACE + frame(_SETTINGS, 0, 0, b"") + words)
    writer.write_eof()
    async with asyncio.timeout(5):
        await reader.read()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("last_words", [b"", reset(1)], ids=["end", "reset"])
def test_what_was_sent_before_envoy_hung_up_is_stored(count: int, last_words: bytes) -> None:
    """An Envoy that exits sends its last entries, and the end of its stream right behind them."""

    async def story(sink: Sink) -> None:
        messages = (entries(an_entry(id)) for id in ids(count))
        await say(sink, a_stream_of(1, *messages) + last_words)

    assert [id for id, _ in stored_after(story)] == ids(count)


def test_after_a_stream_that_was_reset_the_next_one_is_read() -> None:
    """Both on one connection, as Envoy has it."""

    async def story(sink: Sink) -> None:
        many = a_stream_of(1, *(entries(an_entry(id)) for id in ids(40)))
        await say(sink, many + reset(1) + a_stream_of(3, entries(an_entry("next"))))

    assert ("next", "anna") in stored_after(story)


# The line that an operator sees.


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    wanted = (
        "user", "model", "endpoint", "status", "tokens_in", "tokens_out", "source",
        "first_token_s", "duration_s", "tokens_left", "requests_left", "aborted", "request_id",
    )  # fmt: skip
    return [
        {name: getattr(at, name) for name in wanted}
        for at in caplog.records
        if at.name == "parallama.requests"
    ]


def test_each_finished_request_is_a_line_for_people(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    limits = {c.RESERVATION: "r1", c.GRANTED: 150, c.TOKENS_LEFT: 850, c.REQUESTS_LEFT: 9}

    async def story(sink: Sink) -> None:
        await sink.send(entries(an_entry(limits=limits), an_entry(who=None, status=401)))

    stored_after(story, log_requests=True)
    assert lines(caplog) == [
        {
            "user": "anna",
            "model": "llama3",
            "endpoint": "/v1/chat/completions",
            "status": 200,
            "tokens_in": 11,
            "tokens_out": 20,
            "source": "reported",
            "first_token_s": 0.25,
            "duration_s": 1.5,
            "tokens_left": 969,
            "requests_left": 9,
            "aborted": None,
            "request_id": "r1",
        }
    ]


def test_the_lines_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def story(sink: Sink) -> None:
        await sink.send(entries(an_entry()))

    assert len(stored_after(story, log_requests=False)) == 1
    assert lines(caplog) == []
