"""One question over HTTP/1.1 to a unix socket, answered whole or not at all."""

import asyncio
from dataclasses import dataclass

import h11

_CHUNK = 1 << 16
_UPSTREAM = "x-parallama-upstream"  # set by Envoy: the cluster that it asked, and its flags
_NO_FLAGS = "-"

OURS = "x-parallama-catalog"
"""Marks our own questions: envoy/routes.yaml sends them on to the servers, and not back to us."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`cluster` is Envoy's name for the servers that were asked, where it is known."""

    status: int
    content_type: str
    body: bytes
    cluster: str = ""


class Unanswered(Exception):
    """There is no answer, or none that can be used: why, in words for operators."""


class Unasked(Unanswered):
    """Nobody listens at our own socket: the servers were not asked."""


async def ask(
    socket: str,
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    seconds: float,
    largest: int,
) -> Answer:
    """
    Raises Unanswered: nobody answers in time, or more than `largest` bytes, or not to the end.

    What Envoy says itself, because it reaches no server, is no answer either.
    """
    headers = [("host", "parallama"), ("user-agent", "parallama"), ("connection", "close")]
    headers.append((OURS, "1"))
    if body is not None:
        headers += [("content-type", "application/json"), ("content-length", str(len(body)))]
    try:
        # A path that only just came in by the wire is checked by h11, too.
        asked = h11.Request(method=method, target=path, headers=headers)
        async with asyncio.timeout(seconds):
            reader, writer = await _connected(socket)
            try:
                return await _exchange(reader, writer, asked, body, largest)
            finally:
                writer.close()
    except TimeoutError:
        raise Unanswered(f"no answer within {seconds:g} s") from None
    except OSError as error:
        raise Unanswered(f"the answer broke off ({error.strerror or error})") from None
    except h11.ProtocolError:
        raise Unanswered("the answer broke off, or is no HTTP") from None


async def _connected(socket: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        return await asyncio.open_unix_connection(socket)
    except TimeoutError:
        raise
    except OSError as error:
        raise Unasked(f"nobody listens there: {error.strerror or error}") from None


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    asked: h11.Request,
    body: bytes | None,
    largest: int,
) -> Answer:
    connection = h11.Connection(h11.CLIENT)
    sent = [asked, *([h11.Data(data=body)] if body is not None else []), h11.EndOfMessage()]
    writer.write(b"".join(connection.send(event) or b"" for event in sent))
    await writer.drain()
    status, headers, said = 0, {}, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_CHUNK))
        elif isinstance(event, h11.Response):
            status = event.status_code
            headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        elif isinstance(event, h11.Data):
            said += event.data
            if len(said) > largest:
                raise Unanswered(f"the answer is larger than {largest >> 20} MiB")
        elif isinstance(event, h11.EndOfMessage):
            cluster, _, flags = headers.get(_UPSTREAM, "").partition(" ")
            if flags not in ("", _NO_FLAGS):
                raise Unanswered(f"the server cannot be reached ({flags})")
            return Answer(status, headers.get("content-type", ""), bytes(said), cluster)
        elif not isinstance(event, h11.InformationalResponse):
            raise Unanswered("the connection was closed before an answer")
