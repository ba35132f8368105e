"""Everything `up` runs: started in order, reloaded, stopped in the reverse order."""

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parallama.config import Config, load
from parallama.errors import ParallamaError
from parallama.stores import socket_path
from parallama.supervisor import children, envoy_admin, envoy_files, folder
from parallama.supervisor.child import Child, Command

log = logging.getLogger("parallama.up")

_ENVOYS_WORDS = 800


@dataclass
class Chain:
    """
    Envoy and what it needs, as children. `lock` is a file descriptor that they keep open.

    Runs in state_dir: the names of unix sockets are short from there.
    """

    config: Config
    tasks: asyncio.TaskGroup
    lock: int
    _children: dict[str, Child] = field(default_factory=dict)
    _model_port: int | None = None

    async def start(self) -> None:
        """Return when all serves; raises ParallamaError when something does not."""
        config = self.config
        if config.model.bundled:
            self._model_port = config.model.port or children.free_port()
        await self._place_envoy_files(config, envoy_files.STARTING)
        if config.redis.embedded:
            with folder.writing(config.state_dir):
                valkey = children.valkey(config)
            await self._start([valkey])
        services = [children.service(name, config) for name in children.SERVICES]
        model = [] if self._model_port is None else [children.model(config, self._model_port)]
        await self._start([*services, *model])
        await self._start([children.envoy(config)])

    async def reload(self) -> None:
        """Give Envoy the upstream and the routes as they are now; on error it keeps the old."""
        try:
            config = load(self.config.source, os.environ)
            await self._place_envoy_files(config, envoy_files.RELOADING)
        except ParallamaError as error:
            log.error("reload refused, nothing changed", extra={"cause": str(error)})
            return
        log.info("upstream and routes reloaded")
        if _without_upstream(config) != _without_upstream(self.config) or envoy_files.waiting(
            self._checked, self.config.state_dir / "envoy"
        ):
            log.warning("what else changed needs a restart")

    async def stop(self, hurry: asyncio.Event) -> None:
        """Let requests end within drain_seconds, store their rows, end the children."""
        envoy = self._children.get("envoy")
        if envoy is not None and envoy.state == "serving":
            await self._drain(hurry)
        await self._stop(["envoy"])
        await self._stop(children.SERVICES)
        await self._stop([name for name in self._children])

    async def _start(self, commands: Sequence[Command]) -> None:
        begun = []
        for command in commands:
            log.info("starting", extra={"child": command.name})
            child = Child(command, on_change=self._tell, keep_open=(self.lock,))
            self._children[command.name] = child
            self.tasks.create_task(child.run(), name=command.name)
            begun.append(child)
        await asyncio.gather(*(child.serving() for child in begun))

    async def _stop(self, names: Sequence[str]) -> None:
        await asyncio.gather(*(self._children[at].stop() for at in names if at in self._children))

    async def _drain(self, hurry: asyncio.Event) -> None:
        seconds = self.config.shutdown.drain_seconds
        log.info("stopping", extra={"requests_may_take_s": seconds})
        admin = socket_path(self.config.run_dir / "envoy-admin.sock")
        try:
            done = await envoy_admin.drain(admin, Path("envoy"), seconds=seconds, hurry=hurry)
        except OSError as error:
            log.warning("envoy could not be drained", extra={"cause": str(error) or repr(error)})
        else:
            if not done:
                log.warning("requests cut")

    async def _place_envoy_files(self, config: Config, names: Sequence[str]) -> None:
        """Write them, have Envoy check all of them, and only then put them in their place."""
        upstream = config.api_gateways.ollama.upstream()
        if self._model_port is not None:
            upstream = ("http", "127.0.0.1", self._model_port)
        state_dir = self.config.state_dir
        with folder.writing(state_dir):
            envoy_files.write(config, upstream, self._checked)
        await _check(self._checked)
        with folder.writing(state_dir):
            envoy_files.place(names, self._checked, state_dir / "envoy")

    @property
    def _checked(self) -> Path:
        return self.config.state_dir / "check" / "envoy"

    def _tell(self) -> None:
        folder.write_status(
            self.config.state_dir,
            {
                name: {
                    "state": child.state,
                    "pid": child.pid,
                    "restarts": child.restarts,
                    "last_exit": child.last_exit,
                }
                for name, child in self._children.items()
            },
        )


def _without_upstream(config: Config) -> Config:
    gateways = config.api_gateways.model_copy(update={"ollama": None})
    return config.model_copy(update={"api_gateways": gateways})


async def _check(folder: Path) -> None:
    whole = folder / envoy_files.WHOLE
    process = await asyncio.create_subprocess_exec(
        str(children.envoy_binary()),
        *("--mode", "validate", "-c", f"{folder.name}/{whole.name}"),
        *("--disable-hot-restart", "--log-level", "error", "--log-format", "%v"),
        cwd=folder.parent,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    if process.returncode:
        # It may repeat the whole file.
        words = said.decode(errors="replace").strip()[:_ENVOYS_WORDS]
        raise ParallamaError(f"Envoy refuses its files, put together in {whole}:\n{words}")
