"""
Files of models, of many gigabytes: they pass at once, and are nowhere held.

UPLOAD_MB=4000 sends as much in each test.
"""

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest

from parallama.roles import Role
from tests.e2e.gateway import PATIENCE, Gateway, running, until

MB = 1 << 20
SIZE = int(os.environ.get("UPLOAD_MB", "200")) * MB
PIECE = os.urandom(4 * MB)
HELD = 32 * MB
"""Far less than what is sent, and more than Envoy and the sockets between hold."""


class Store:
    """Takes uploads on loopback and keeps their digests alone; `open` says whether it reads."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.open = threading.Event()
        self.open.set()
        self.digests: dict[str, str] = {}
        """By the path that they are sent to; empty until they are whole."""
        self.taken = 0

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _talk(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as file:
            while head := file.readline().decode():
                headers = {}
                while line := file.readline().decode().strip():
                    name, _, value = line.partition(":")
                    headers[name.lower()] = value.strip()
                method, path, _ = head.split(" ")
                if method == "POST":
                    self.digests[path] = ""
                    self.digests[path] = self._read(file, headers)
                connection.sendall(b"HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n")

    def _read(self, file: BinaryIO, headers: dict[str, str]) -> str:
        digest = hashlib.sha256()
        if "chunked" in headers.get("transfer-encoding", ""):
            while size := int(file.readline(), 16):
                self._take(digest, file, size)
                file.readline()
            file.readline()
        else:
            self._take(digest, file, int(headers.get("content-length", 0)))
        return digest.hexdigest()

    def _take(self, digest: "hashlib._Hash", file: BinaryIO, size: int) -> None:
        while size:
            self.open.wait()
            if not (piece := file.read(min(size, MB))):
                raise ConnectionError("the sender left")
            digest.update(piece)
            size -= len(piece)
            self.taken += len(piece)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    store = Store()
    thread = threading.Thread(target=store.serve)
    thread.start()
    yield store
    store.open.set()
    store.close()
    thread.join()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("uploads"), store) as gateway:
        yield gateway


def pieces(total: int) -> Iterator[bytes]:
    for _ in range(total // len(PIECE)):
        yield PIECE


def digest(total: int) -> str:
    found = hashlib.sha256()
    for piece in pieces(total):
        found.update(piece)
    return found.hexdigest()


def most_memory(gateway: Gateway) -> int:
    """Bytes that Envoy ever had."""
    status = Path(f"/proc/{gateway.child('envoy')}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.parametrize("prefix", ["", "/ollama"])
@pytest.mark.parametrize("length", [True, False], ids=["length told", "chunked"])
def test_an_upload_passes_whole_and_is_not_held(
    gateway: Gateway, store: Store, prefix: str, length: bool
) -> None:
    operator = gateway.someone(role=Role.OPERATOR)
    store.digests.clear()
    path = f"/api/blobs/sha256:{digest(SIZE)}"
    assert operator.ask("HEAD", prefix + path).status_code == 201
    before = most_memory(gateway)
    headers = {"content-length": str(SIZE)} if length else {}
    answer = operator.ask("POST", prefix + path, content=pieces(SIZE), headers=headers)
    assert answer.status_code == 201
    assert store.digests == {path: path.rpartition(":")[2]}
    assert most_memory(gateway) - before < HELD
    row = gateway.row(answer)
    assert (row["tokens_used"], row["attempts"]) == (0, 1)


def test_who_takes_slowly_makes_the_sender_wait(gateway: Gateway, store: Store) -> None:
    operator = gateway.someone(role=Role.OPERATOR)
    store.open.clear()
    before, sent = most_memory(gateway), 0
    with socket.create_connection(gateway.address, timeout=1) as client:
        client.sendall(
            f"POST /api/blobs/sha256:0 HTTP/1.1\r\nhost: x\r\ncontent-length: {SIZE}\r\n"
            f"authorization: Bearer {operator.token}\r\n\r\n".encode()
        )
        with suppress(TimeoutError):
            while sent < HELD:
                sent += client.send(PIECE)
        assert sent < HELD
        assert most_memory(gateway) - before < HELD
        client.settimeout(PATIENCE)
        store.open.set()
        taken = store.taken
        client.sendall(PIECE)
        until(lambda: store.taken > taken)


def test_who_may_not_upload_is_refused_before_the_body(gateway: Gateway, store: Store) -> None:
    user = gateway.someone()
    with socket.create_connection(gateway.address, timeout=PATIENCE) as client:
        client.sendall(
            f"POST /api/blobs/sha256:1 HTTP/1.1\r\nhost: x\r\ncontent-length: {SIZE}\r\n"
            f"authorization: Bearer {user.token}\r\n\r\n".encode()
        )
        assert client.recv(65536).startswith(b"HTTP/1.1 403 ")
    assert "/api/blobs/sha256:1" not in store.digests
