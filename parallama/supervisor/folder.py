"""The state folder: made private, and used by one supervisor at a time."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parallama.errors import Conflict, ParallamaError

_POLL_SECONDS = 0.1


@contextmanager
def claim(state_dir: Path, *, wait_seconds: float) -> Iterator[int]:
    """
    Make the folder and hold its lock; gives the lock's file descriptor.

    Children inherit it, so those of a supervisor that was killed hold the lock until they have
    ended, and it is waited for; a supervisor that lives is a Conflict at once.
    """
    with writing(state_dir):
        for folder in (state_dir, state_dir / "run", state_dir / "trail"):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        lock = os.open(state_dir / "up.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(lock, state_dir, wait_seconds)
        with writing(state_dir):
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield lock
    finally:
        os.close(lock)


@contextmanager
def writing(state_dir: Path) -> Iterator[None]:
    """Say what to do where files cannot be written."""
    try:
        yield
    except OSError as error:
        raise ParallamaError(
            f"cannot write in state_dir {state_dir} ({error.strerror}): make it writable,"
            " free some space, or set state_dir to another folder"
        ) from error


def _lock(lock: int, state_dir: Path, wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
            lives = holder.isdecimal() and Path(f"/proc/{holder}").exists()
            if lives or time.monotonic() > deadline:
                raise Conflict(
                    f"another `parallama up` (process {holder}) runs on {state_dir}: stop it first"
                ) from None
            time.sleep(_POLL_SECONDS)


def write_status(state_dir: Path, children: dict[str, dict[str, Any]]) -> None:
    """What `parallama status` reads. A full disk must not end what runs."""
    path = state_dir / "run" / "children.json"
    fresh = path.with_suffix(".new")
    try:
        fresh.write_text(json.dumps(children), encoding="utf-8")
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
