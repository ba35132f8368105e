"""
The trail: each finished request as a line of JSON that Envoy appends to a file.

It outlives whoever reads it. usage_sink stores what the gRPC log did not bring, remembers up to
where that is done, and removes files that are done with. A request's id makes its row unique, so
reading a line again is safe at any time.

    trail/usage.jsonl             Envoy writes here
    trail/usage.00000001.jsonl    was renamed, and is read to its end
    trail/read.json               up to where every file is stored
    trail/refused.jsonl           what could not be stored, each with the reason

One process at a time reads it; one that is to take its place waits (`Trail.take_turn`).
"""

import fcntl
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from parallama.finished import Finished, finished
from parallama.usage import UsageRecord

VERSION = 1
"""Of a line. envoy.yaml writes it; what bears another one is kept aside."""

_CURRENT = "usage.jsonl"
_RENAMED = re.compile(r"usage\.(\d{8,})\.jsonl")
_REFUSED = "refused.jsonl"
_IN_REPAIR = "repair.jsonl"
_READ = "read.json"
_LOCK = "lock"
_TURN = "turn"

# Envoy sorts the members of a line, and `id` is the first. No text inside a line looks like this:
# the quotes in it are escaped.
_BEGIN = b'{"id":"'
_HEAD_BYTES = 16 * 1024
_BLOCK_BYTES = 256 * 1024
_LONGEST_LINE = 16 * 1024 * 1024  # what has no end by then is no line


class Unreadable(Exception):
    """A line that is not one of ours. The message says why, and holds nothing of the line."""


def request_id(line: bytes) -> str | None:
    """The id of a line, without reading the rest; None where it does not begin as ours do."""
    end = line.find(b'"', len(_BEGIN))
    if end < 0 or not line.startswith(_BEGIN):
        return None
    return line[len(_BEGIN) : end].decode("ascii", "replace")


def parse(line: bytes) -> Finished | None:
    """What a line says; None for a request of nobody we know. Raises Unreadable."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        raise Unreadable("not a whole line of JSON") from None
    version = told.get("v") if isinstance(told, dict) else None
    if type(version) is not int:
        raise Unreadable("not a line of the trail: it has no version")
    if version != VERSION:
        raise Unreadable(f"written by another version: v is {version}, not {VERSION}")
    try:
        first = told["upstream_first_us"]
        return finished(
            request_id=_text(told["id"]),
            start=int(_text(told["start_us"])),
            duration=told["lasted_ms"] / 1000,
            first_byte=None if first is None else first / 1e6,
            status=told["status"] or 0,
            flags="" if told["response_flags"] == "-" else _text(told["response_flags"]),
            details=_text(told["reason"] or ""),
            upstream=_address(told["upstream"]),
            who=told["who"] or {},
            lua=told["lua"] or {},
            limits=told["limits"] or {},
            attempts=int(told.get("tries") or 0),  # lines of an earlier version have none
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, OSError):
        raise Unreadable("facts are missing, or of another kind") from None


def _address(value: object) -> str | None:
    """Of a model server. What has no port is a socket of ours, where lists are answered."""
    at = None if value is None else _text(value)
    return at if at and ":" in at else None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


@dataclass(frozen=True, slots=True)
class Line:
    offset: int
    text: bytes

    def parts(self) -> Iterator["Line"]:
        """
        An Envoy that was killed leaves half a line behind, and the next one writes on after it; so
        does one whose disk was full. The pieces, each from where a line begins.
        """
        begin = 0
        while begin < len(self.text):
            end = self.text.find(_BEGIN, begin + 1)
            end = len(self.text) if end < 0 else end
            yield Line(self.offset + begin, self.text[begin:end])
            begin = end


@dataclass(frozen=True, slots=True)
class Letter:
    """What could not be stored: a line of the trail, or a row that the database refused."""

    reason: str
    file: str = ""
    offset: int = 0
    line: bytes | None = None
    row: UsageRecord | None = None

    def dump(self) -> bytes:
        facts: dict[str, Any] = {"reason": self.reason}
        if self.row is not None:
            facts["row"] = asdict(self.row)
        else:
            facts |= {"file": self.file, "offset": self.offset}
            # What is no UTF-8 is kept as well, and read back as it was.
            facts["line"] = (self.line or b"").decode("utf-8", "surrogateescape")
        return json.dumps(facts, default=str).encode() + b"\n"

    @staticmethod
    def load(text: bytes) -> "Letter":
        """Raises ValueError for what was not written by `dump`."""
        try:
            facts = json.loads(text)
            if "row" in facts:
                row = facts["row"]
                row["timestamp"] = datetime.fromisoformat(row["timestamp"])
                row["cost"] = None if row["cost"] is None else Decimal(row["cost"])
                return Letter(facts["reason"], row=UsageRecord(**row))
            line = facts["line"].encode("utf-8", "surrogateescape")
            return Letter(facts["reason"], facts["file"], facts["offset"], line)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ValueError("not a letter") from error


class Trail:
    """
    The folder. A file is known by its first line, wherever it is renamed to: that holds a request's
    id, so no other file begins so. All methods raise OSError where the disk does not let them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._turn: int | None = None

    async def take_turn(self, pause: Callable[[], Awaitable[None]]) -> None:
        """Return when nobody else reads the trail. It is ours until `end_turn`, or our death."""
        turn = os.open(self.folder / _TURN, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                await pause()
        except BaseException:
            os.close(turn)
            raise
        self._turn = turn

    def end_turn(self) -> None:
        if self._turn is not None:
            os.close(self._turn)
            self._turn = None

    @property
    def is_ours(self) -> bool:
        return self._turn is not None

    @property
    def current(self) -> Path:
        return self.folder / _CURRENT

    def make(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def files(self) -> list[Path]:
        """The oldest first, the one that Envoy writes last."""
        renamed = sorted(
            (int(found[1]), path)
            for path in self._listed()
            if (found := _RENAMED.fullmatch(path.name))
        )
        last = [self.current] if self.current.exists() else []
        return [path for _, path in renamed] + last

    def rename(self) -> Path:
        """Put the current file behind the others. Envoy writes to it until it is told to reopen."""
        numbers = [
            int(found[1]) for path in self._listed() if (found := _RENAMED.fullmatch(path.name))
        ]
        path = self.folder / f"usage.{max(numbers, default=0) + 1:08}.jsonl"
        self.current.rename(path)
        return path

    def remove(self, path: Path) -> None:
        path.unlink()

    def size(self) -> int:
        """Bytes of everything in the folder. One that is not there is empty."""
        total = 0
        for path in self._listed():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def waiting(self) -> int:
        """Bytes of lines that are not known to be stored."""
        read, waiting = self.load_read(), 0
        for path in self.files():
            with suppress(FileNotFoundError), path.open("rb") as file:
                key, size = look(file)
                waiting += size - min(size, read.get(key, 0))
        return waiting

    def _listed(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except FileNotFoundError:
            return []

    # Up to where it is stored.

    def load_read(self) -> dict[str, int]:
        """Offsets by what `look` calls a file. Empty where nothing is known: all is read again."""
        try:
            told = json.loads((self.folder / _READ).read_bytes())
            return {str(key): int(offset) for key, offset in told["read"].items() if offset >= 0}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return {}

    def save_read(self, read: Mapping[str, int]) -> None:
        fresh = self.folder / f"{_READ}.new"
        fresh.write_text(json.dumps({"v": 1, "read": dict(read)}), encoding="utf-8")
        os.replace(fresh, self.folder / _READ)

    # What could not be stored.

    def set_aside(self, letters: Iterable[Letter]) -> None:
        """Returns when they are in the file, all of them."""
        text = b"".join(letter.dump() for letter in letters)
        with self._locked(), (self.folder / _REFUSED).open("ab") as file:
            at = file.tell()
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(at)
                raise

    def letters(self) -> list[bytes]:
        """All of them, as they stand there."""
        return [
            text
            for path in (self.folder / _IN_REPAIR, self.folder / _REFUSED)
            if path.exists()
            for text in path.read_bytes().splitlines()
        ]

    def take_letters(self) -> list[bytes]:
        """
        Take them all out, to see which can be stored by now. They are kept until `drop_letters`:
        who dies in between gets them again.
        """
        repair, refused = self.folder / _IN_REPAIR, self.folder / _REFUSED
        with self._locked():
            if repair.exists() and refused.exists():
                with repair.open("ab") as file:
                    file.write(refused.read_bytes())
                refused.unlink()
            elif refused.exists():
                refused.rename(repair)
        return repair.read_bytes().splitlines() if repair.exists() else []

    def drop_letters(self, left: Sequence[Letter] = ()) -> None:
        """Those that were taken, but for these."""
        if left:
            self.set_aside(left)
        (self.folder / _IN_REPAIR).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody writes into a file that another process has just renamed."""
        lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def look(file: BinaryIO) -> tuple[str, int]:
    """By what a file is known, and its size. One without a whole line has no name yet."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    first, end, _ = head.partition(b"\n")
    if not end and len(head) < _HEAD_BYTES:
        return "", size
    return blake2b(first, digest_size=12).hexdigest(), size


def read(file: BinaryIO, offset: int, limit: int, *, last: bool = False) -> tuple[list[Line], int]:
    """
    The next whole lines from `offset` on, none beyond `limit`; and where the next read begins.

    With `last`, what has no end at the end of the file is a line as well.
    """
    wanted = _BLOCK_BYTES
    while True:
        file.seek(offset)
        text = file.read(min(wanted, limit - offset))
        end = text.rfind(b"\n") + 1
        whole = offset + len(text) >= limit
        if end or len(text) >= _LONGEST_LINE or whole or not text:
            break
        wanted *= 8
    if not end and (len(text) >= _LONGEST_LINE or (whole and last)):
        end = len(text)
    return list(_lines(text[:end], offset)), offset + end


def _lines(text: bytes, offset: int) -> Iterator[Line]:
    for line in text.split(b"\n"):
        if line:
            yield Line(offset, line)
        offset += len(line) + 1


def understood(lines: Sequence[Line], file: str) -> tuple[list[Finished], list[Letter]]:
    """What can be read of them, and what cannot."""
    found: list[Finished] = []
    letters: list[Letter] = []
    for line in lines:
        try:
            each = [parse(line.text)]
        except Unreadable:
            each = []
            for part in line.parts():
                try:
                    each.append(parse(part.text))
                except Unreadable as error:
                    letters.append(Letter(str(error), file, part.offset, part.text))
        found += [one for one in each if one is not None]
    return found, letters
