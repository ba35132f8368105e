"""One child process that is kept running."""

import asyncio
import ctypes
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parallama.errors import ParallamaError

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 10.0
# A child that lived this long was well: its next death starts the back-off anew.
_WELL_SECONDS = 10.0
_LOOP_DEATHS = 4
_READY_POLL_SECONDS = 0.02

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Command:
    """
    What to run, and how to tell that it serves.

    `death_signal` is what the kernel sends when the supervisor itself is killed: SIGTERM only to
    those that have something to save and end by themselves in bounded time.
    """

    name: str
    argv: Sequence[str]
    ready: Callable[[], Awaitable[bool]]
    cwd: Path
    env: Mapping[str, str]
    start_seconds: float = 30.0
    stop_seconds: float = 10.0
    death_signal: signal.Signals = signal.SIGKILL


@dataclass
class Child:
    """Runs a Command again whenever it dies, with growing pauses, until `stop`."""

    command: Command
    on_change: Callable[[], None]
    keep_open: Sequence[int] = ()
    restarts: int = 0
    state: str = "waiting"
    pid: int | None = None
    _process: asyncio.subprocess.Process | None = None
    _stopping: bool = False
    _settled: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Keep the child running; returns after `stop`."""
        pause, deaths = _FIRST_PAUSE_SECONDS, 0
        while not self._stopping:
            started = time.monotonic()
            code = await self._once()
            if self._stopping:
                break
            if time.monotonic() - started > _WELL_SECONDS:
                pause, deaths = _FIRST_PAUSE_SECONDS, 0
            deaths += 1
            self.restarts += 1
            facts = {"child": self.command.name, "exit": _exit(code), "again_in_s": pause}
            if deaths >= _LOOP_DEATHS:
                self._become("crash loop")
                log.error("child keeps dying", extra=facts | {"deaths": deaths})
                self._settled.set()
            else:
                self._become("restarting")
                log.warning("child died", extra=facts)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
        self._become("stopped")

    async def serving(self) -> None:
        """Wait until the child serves for the first time, or say that it does not."""
        try:
            async with asyncio.timeout(self.command.start_seconds):
                await self._settled.wait()
        except TimeoutError:
            pass
        if self.state != "serving":
            raise ParallamaError(
                f"{self.command.name} does not start: its own messages say why, here or in state_dir"
            )

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL where that is not enough."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            process.terminate()
            async with asyncio.timeout(self.command.stop_seconds):
                await process.wait()
        except ProcessLookupError:
            return
        except TimeoutError:
            log.warning("child killed", extra={"child": self.command.name})
            process.kill()
            await process.wait()

    async def _once(self) -> int:
        parent = os.getpid()
        death_signal = self.command.death_signal

        def die_with_parent() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, death_signal)
            if os.getppid() != parent:
                os._exit(1)

        self._process = process = await asyncio.create_subprocess_exec(
            *self.command.argv,
            cwd=self.command.cwd,
            env=dict(self.command.env),
            stdin=asyncio.subprocess.DEVNULL,
            # Ctrl-C is for the supervisor, which then stops its children in order.
            start_new_session=True,
            pass_fds=self.keep_open,
            preexec_fn=die_with_parent,
        )
        self.pid = process.pid
        self._become("starting")
        watching = asyncio.create_task(self._until_ready(), name=f"{self.command.name} ready")
        try:
            return await process.wait()
        finally:
            watching.cancel()
            self.pid = None

    async def _until_ready(self) -> None:
        while not await self.command.ready():  # noqa: ASYNC110  it is another process
            await asyncio.sleep(_READY_POLL_SECONDS)
        self._become("serving")
        self._settled.set()

    def _become(self, state: str) -> None:
        self.state = state
        self.on_change()


def _exit(code: int) -> str:
    if code >= 0:
        return f"code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
