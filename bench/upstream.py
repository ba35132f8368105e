"""
The cheapest upstream there is, so that it hides nothing: every answer is made of ready bytes.

A request gets one chat completion; with `"stream": true` it gets `max_tokens` chunks, the first at
once and one more each `gap_ms` (a field of the body). Prints its port.
"""

import re
import select
import socket
import time
from collections import deque
from dataclasses import dataclass

_START = b'{"id":"chatcmpl-1","object":"chat.completion%b","created":1790000000,"model":"smollm2",'
_USAGE = b'"usage":{"prompt_tokens":21,"completion_tokens":%d,"total_tokens":%d}}'
BODY = (
    _START
    % b""
    + b'"choices":[{"index":0,"message":{"role":"assistant","content":"The quick brown fox jumps '
    b'over the lazy dog."},"finish_reason":"stop"}],' + _USAGE % (11, 32) + b"\n"
)
END = BODY[-4:]
"""No answer in one piece holds these bytes before its end."""

_WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
ANSWER = _WHOLE % (len(BODY), BODY)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _event(data: bytes) -> bytes:
    event = b"data: %b\n\n" % data
    return b"%x\r\n%b\r\n" % (len(event), event)


def _choice(delta: bytes, reason: bytes) -> bytes:
    choice = b'"choices":[{"index":0,"delta":{%b},"finish_reason":%b}]}' % (delta, reason)
    return _event(_START % b".chunk" + choice)


TOKEN = _choice(b'"role":"assistant","content":"fox "', b"null")
FINISH = _choice(b'"role":"assistant","content":""', b'"stop"')


def _tail(tokens: int, usage: bool) -> bytes:
    """What follows the last token."""
    counts = _USAGE % (tokens, 21 + tokens)
    extra = _event(_START % b".chunk" + b'"choices":[],' + counts) if usage else b""
    return FINISH + extra + _event(b"[DONE]") + b"0\r\n\r\n"


def _complete(request: bytes) -> bool:
    head, blank, body = request.partition(b"\r\n\r\n")
    if not blank:
        return False
    head = head.lower()
    if b"transfer-encoding: chunked" in head:
        return body.endswith(b"0\r\n\r\n")
    _, found, after = head.partition(b"\r\ncontent-length: ")
    return not found or len(body) >= int(after.partition(b"\r\n")[0])


def _number(request: bytes, field: bytes) -> int:
    found = re.search(rb'"%b": ?(\d+)' % field, request)
    return int(found[1]) if found else 0


@dataclass(slots=True)
class _Stream:
    connection: socket.socket
    due: float
    gap: float
    tokens: int
    left: int
    usage: bool


class Upstream:
    """One thread, one epoll."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._poll = select.epoll()
        self._poll.register(self._listener.fileno(), select.EPOLLIN)
        self._connections: dict[int, socket.socket] = {}
        self._parts: dict[int, bytes] = {}
        self._streams: deque[_Stream] = deque()  # by time due: all that run have the same gap
        self.port: int = self._listener.getsockname()[1]

    def serve(self) -> None:
        while True:
            now = time.monotonic()
            while self._streams and self._streams[0].due <= now:
                self._next(self._streams.popleft())
            timeout = max(0.0, self._streams[0].due - now) if self._streams else None
            for number, _ in self._poll.poll(timeout):
                if number == self._listener.fileno():
                    self._accept()
                else:
                    self._read(number)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[connection.fileno()] = connection
        self._poll.register(connection.fileno(), select.EPOLLIN)

    def _read(self, number: int) -> None:
        connection = self._connections[number]
        try:
            got = connection.recv(65536)
        except ConnectionResetError:
            got = b""
        if not got:
            self._poll.unregister(number)
            self._connections.pop(number).close()
            self._parts.pop(number, None)
            return
        request = self._parts.pop(number, b"") + got
        if not _complete(request):
            self._parts[number] = request
        elif b'"stream": true' in request:
            gap, tokens = _number(request, b"gap_ms") / 1e3, _number(request, b"max_tokens")
            usage = b"include_usage" in request
            connection.send(HEAD)
            self._next(_Stream(connection, time.monotonic(), gap, tokens, tokens, usage))
        else:
            connection.send(ANSWER)

    def _next(self, stream: _Stream) -> None:
        stream.left -= 1
        stream.due += stream.gap
        try:
            stream.connection.send(
                TOKEN if stream.left else TOKEN + _tail(stream.tokens, stream.usage)
            )
        except OSError:
            return  # the client left
        if stream.left:
            self._streams.append(stream)


def main() -> None:
    upstream = Upstream()
    print(upstream.port, flush=True)
    upstream.serve()


if __name__ == "__main__":
    main()
