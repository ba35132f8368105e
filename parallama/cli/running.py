"""Whether `parallama up` runs on a state folder."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any


def is_up(state_dir: Path) -> bool:
    return pid_of_up(state_dir) is not None


def pid_of_up(state_dir: Path) -> str | None:
    """The process that holds the folder's lock; what is written there alone proves nothing."""
    try:
        lock = os.open(state_dir / "up.lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(lock, 32, 0).decode(errors="replace").strip()
    finally:
        os.close(lock)
    return None


def children(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What the supervisor wrote down about its children, by name."""
    try:
        told = json.loads((run_dir / "children.json").read_text(encoding="utf-8"))
        return {name: dict(child) for name, child in told.items() if "state" in child}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
