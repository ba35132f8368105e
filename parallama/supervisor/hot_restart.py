"""
Envoy's hot restart: a new process takes over the listening sockets of one that runs.

What Envoy 1.40 needs of us for it (docs/decisions/0013): a number of its own on this machine, a
flag put right that a process which died while it started leaves behind, and somebody who listens
where the new process looks for the old one once that has ended.
"""

import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

_SHARED = Path("/dev/shm")  # noqa: S108  where shm_open of glibc puts it
_SOCKETS = "run/envoy"

# `struct SharedMemory` in Envoy's source/server/hot_restart_impl.h: size, version, two mutexes,
# flags; "11.104" is what --hot-restart-version says of it.
_HEADER = struct.Struct("<QQ")
_KNOWN = (104, 11)
_FLAGS = 96

# By then the old process was ended by us, or Envoy does it.
_LAST_RESORT_SECONDS = 120


class Lineage:
    """
    The Envoys of one state folder, each the successor of the one before it.

    `epoch` is the number of the one that runs. Works in state_dir, where their sockets are: those
    in the file system are for this user alone, which abstract ones would not be.
    """

    def __init__(self, state_dir: Path) -> None:
        found = state_dir.stat()
        name = blake2b(f"{found.st_dev}:{found.st_ino}".encode(), digest_size=4).digest()
        self.epoch = 0
        self._base = int.from_bytes(name, "big") >> 5  # times 10 it is an int of 32 bits

    def arguments(self, epoch: int, drain_seconds: float) -> Sequence[str]:
        if not self.possible:
            return ["--disable-hot-restart"]
        return [
            *("--base-id", str(self._base)),
            *("--restart-epoch", str(epoch)),
            *("--socket-path", _SOCKETS),
            *("--socket-mode", "600"),
            *("--parent-shutdown-time-s", str(int(drain_seconds) + _LAST_RESORT_SECONDS)),
            # Asking for them blocks, and ends an Envoy whose predecessor has died.
            "--skip-hot-restart-parent-stats",
        ]

    @property
    def possible(self) -> bool:
        return os.access(_SHARED, os.W_OK | os.X_OK)

    def clear(self) -> None:
        """Let a new process start, also where the last one died while it did."""
        with suppress(OSError), self._memory.open("r+b") as memory:
            if _HEADER.unpack(memory.read(_HEADER.size)) == _KNOWN:
                memory.seek(_FLAGS)
                memory.write(bytes(8))

    def bury(self, epoch: int, mourner: socket.socket) -> None:
        """
        Have `mourner` listen in the place of the process of this epoch, which has ended.

        Its successor still has a message for it. Envoy would wait for ten seconds, all of it, until
        it is taken, and then abort. That successor holds the socket, too: it lasts as long.
        """
        path = f"{_SOCKETS}_parent_{self._base * 10 + epoch % 3}"
        with suppress(FileNotFoundError):
            os.unlink(path)
        mourner.bind(path)

    def forget(self) -> None:
        """All have ended: nothing of them stays behind."""
        with suppress(OSError):
            self._memory.unlink()

    @property
    def _memory(self) -> Path:
        return _SHARED / f"envoy_shared_memory_{self._base * 10}"
