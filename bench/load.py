"""
The load client, a process of its own that costs little: raw sockets, one epoll, no parsing.

Reads one order a line, as JSON, and prints one result a line. All its connections are open before
the clock starts. A request that is not answered with 200 ends it.
"""

import json
import select
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bench.upstream import END


def _connect(port: int, count: int) -> list[socket.socket]:
    found = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port), timeout=60)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found.append(connection)
    return found


def _must_be_200(answer: bytes) -> None:
    if answer[9:12] != b"200":
        raise SystemExit(f"not a 200: {answer[:600].decode('latin-1')}")


def closed_loop(order: dict[str, Any]) -> dict[str, Any]:
    """Each connection sends its next request once it has the answer to the last."""
    request = order["request"].encode()
    connections = _connect(order["port"], order["connections"])
    by_number = {connection.fileno(): connection for connection in connections}
    poll = select.epoll()
    for number in by_number:
        poll.register(number, select.EPOLLIN)
    latencies: Counter[int] = Counter()
    parts: dict[int, bytes] = {}
    sent: dict[int, int] = {}
    start = time.perf_counter_ns()
    deadline = start + int(order["seconds"] * 1e9)
    for number, connection in by_number.items():
        sent[number] = time.perf_counter_ns()
        connection.send(request)
    while sent:
        for number, _ in poll.poll():
            got = by_number[number].recv(65536)
            if number in parts:
                got = parts.pop(number) + got
            if not got.endswith(END):
                if not got or got[9:12] != b"200":
                    _must_be_200(got)
                parts[number] = got
                continue
            _must_be_200(got)
            now = time.perf_counter_ns()
            latencies[(now - sent[number]) // 1000] += 1
            if now < deadline:
                sent[number] = now
                by_number[number].send(request)
            else:
                del sent[number]
    seconds = (time.perf_counter_ns() - start) / 1e9
    poll.close()
    for connection in connections:
        connection.close()
    return {"count": latencies.total(), "seconds": seconds, "latency_us": list(latencies.items())}


@dataclass(slots=True)
class _Stream:
    connection: socket.socket
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    got: bytes = b""
    gaps: list[float] = field(default_factory=list)

    def take(self, data: bytes, now: float) -> bool:
        """True once the stream is over."""
        if not data:
            raise SystemExit(f"cut: {self.got[-600:].decode('latin-1')}")
        self.got += data
        if b"data: " in data:
            if self.first:
                self.gaps.append(now - self.last)
            else:
                self.first = now
            self.last = now
        return self.got.endswith(b"0\r\n\r\n")


def streams(order: dict[str, Any]) -> dict[str, Any]:
    """Streams that start `spacing` seconds apart, each on a connection of its own."""
    request = order["request"].encode()
    waiting = [_Stream(connection) for connection in _connect(order["port"], order["count"])]
    everything = list(waiting)
    running: dict[int, _Stream] = {}
    poll = select.epoll()
    start = time.perf_counter()
    started = 0
    while waiting or running:
        now = time.perf_counter()
        while waiting and start + started * order["spacing"] <= now:
            stream = waiting.pop(0)
            number = stream.connection.fileno()
            poll.register(number, select.EPOLLIN)
            running[number] = stream
            stream.sent = time.perf_counter()
            stream.connection.send(request)
            started += 1
        timeout = max(0.0, start + started * order["spacing"] - now) if waiting else None
        for number, _ in poll.poll(timeout):
            stream = running[number]
            if stream.take(stream.connection.recv(65536), time.perf_counter()):
                poll.unregister(number)
                del running[number]
    poll.close()
    for stream in everything:
        _must_be_200(stream.got)
        stream.connection.close()
    return {
        "seconds": time.perf_counter() - start,
        "chunks": sum(stream.got.count(b"data: ") for stream in everything),
        "first_ms": [(stream.first - stream.sent) * 1e3 for stream in everything],
        "gap_ms": [gap * 1e3 for stream in everything for gap in stream.gaps],
    }


def main() -> None:
    kinds = {"closed_loop": closed_loop, "streams": streams}
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(kinds[order["kind"]](order)), flush=True)


if __name__ == "__main__":
    main()
