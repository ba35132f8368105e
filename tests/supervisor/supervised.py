"""`parallama up` as a process of its own, on a folder made for one test."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.gateway import Gateway, Json, initialised, until
from tests.standin import StandIn

CHAT = {"model": "smollm2", "messages": [], "stream": True}
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("PARALLAMA_")}
UP = (str(Path(sys.executable).with_name("parallama")), "up", "--config")


def made(folder: Path, upstream_url: str, settings: str = "") -> Path:
    """A folder as `parallama init` leaves it; its config.yaml."""
    path = initialised(folder, upstream_url)
    with path.open("a") as file:
        file.write(settings)
    return path


def start(
    config: Path, *, environ: Mapping[str, str] | None = None, **more: Any
) -> "subprocess.Popen[bytes]":
    """The process that `parallama up` becomes; what it says is in up.log."""
    with (config.parent / "up.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "parallama.supervisor", config],
            env={**ENVIRON, **(environ or {})},
            **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **more},
        )


@contextmanager
def up(
    folder: Path,
    upstream: StandIn,
    settings: str = "",
    *,
    environ: Mapping[str, str] | None = None,
    until_event: tuple[str, Json] = ("serving", {"service": "up"}),
    **more: Any,
) -> Iterator[Gateway]:
    """Serves when the block begins. How it ends is for the test to say; nothing is left behind."""
    config = folder / "config.yaml"
    if not config.exists():
        made(folder, upstream.url, settings)
    gateway = Gateway(folder, upstream, start(config, environ=environ, **more))
    try:
        event, facts = until_event
        wait_for_event(gateway, event, **facts)
        yield gateway
    finally:
        gateway.http.close()
        gateway.process.kill()
        gateway.process.wait(5)


def wait_for_event(gateway: Gateway, event: str, **facts: object) -> Json:
    """The last line of the log with this event and these facts, now or soon."""
    wanted = {"event": event, **facts}

    def found() -> Json | None:
        lines = [line for line in gateway.events() if wanted.items() <= line.items()]
        if not lines and gateway.process.poll() is not None:
            raise AssertionError(gateway.log())
        return lines[-1] if lines else None

    return until(found) or {}


def exit_code(gateway: Gateway, seconds: float = 15) -> int:
    return gateway.process.wait(seconds)


def all_end(pids: list[int], seconds: float = 5) -> None:
    until(lambda: not any(map(alive, pids)), seconds)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def terminate(gateway: Gateway) -> None:
    gateway.process.send_signal(signal.SIGTERM)


def refused(config: Path, *, environ: Mapping[str, str] | None = None) -> str:
    """What `parallama up` says when it does not even start; it must leave nothing running."""
    done = subprocess.run(
        [*UP, config],
        env={**ENVIRON, **(environ or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=20,
        check=False,
        text=True,
    )
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout
