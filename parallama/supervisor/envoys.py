"""Envoy, one after the other: its files, how each hands over to the next, and how it ends."""

import asyncio
import logging
import os
import signal
import socket
import time
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

from parallama.config import Config
from parallama.errors import ParallamaError
from parallama.stores import socket_path
from parallama.supervisor import children, envoy_admin, envoy_files, folder, leaving
from parallama.supervisor.address import check_free
from parallama.supervisor.child import Child, Command, dies_with_us
from parallama.supervisor.hot_restart import Lineage

log = logging.getLogger("parallama.up")

_ENVOYS_WORDS = 800
_TRAIL = Path("trail/usage.jsonl")
_TRIAL_SECONDS = 10.0
_UNWELL_SECONDS = 2.0  # for which it says so itself
_POLL_SECONDS = 0.02


class Envoys:
    """
    Works in state_dir. Once `hurry` is set, nothing waits for running requests any more.

    `model_port` is that of the bundled model, where it is to be asked.
    """

    def __init__(self, config: Config, hurry: asyncio.Event) -> None:
        self.model_port: int | None = None
        self._state_dir = config.state_dir
        self._admin = config.run_dir / "envoy-admin.sock"
        self._hurry = hurry
        self._lineage = Lineage(config.state_dir)
        self._config = config  # of the one that runs
        self._mourner: socket.socket | None = None  # of its predecessor
        self._number = 0  # of the files that the newest one was given
        self._before = 0  # of those of its predecessor
        self._placing = asyncio.Lock()

    # Files.

    async def place(self, config: Config, *, starting: bool) -> None:
        """Write them, have Envoy check all of them, and only then put them in their place."""
        async with self._placing:
            number = self._number + starting
            names = envoy_files.starting(number) if starting else envoy_files.RELOADING
            await self._write(config, number)
            with folder.writing(self._state_dir):
                envoy_files.place(names, self._checked, self._state_dir / "envoy")
            self._number = number

    async def _write(self, config: Config, number: int) -> None:
        """Where no Envoy that runs reads them, and have them checked there."""
        upstreams = config.api_gateways.ollama.upstreams()
        if self.model_port is not None:
            upstreams = [("http", "127.0.0.1", self.model_port)]
        with folder.writing(self._state_dir):
            envoy_files.write(config, upstreams, self._checked, number)
            _as_if_placed(self._checked.parent)
        await _check(self._checked)

    @property
    def waiting(self) -> bool:
        """Whether `place` made something that a running Envoy does not take up."""
        return envoy_files.waiting(self._checked, self._state_dir / "envoy", self._number)

    @property
    def _checked(self) -> Path:
        return self._state_dir / "check" / "envoy"

    @property
    def _kept(self) -> Path:
        return self._state_dir / "check" / "before"

    # One after the other.

    async def first(self) -> Command:
        """What to run, once its files are placed."""
        if not self._number:
            await self.place(self._config, starting=True)
        envoy_files.remove_listeners(Path("envoy"), self._number)
        return children.envoy(self._config, self._lineage)

    async def check(self, config: Config, running: Child) -> None:
        """Raises ParallamaError where `next` would, as far as that can be known before."""
        self._check_running(running)
        if config.server.port != self._config.server.port:
            check_free(config)
        async with self._placing:
            await self._write(config, self._number + 1)
            await _try_out(self._checked)

    async def next(self, config: Config, running: Child) -> Command:
        """What to run beside the one that runs. Raises ParallamaError."""
        self._check_running(running)
        with folder.writing(self._state_dir):
            envoy_files.keep(Path("envoy"), self._kept)
        self._before = self._number
        await self.place(config, starting=True)
        if running.restarts:
            self._lineage.epoch = 0
        self._lineage.clear()
        # The last one is its process's alone by now, or was that of one that did not come up.
        if self._mourner is not None:
            self._mourner.close()
        self._mourner = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        epoch, keep_open = self._lineage.epoch + 1, (self._mourner.fileno(),)
        return children.envoy(config, self._lineage, epoch, keep_open)

    def _check_running(self, running: Child) -> None:
        if not self._lineage.possible:
            raise ParallamaError(
                "Envoy cannot hand over its connections here: /dev/shm is not writable"
            )
        if running.state != "serving":
            raise ParallamaError(f"envoy is {running.state}: try again when it serves")

    async def take_back(self, old: Child) -> bool:
        """The next one did not come up. Whether `old` still takes connections."""
        with folder.writing(self._state_dir):
            envoy_files.put_back(self._kept, Path("envoy"))
        self._number = self._before
        envoy_files.remove_listeners(Path("envoy"), self._number)
        return old.pid is not None and leaving.listens(old.pid, self._config.server.port)

    async def see_off(self, old: Child, new: Child, config: Config) -> None:
        """Let `old` end, in whose place is `new` with this configuration."""
        epoch, port = self._lineage.epoch, self._config.server.port
        self._lineage.epoch, self._config = epoch + 1, config

        def bury() -> None:
            if not new.restarts and self._mourner is not None:
                self._lineage.bury(epoch, self._mourner)

        try:
            # Once it was told to take no more connections, the new one has nothing to tell it but
            # that it should end: as soon as the new one ends itself, for example.
            handed_over = old.pid is not None and await leaving.stops_listening(old.pid, port)
            if handed_over:
                bury()
            await self._leave(old, port, keep=self._number)
            await old.stop()
            if not handed_over:
                bury()
            envoy_files.remove_listeners(Path("envoy"), self._number)
        except OSError as error:
            log.warning("envoy's predecessor", extra={"cause": str(error)})
        await old.stop()

    # The last one.

    async def drain(self, envoy: Child) -> None:
        """Let its requests end within drain_seconds, and their log entries leave."""
        seconds = self._config.shutdown.drain_seconds
        log.info("stopping", extra={"requests_may_take_s": seconds})
        admin = socket_path(self._admin)
        try:
            done = await envoy_admin.drain(admin, Path("envoy"), seconds=seconds, hurry=self._hurry)
        except OSError as error:
            log.warning("envoy could not be drained", extra={"cause": str(error) or repr(error)})
            await self._leave(envoy, self._config.server.port)
        else:
            if not done:
                log.warning("requests cut")

    async def _leave(self, envoy: Child, port: int, *, keep: int | None = None) -> None:
        if envoy.pid is None:
            return
        seconds = self._config.shutdown.drain_seconds
        left = await leaving.leave(envoy.pid, port, _TRAIL, seconds=seconds, hurry=self._hurry)
        if left != 0:
            log.info("connections closed", extra={"connections": left})
        envoy_files.close_listeners(Path("envoy"), keep)
        await asyncio.sleep(envoy_admin.FLUSH_SECONDS)

    def forget(self) -> None:
        """All have ended."""
        self._lineage.forget()
        if self._mourner is not None:
            self._mourner.close()


def _as_if_placed(folder: Path) -> None:
    """Envoy that works here finds what it finds in state_dir; but for the trail, which it opens."""
    (folder / "trail").mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (folder / "run").symlink_to("../run")


async def _check(folder: Path) -> None:
    """That it takes what it is given."""
    process = await _envoy(folder, envoy_files.WHOLE, "--mode", "validate")
    said, _ = await process.communicate()
    if process.returncode:
        raise _refusal(folder / envoy_files.WHOLE, said)


async def _try_out(folder: Path) -> None:
    """That it is well with it: who takes the place of another finds that out too late."""
    at = socket_path(folder.parent / envoy_files.TRIAL_SOCKET)
    process = await _envoy(folder, envoy_files.TRIAL, "--concurrency", "1")
    talking = asyncio.create_task(process.communicate())
    until = time.monotonic() + _TRIAL_SECONDS
    try:
        while (status := await envoy_admin.healthz(at)) != HTTPStatus.OK:
            if process.returncode is not None:
                raise _refusal(folder / envoy_files.TRIAL, (await talking)[0])
            if status is not None:
                until = min(until, time.monotonic() + _UNWELL_SECONDS)
            if time.monotonic() > until:
                raise ParallamaError(
                    "an Envoy with these files does not find authz and ratelimit well (GET /healthz"
                    f" is not 200): {folder / envoy_files.TRIAL}"
                )
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await talking
        with suppress(FileNotFoundError):
            os.unlink(at)


async def _envoy(folder: Path, file: str, *more: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        str(children.envoy_binary()),
        *("-c", f"{folder.name}/{file}", *more),
        *("--disable-hot-restart", "--log-level", "error", "--log-format", "%v"),
        cwd=folder.parent,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        preexec_fn=dies_with_us(signal.SIGKILL),
    )


def _refusal(file: Path, said: bytes) -> ParallamaError:
    # It may repeat the whole file.
    words = said.decode(errors="replace").strip()[:_ENVOYS_WORDS]
    return ParallamaError(f"Envoy refuses its files, put together in {file}:\n{words}")
