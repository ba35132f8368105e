"""The faults."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.gateway import Gateway, until
from tests.faults.databases import DATABASES, Books, Postgresql
from tests.supervisor.supervised import alive, start

_DISK = "8m"
"""Room for a few thousand lines; a small part of it is left when the disk is full."""


class CannotHappenHere(Exception):
    """This machine does not let the fault be made."""


@dataclass(frozen=True, slots=True)
class Stage:
    gateway: Gateway
    books: Books


@dataclass(frozen=True, slots=True)
class Fault:
    """`happens` so many `times` at random moments, on a gateway whose folder is `prepared`."""

    happens: Callable[[Stage], None]
    times: int = 1
    databases: tuple[str, ...] = DATABASES
    prepared: Callable[[Path], AbstractContextManager[None]] = lambda folder: nullcontext()
    kills_envoy: bool = False
    """
    It takes the end of some requests with it: rows that say so are right then, and those of refused
    requests may be missing, for which nothing was held.
    """


def _kill(name: str) -> Callable[[Stage], None]:
    """And wait until it is back."""

    def happens(stage: Stage) -> None:
        pid = stage.gateway.child(name)
        os.kill(pid, signal.SIGKILL)
        until(lambda: stage.gateway.child(name) != pid, 30)

    return happens


def _kill_supervisor(stage: Stage) -> None:
    """With it go all its children; then somebody starts it again."""
    gateway = stage.gateway
    pids = gateway.processes()
    gateway.process.kill()
    gateway.process.wait()
    until(lambda: not any(map(alive, pids)), 30)
    log = gateway.folder / "up.log"
    log.rename(log.with_name(f"up-{gateway.process.pid}.log"))
    gateway.process = start(gateway.folder / "config.yaml")
    until(
        lambda: {"up"} & {at["service"] for at in gateway.events() if at["event"] == "serving"}, 60
    )


def _stop(name: str, seconds: float) -> Callable[[Stage], None]:
    def happens(stage: Stage) -> None:
        pid = stage.gateway.child(name)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    return happens


def _database_away(seconds: float) -> Callable[[Stage], None]:
    def happens(stage: Stage) -> None:
        with stage.books.away():
            time.sleep(seconds)

    return happens


def _kill_postgres(stage: Stage) -> None:
    assert isinstance(stage.books, Postgresql)
    stage.books.die()


def _database_silent(seconds: float) -> Callable[[Stage], None]:
    def happens(stage: Stage) -> None:
        assert isinstance(stage.books, Postgresql)
        with stage.books.silent():
            time.sleep(seconds)

    return happens


def _trail(folder: Path) -> Path:
    return folder / "state" / "trail"


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """The trail has a file system to itself."""
    trail = _trail(folder)
    trail.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    trail.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK},mode=700", "tmpfs", str(trail)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        raise CannotHappenHere("this user may not mount a small disk") from None
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(trail)], check=True)


def _full_disk(seconds: float) -> Callable[[Stage], None]:
    def happens(stage: Stage) -> None:
        ballast = _trail(stage.gateway.folder) / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 1000)
        time.sleep(seconds)
        ballast.unlink()

    return happens


FAULTS: dict[str, Fault] = {
    "nothing": Fault(lambda stage: None),
    "kill usage_sink": Fault(_kill("usage_sink"), times=5),
    "kill ratelimit": Fault(_kill("ratelimit"), times=5),
    "kill authz": Fault(_kill("authz"), times=5),
    "kill valkey": Fault(_kill("valkey"), times=5),
    "kill postgres": Fault(_kill_postgres, times=5, databases=("postgres",)),
    "kill envoy": Fault(_kill("envoy"), times=5, kills_envoy=True),
    "kill supervisor": Fault(_kill_supervisor, times=3),
    "stop usage_sink": Fault(_stop("usage_sink", 30)),
    "database away": Fault(_database_away(60)),
    "database silent": Fault(_database_silent(60), databases=("postgres",)),
    "full disk": Fault(_full_disk(10), prepared=_small_disk),
}
