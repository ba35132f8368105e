"""What cuts answers inside Envoy, on a host of our own: envoy/wasm/streams.wat."""

import struct
from collections.abc import Callable
from typing import Any

import pytest
import wasmtime

from authz.streams import JUDGE
from authz.watched import SLOT, cut, streams_in
from parallama.contract import AUTHZ, WATCH
from tests.envoy.lua_host import ROOT

FOLDER = ROOT / "envoy" / "wasm"
OK, NOT_FOUND, GRPC_ANSWER, PAGE = 0, 1, 5, 65536


def test_the_binary_is_made_of_the_text() -> None:
    made = wasmtime.wat2wasm((FOLDER / "streams.wat").read_text())
    assert bytes(made) == (FOLDER / "streams.wasm").read_bytes(), "run `make wasm`"


class Host:
    """One of Envoy's workers, as far as the module calls it."""

    def __init__(self) -> None:
        self.words: dict[int, str] = {}
        self.asked: list[bytes] = []
        self.cut: list[tuple[int, int, bytes, bytes, bytes]] = []
        self.period = 0
        self.reachable = True
        self._answer = b""
        self._stream = 0
        self._store = wasmtime.Store()
        functions: list[Callable[..., int]] = [
            self._tick_every, self._property, self._grpc_call, self._buffer, self._set_stream,
            self._local_response,
        ]  # fmt: skip
        module = wasmtime.Module(self._store.engine, (FOLDER / "streams.wasm").read_bytes())
        i32 = wasmtime.ValType.i32()
        imports = [
            wasmtime.Func(
                self._store,
                wasmtime.FuncType([i32] * len(wanted.type.params), [i32]),  # type: ignore[union-attr]
                does,
            )
            for wanted, does in zip(module.imports, functions, strict=True)
        ]
        self._it: Any = wasmtime.Instance(self._store, module, imports).exports(self._store)
        self._call("configure", 1, 0)

    def _call(self, what: str, *given: int) -> Any:
        return self._it[f"proxy_on_{what}"](self._store, *given)

    # What Envoy tells the module.

    def begin(self, stream: int, word: str | None) -> None:
        self._stream = stream
        if word is not None:
            self.words[stream] = word
        assert self._call("request_headers", stream, 5, 0) == 0, "it goes on"

    def end(self, stream: int) -> None:
        self._call("delete", stream)

    def tick(self) -> list[tuple[int, str]]:
        """What it asks about."""
        before = len(self.asked)
        self._call("tick", 1)
        new = self.asked[before:]
        return [(number, word.decode()) for m in new for number, word in streams_in(m)]

    def answer(self, told: bytes) -> None:
        self._answer = told
        self._call("grpc_receive", 1, 9, len(told))

    def fail(self) -> None:
        self._call("grpc_close", 1, 9, 14)

    # What the module asks of Envoy.

    def _read(self, at: int, size: int) -> bytes:
        return bytes(self._it["memory"].read(self._store, at, at + size))

    def _write(self, data: bytes, at: int) -> None:
        self._it["memory"].write(self._store, data, at)

    def _hand_over(self, data: bytes, where: int, size: int) -> None:
        room = self._call("memory_allocate", len(data))
        self._write(data, room)
        self._write(struct.pack("<I", room), where)
        self._write(struct.pack("<I", len(data)), size)

    def _tick_every(self, milliseconds: int) -> int:
        self.period = milliseconds
        return OK

    def _property(self, path: int, size: int, where: int, length: int) -> int:
        asked = self._read(path, size).decode()
        assert asked.split("\0") == ["metadata", "filter_metadata", AUTHZ, WATCH]
        if self._stream not in self.words:
            return NOT_FOUND
        self._hand_over(self.words[self._stream].encode(), where, length)
        return OK

    def _grpc_call(self, *given: int) -> int:
        texts = [
            self._read(at, size) for at, size in zip(given[0:10:2], given[1:10:2], strict=True)
        ]
        cluster, service, method, headers, message = texts
        assert f"/{service.decode()}/{method.decode()}" == JUDGE
        assert (cluster, headers) == (b"authz", b"")
        assert given[10] <= 1000
        if not self.reachable:
            return NOT_FOUND
        self.asked.append(message)
        return OK

    def _buffer(self, which: int, start: int, size: int, where: int, length: int) -> int:
        assert (which, start, size) == (GRPC_ANSWER, 0, len(self._answer))
        self._hand_over(self._answer, where, length)
        return OK

    def _set_stream(self, stream: int) -> int:
        self._stream = stream
        return OK

    def _local_response(self, status: int, *given: int) -> int:
        texts = [self._read(at, size) for at, size in zip(given[0:6:2], given[1:6:2], strict=True)]
        self.cut.append((self._stream, status, *texts))
        return OK


@pytest.fixture
def host() -> Host:
    return Host()


def test_it_asks_four_times_a_second_and_only_while_something_runs(host: Host) -> None:
    assert host.period == 400
    assert host.tick() == []
    host.begin(2, "word of two")
    host.begin(3, None)
    host.begin(4, "")
    host.begin(5, "x" * (SLOT - 7))
    assert host.tick() == [(2, "word of two")]
    host.answer(b"")
    host.end(2)
    host.end(3)
    assert host.tick() == []


def test_it_waits_for_an_answer_before_it_asks_again(host: Host) -> None:
    host.begin(2, "w")
    assert host.tick()
    assert host.tick() == []
    host.fail()
    assert host.tick()
    host.answer(b"")
    assert host.tick()
    host.fail()
    host.reachable = False
    assert host.tick() == []
    host.reachable = True
    assert host.tick()


def test_those_that_end_are_forgotten_wherever_they_stand(host: Host) -> None:
    for stream in range(2, 8):
        host.begin(stream, f"w{stream}")
    for stream in (2, 7, 4, 99):
        host.end(stream)
    assert sorted(host.tick()) == [(3, "w3"), (5, "w5"), (6, "w6")]


def test_it_cuts_what_it_is_told_to_and_what_still_runs(host: Host) -> None:
    for stream in (2, 3, 4):
        host.begin(stream, f"w{stream}")
    host.tick()
    host.end(3)
    host.answer(cut(4, "openai") + cut(3, "openai") + cut(2, "ollama"))
    assert [(stream, status, why) for stream, status, why, *_ in host.cut] == [
        (4, 401, b"credential_revoked"),
        (2, 401, b"credential_revoked"),
    ]
    for (_, _, _, body, headers), dialect in zip(host.cut, ("openai", "ollama"), strict=True):
        assert body == cut(0, dialect)[12:]
        pairs = struct.pack("<III", 1, 12, 16) + b"content-type\0application/json\0"
        assert headers == pairs


def test_very_many_are_asked_about_in_turns(host: Host) -> None:
    many = 5000
    for stream in range(many):
        host.begin(stream + 2, f"w{stream}")
    first = host.tick()
    host.answer(b"".join(cut(number, "openai") for number, _ in first[-500:]))
    second = host.tick()
    assert (len(first), len(second)) == (4096, many - 4096)
    assert {number for number, _ in first + second} == set(range(2, many + 2))
    assert len(host.cut) == 500
    host.answer(b"")
    assert host.tick() == first
