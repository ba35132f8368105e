"""
A server and a client that keep every byte: what went in, and what is to come out.

The client says in `x-script` which of the answers that were written down before it wants. Requests
without one (our own catalog asks what models there are) get a 404, and are not kept.
"""

import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

Headers = list[tuple[str, str]]

_HEAD_END = b"\r\n\r\n"
_NOBODY = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


@dataclass
class Message:
    """A request or an answer, as it came. `whole`: its end came, too."""

    start: str
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)
    trailers: Headers = field(default_factory=list)
    whole: bool = False

    def get(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def status(self) -> int:
        return int(self.start.split(" ")[1])


class Gone(Exception):
    """The other side closed before the end."""


class Wire:
    """Reads messages off a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""

    def message(self, *, bodyless: bool = False, until_close: bool = False) -> Message:
        """
        The next one. `bodyless`: it answers a HEAD. `until_close`: without a length of its own its
        body ends with the connection, as that of an answer does. Raises Gone where there is none.
        """
        lines = self._until(_HEAD_END).decode("latin-1").split("\r\n")
        found = Message(lines[0], _fields(lines[1:-2]))
        try:
            if not bodyless:
                self._body(found, until_close)
            found.whole = True
        except Gone:
            pass
        return found

    def _body(self, found: Message, until_close: bool) -> None:
        if (found.get("transfer-encoding") or "").lower() == "chunked":
            while size := int(self._until(b"\r\n").partition(b";")[0], 16):
                found.chunks.append(self._exactly(size))
                found.body += found.chunks[-1]
                self._exactly(2)
            while (line := self._until(b"\r\n")) != b"\r\n":
                found.trailers += _fields([line.decode("latin-1").removesuffix("\r\n")])
        elif (length := found.get("content-length")) is not None:
            while len(found.body) < int(length):
                found.body += self._some(int(length) - len(found.body))
        elif until_close and found.status >= 200 and found.status not in (204, 304):
            try:
                while True:
                    found.body += self._some(1 << 16)
            except Gone:
                pass

    def _until(self, mark: bytes) -> bytes:
        while (at := self._buffer.find(mark)) < 0:
            self._more()
        return self._take(at + len(mark))

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._more()
        return self._take(size)

    def _some(self, most: int) -> bytes:
        if not self._buffer:
            self._more()
        return self._take(min(most, len(self._buffer)))

    def _take(self, size: int) -> bytes:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _more(self) -> None:
        try:
            got = self._sock.recv(1 << 18)
        except ConnectionError:
            got = b""
        if not got:
            raise Gone
        self._buffer += got


def _fields(lines: Iterable[str]) -> Headers:
    pairs = (line.partition(":") for line in lines)
    return [(name.lower(), value.strip(" \t")) for name, _, value in pairs]


def head(start: str, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [start, *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def chunked(pieces: Iterable[bytes], trailers: Iterable[tuple[str, str]] = ()) -> Iterator[bytes]:
    """A body in chunks: each of these pieces is one."""
    for piece in pieces:
        if piece:
            yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield head("0", trailers)


class RawUpstream:
    """Says what it is told to, byte for byte, and keeps what it was asked."""

    def __init__(self) -> None:
        self._answers: dict[str, Sequence[bytes]] = {}
        self._asked: dict[str, list[Message]] = {}
        self._changed = threading.Condition()
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self._server.getsockname())

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._server.getsockname()
        return host, port

    def say(self, script: str, answer: Sequence[bytes]) -> None:
        """What is written to who asks for this script; each piece by itself, then it hangs up."""
        with self._changed:
            self._answers[script], self._asked[script] = answer, []

    def asked(self, script: str, count: int, patience: float = 30.0) -> list[Message]:
        """The requests for it, once there are so many."""
        with self._changed:
            enough = self._changed.wait_for(lambda: len(self._asked[script]) >= count, patience)
            assert enough, f"{script} was asked {len(self._asked[script])} times, not {count}"
            return list(self._asked[script])

    def times_asked(self, script: str) -> int:
        with self._changed:
            return len(self._asked[script])

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._changed:
            for sock in self._open:
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            with self._changed:
                self._open.add(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                self._exchange(sock)
            except (Gone, OSError):
                pass  # who asked has left
            finally:
                with self._changed:
                    self._open.discard(sock)

    def _exchange(self, sock: socket.socket) -> None:
        asked = Wire(sock).message()
        script = asked.get("x-script")
        if script is None:
            sock.sendall(_NOBODY)
            return
        with self._changed:
            self._asked[script].append(asked)
            self._changed.notify_all()
            answer = self._answers[script]
        for piece in answer:
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)


def ask(
    address: tuple[str, int],
    pieces: Iterable[bytes],
    *,
    bodyless: bool = False,
    hang_up: bool = False,
) -> Message:
    """
    What is answered to this request, interim answers left out. `hang_up`: nothing more will be
    sent. Raises Gone where there is no answer.
    """
    with socket.create_connection(address, timeout=30) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
        if hang_up:
            sock.shutdown(socket.SHUT_WR)
        wire = Wire(sock)
        while (found := wire.message(bodyless=bodyless, until_close=True)).status < 200:
            pass
        return found
