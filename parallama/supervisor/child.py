"""One child process that is kept running."""

import asyncio
import ctypes
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
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
_PROGRESS_SECONDS = 5.0

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Command:
    """
    What to run, and how to tell that it serves, which `ready` is asked with its process id.

    `argv_again` is what to run once it has died, where that is something else. `keep_open` are file
    descriptors for the first life. `death_signal` is
    what the kernel sends when the supervisor itself is killed: SIGTERM only to those that have
    something to save and end by themselves in bounded time. `messages` says where an operator finds
    what the child had to say.
    """

    name: str
    argv: Sequence[str]
    ready: Callable[[int], Awaitable[bool]]
    cwd: Path
    env: Mapping[str, str]
    argv_again: Sequence[str] = ()
    keep_open: Sequence[int] = ()
    start_seconds: float = 30.0
    stop_seconds: float = 10.0
    death_signal: signal.Signals = signal.SIGKILL
    messages: str = "above"


def dies_with_us(death_signal: signal.Signals) -> Callable[[], None]:
    """For a process to call before it becomes another program."""
    parent = os.getpid()

    def ask_the_kernel() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, death_signal)
        if os.getppid() != parent:
            os._exit(1)

    return ask_the_kernel


@dataclass
class Backoff:
    """How long a child that died has to wait: longer each time, until it has been well."""

    deaths: int = 0

    def died(self, lived: float) -> float:
        if lived > _WELL_SECONDS:
            self.deaths = 0
        self.deaths += 1
        return float(min(_FIRST_PAUSE_SECONDS * 2 ** (self.deaths - 1), _LONGEST_PAUSE_SECONDS))

    @property
    def looping(self) -> bool:
        return self.deaths >= _LOOP_DEATHS


@dataclass
class Child:
    """
    Runs a Command again whenever it dies, with growing pauses, until `stop`.

    Only one that never served is not tried again: what stops its first start stops the second.
    """

    command: Command
    on_change: Callable[[], None]
    keep_open: Sequence[int] = ()
    restarts: int = 0
    state: str = "waiting"
    pid: int | None = None
    last_exit: str | None = None
    _settled: asyncio.Event = field(default_factory=asyncio.Event)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _free: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._free.set()

    async def run(self) -> None:
        """Keep the child running; returns after `stop`, or when it does not even start."""
        try:
            await self._keep_running()
        finally:
            self._become("stopped")
            self._settled.set()
            self._ended.set()

    async def serving(self) -> None:
        """Return when the child serves for the first time; raises ParallamaError if it does not."""
        name, seconds = self.command.name, self.command.start_seconds
        waiting = asyncio.create_task(self._settled.wait())
        begun = time.monotonic()
        while not waiting.done() and (waited := time.monotonic() - begun) < seconds:
            pause = min(_PROGRESS_SECONDS, seconds - waited)
            if not (await asyncio.wait((waiting,), timeout=pause))[0]:
                log.info("still starting", extra={"child": name})
        waiting.cancel()
        if self.state != "serving":
            why = f"does not answer after {seconds:g} s"
            if self.last_exit is not None:
                why = f"does not start ({self.last_exit})"
            raise ParallamaError(f"{name} {why}: its own messages are {self.command.messages}")

    def hold(self) -> None:
        """While it is held it is not started again: another one may take its place."""
        self._free.clear()

    def release(self) -> None:
        self._free.set()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL where that is not enough; returns when it has ended."""
        self._stopping.set()
        await self._ended.wait()

    async def _keep_running(self) -> None:
        backoff = Backoff()
        while not self._stopping.is_set():
            begun = time.monotonic()
            self.last_exit = await self._once()
            if self._stopping.is_set() or not self._settled.is_set():
                return
            pause = backoff.died(time.monotonic() - begun)
            self.restarts += 1
            self._become("crash loop" if backoff.looping else "restarting")
            log.log(
                logging.ERROR if backoff.looping else logging.WARNING,
                "child keeps dying" if backoff.looping else "child died",
                extra={
                    "child": self.command.name,
                    "exit": self.last_exit,
                    "deaths": backoff.deaths,
                    "again_in_s": pause,
                },
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            await self._until_free()

    async def _until_free(self) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (self._free, self._stopping)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    async def _once(self) -> str:
        """One life of the process; how it ended."""
        try:
            process = await self._spawn()
        except OSError as error:
            return f"cannot be run: {error.strerror}"
        self.pid = process.pid
        self._become("starting")
        watching = asyncio.create_task(self._until_ready(process.pid))
        ended = asyncio.create_task(process.wait())
        told = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((ended, told), return_when=asyncio.FIRST_COMPLETED)
            watching.cancel()
            if not ended.done():
                await self._end(process)
            return _exit(await ended)
        finally:
            if process.returncode is None:
                process.kill()
            watching.cancel()
            told.cancel()
            self.pid = None

    async def _spawn(self) -> asyncio.subprocess.Process:
        again = self.command.argv_again if self.restarts else ()
        inherited = () if self.restarts else self.command.keep_open
        return await asyncio.create_subprocess_exec(
            *(again or self.command.argv),
            cwd=self.command.cwd,
            env=dict(self.command.env),
            stdin=asyncio.subprocess.DEVNULL,
            # Ctrl-C is for the supervisor, which then stops its children in order.
            start_new_session=True,
            pass_fds=(*self.keep_open, *inherited),
            preexec_fn=dies_with_us(self.command.death_signal),
        )

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self.command.stop_seconds):
                await process.wait()
        except TimeoutError:
            log.warning("child killed", extra={"child": self.command.name})
            with suppress(ProcessLookupError):
                process.kill()

    async def _until_ready(self, pid: int) -> None:
        while not await self.command.ready(pid):  # noqa: ASYNC110  it is another process
            await asyncio.sleep(_READY_POLL_SECONDS)
        self._become("serving")
        self._settled.set()
        if self.restarts:
            log.info("child serves again", extra={"child": self.command.name})

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
