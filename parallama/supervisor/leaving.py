"""An Envoy whose successor takes the new connections: it ends with its own."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LOOK_SECONDS = 0.1
_HANDOVER_SECONDS = 5.0
_ESTABLISHED, _HALF_CLOSED, _LISTEN = "01", "08", "0A"


async def leave(
    pid: int, port: int, trail: Path, *, seconds: float, hurry: asyncio.Event
) -> int | None:
    """
    Wait until its clients are gone, for up to `seconds` or until `hurry`; how many are left.

    Each answer says `connection: close`. None where it cannot be seen.

    Nobody can ask it any more: its admin interface is its successor's. So this also tells it, by a
    signal, to open the trail anew where that was renamed.
    """
    deadline = time.monotonic() + seconds
    seen = _inode(trail)
    while (left := connections(pid, port)) != 0:
        if hurry.is_set() or time.monotonic() >= deadline:
            return left
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_SECONDS):
                await hurry.wait()
        now = _inode(trail)
        if now is not None and now != seen:
            seen = now
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
    return 0


async def stops_listening(pid: int, port: int) -> bool:
    """Whether it stopped to take connections; soon, as its successor takes them."""
    deadline = time.monotonic() + _HANDOVER_SECONDS
    while listens(pid, port):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_LOOK_SECONDS / 10)
    return True


def connections(pid: int, port: int) -> int | None:
    """How many clients are connected; None where the system does not tell."""
    return _count(pid, port, {_ESTABLISHED, _HALF_CLOSED})


def listens(pid: int, port: int) -> bool:
    """Where the system does not tell: yes."""
    return _count(pid, port, {_LISTEN}) != 0


def _count(pid: int, port: int, states: set[str]) -> int | None:
    try:
        mine = set(_sockets(pid))
        return len(mine.intersection(_inodes(pid, port, states)))
    except FileNotFoundError:  # it has ended
        return 0
    except OSError:
        return None


def _sockets(pid: int) -> Iterator[str]:
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed in the meantime
            target = os.readlink(fd)
            if target.startswith("socket:["):
                yield target[8:-1]


def _inodes(pid: int, port: int, states: set[str]) -> Iterator[str]:
    for name in ("tcp", "tcp6"):
        table = Path(f"/proc/{pid}/net/{name}")
        if not table.exists():
            continue
        for line in table.read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state in states and int(local.rpartition(":")[2], 16) == port:
                yield rest[5]


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
