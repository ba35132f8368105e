"""CPU time and memory of a process and all below it, from /proc."""

import os
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _label(pid: int) -> str:
    """What a person would call this process: `envoy`, `valkey`, `authz`, `parallama`."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    name = os.path.basename(words[0])
    if name.startswith("python"):
        if "-m" in words:
            return words[words.index("-m") + 1]
        name = next((os.path.basename(w) for w in words[1:] if not w.startswith("-")), name)
    if "valkey" in name or "redis" in name:
        return "valkey"
    return name.removesuffix(".py")


def tree(root: int) -> dict[int, str]:
    """The labels of a process and of everything below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int(_stat(int(entry.name))[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found: dict[int, str] = {}
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        try:
            found[pid] = _label(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        waiting += children.get(pid, [])
    return found


def is_python(pid: int) -> bool:
    return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("python")


def argument(pid: int, name: str) -> str | None:
    """The value of a command-line option of a running process."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return words[words.index(name) + 1] if name in words else None


def cpu_seconds(pids: dict[int, str]) -> dict[str, float]:
    """User and system time so far, by label."""
    total: dict[str, float] = {}
    for pid, label in pids.items():
        fields = _stat(pid)
        spent = (int(fields[11]) + int(fields[12])) / _TICK
        total[label] = total.get(label, 0.0) + spent
    return total


@dataclass(frozen=True, slots=True)
class Memory:
    label: str
    rss_mb: float
    pss_mb: float
    """Shared pages divided among those who share them."""
    python: bool


def memory(pids: dict[int, str]) -> list[Memory]:
    found = []
    for pid, label in sorted(pids.items(), key=lambda item: item[1]):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        kb = {line.split()[0].rstrip(":"): int(line.split()[1]) for line in lines}
        found.append(Memory(label, kb["Rss"] / 1024, kb["Pss"] / 1024, is_python(pid)))
    return found
