"""The supervisor process: what `parallama up` becomes."""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parallama import logs
from parallama.config import Config, load
from parallama.errors import ParallamaError
from parallama.stores import socket_path
from parallama.supervisor import children, envoy_admin, envoy_files, folder
from parallama.supervisor.child import Child, Command

log = logging.getLogger("parallama.up")

_LEFT_OVER_SECONDS = 15.0
# A little more than buffer_flush_interval in envoy.yaml.
_FLUSH_SECONDS = 0.25


@dataclass
class Supervisor:
    """Starts the children so that each finds what it needs, and stops them in reverse order."""

    config: Config
    tasks: asyncio.TaskGroup
    lock: int
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    started: list[Child] = field(default_factory=list)

    async def start(self) -> None:
        config = self.config
        model_port = config.model.port or children.free_port() if config.model.bundled else None
        self._render(model_port)
        await self._check_envoy_files()
        first = [children.service(name, config) for name in children.SERVICES]
        if config.redis.embedded:
            await self._start([children.valkey(config)])
        if model_port is not None:
            first.append(children.model(config, model_port))
        await self._start(first)
        await self._start([children.envoy(config)])
        self._model_port = model_port

    def reload(self) -> None:
        """Read config.yaml again, give Envoy its new upstream and routes; on error keep the old."""
        try:
            self.config = load(self.config.source, os.environ)
            self._render(self._model_port)
            log.info("routes and upstreams reloaded")
        except ParallamaError as error:
            log.error("reload refused, nothing changed", extra={"cause": str(error)})

    async def stop(self) -> None:
        log.info("stopping", extra={"requests_may_take_s": self.config.shutdown.drain_seconds})
        by_name = {child.command.name: child for child in self.started}
        if "envoy" in by_name:
            await self._drain()
            await by_name["envoy"].stop()
        await asyncio.gather(
            *(by_name[name].stop() for name in children.SERVICES if name in by_name)
        )
        for child in reversed(self.started):
            await child.stop()

    async def _start(self, commands: Sequence[Command]) -> None:
        begun = []
        for command in commands:
            log.info("starting", extra={"child": command.name})
            child = Child(command, on_change=self._tell, keep_open=(self.lock,))
            self.started.append(child)
            self.tasks.create_task(child.run(), name=command.name)
            begun.append(child)
        await asyncio.gather(*(child.serving() for child in begun))

    async def _drain(self) -> None:
        try:
            done = await envoy_admin.drain(
                socket_path(self.config.run_dir / "envoy-admin.sock"),
                seconds=self.config.shutdown.drain_seconds,
                flush_seconds=_FLUSH_SECONDS,
                hurry=self.hurry,
            )
        except OSError as error:
            log.warning("envoy could not be drained", extra={"cause": str(error)})
        else:
            if not done:
                log.warning("requests cut")

    def _render(self, model_port: int | None) -> None:
        upstream = (
            self.config.api_gateways.ollama.upstream()
            if model_port is None
            else ("http", "127.0.0.1", model_port)
        )
        envoy_files.render(self.config, upstream, self.config.state_dir / "envoy")

    async def _check_envoy_files(self) -> None:
        process = await asyncio.create_subprocess_exec(
            str(children.envoy_binary()),
            *("--mode", "validate", "-c", "envoy/envoy.yaml", "--disable-hot-restart"),
            *("--log-level", "error"),
            cwd=self.config.state_dir,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        if process.returncode:
            raise ParallamaError(f"Envoy refuses its files:\n{said.decode(errors='replace')}")

    def _tell(self) -> None:
        told = {
            child.command.name: {
                "state": child.state,
                "pid": child.pid,
                "restarts": child.restarts,
            }
            for child in self.started
        }
        folder.write_status(self.config.state_dir, told)


async def run(config: Config, lock: int, welcome: str) -> None:
    """Serve until SIGTERM or SIGINT; a second one does not wait for requests that run."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        supervisor = Supervisor(config, tasks, lock)

        def on_signal() -> None:
            if stop.is_set():
                supervisor.hurry.set()
            stop.set()

        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, on_signal)
        starting = asyncio.create_task(supervisor.start())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                loop.add_signal_handler(signal.SIGHUP, supervisor.reload)
                log.info("serving", extra={"listen": f"http://{_listen(config)}"})
                print(welcome, end="", flush=True)
                await stopping
        finally:
            starting.cancel()
            stopping.cancel()
            await supervisor.stop()
    log.info("stopped")


def _listen(config: Config) -> str:
    return f"{config.server.host}:{config.server.port}"


def _check_port(config: Config) -> None:
    family = socket.AF_INET6 if ":" in config.server.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.server.host, config.server.port))
        except OSError as error:
            raise ParallamaError(
                f"cannot listen on {_listen(config)} ({error.strerror}): stop what uses it, or set"
                " server.host and server.port"
            ) from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="parallama up")
    parser.add_argument("config", type=Path)
    parser.add_argument("--welcome", type=Path, help="a text to show once everything serves")
    told = parser.parse_args()
    problems: list[BaseException] = []
    try:
        config = load(told.config, os.environ)
        logs.configure(config.logging, service="up")
        welcome = told.welcome.read_text(encoding="utf-8") if told.welcome else ""
        with folder.claim(config.state_dir, wait_seconds=_LEFT_OVER_SECONDS) as lock:
            os.chdir(config.state_dir)
            _check_port(config)
            asyncio.run(run(config, lock, welcome))
    except* (ParallamaError, OSError) as errors:
        problems = list(_leaves(errors))
    for problem in problems:
        print(f"parallama up: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


main()
