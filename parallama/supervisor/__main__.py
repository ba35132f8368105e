"""The supervisor process: what `parallama up` becomes."""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from parallama import logs
from parallama.config import Config, load
from parallama.errors import ParallamaError
from parallama.stores import socket_path, valkey_socket
from parallama.supervisor import folder
from parallama.supervisor.chain import Chain

log = logging.getLogger("parallama.up")

# What a killed supervisor leaves behind ends in less: see death_signal.
_LEFT_OVER_SECONDS = 15.0


async def run(config: Config, lock: int, welcome: str) -> None:
    """
    Serve until SIGTERM, SIGINT or the end of the terminal; a second signal cuts running requests.

    SIGHUP reloads upstream and routes.
    """
    stop, hurry, reload = asyncio.Event(), asyncio.Event(), asyncio.Event()
    on_terminal = sys.stdin is not None and sys.stdin.isatty()

    def on_stop() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    def on_hangup() -> None:
        closed = on_terminal and not sys.stdin.isatty()
        on_stop() if closed else reload.set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, on_stop)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    async with asyncio.TaskGroup() as tasks:
        chain = Chain(config, tasks, lock)
        serving = asyncio.create_task(_serve(chain, reload, welcome))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        finally:
            stopping.cancel()
            serving.cancel()
            await chain.stop(hurry)
    log.info("stopped")


async def _serve(chain: Chain, reload: asyncio.Event, welcome: str) -> None:
    await chain.start()
    log.info("serving", extra={"listen": f"http://{_listen(chain.config)}"})
    print(welcome, end="", flush=True)
    while True:
        await reload.wait()
        reload.clear()
        await chain.reload()


def _listen(config: Config) -> str:
    host = config.server.host
    return f"[{host}]:{config.server.port}" if ":" in host else f"{host}:{config.server.port}"


def _check_port(config: Config) -> None:
    family = socket.AF_INET6 if ":" in config.server.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.server.host, config.server.port))
        except OSError as error:
            raise ParallamaError(
                f"cannot listen on {_listen(config)} ({error.strerror}): stop what uses it, or set"
                " server.host and server.port (PARALLAMA_SERVER__PORT in the environment)"
            ) from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="parallama up")
    parser.add_argument("config", type=Path)
    parser.add_argument("--welcome", type=Path, help="a text to show once everything serves")
    told = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while nothing runs, Ctrl-C needs no traceback
    problems: list[BaseException] = []
    try:
        config = load(told.config, os.environ)
        logs.configure(config.logging, service="up")
        welcome = told.welcome.read_text(encoding="utf-8") if told.welcome else ""
        if config.redis.embedded:
            # The services run in state_dir, where the name is short. Commands run anywhere.
            os.chdir("/")
            socket_path(valkey_socket(config))
        with folder.claim(config.state_dir, wait_seconds=_LEFT_OVER_SECONDS) as lock:
            os.chdir(config.state_dir)
            _check_port(config)
            asyncio.run(run(config, lock, welcome))
    except* (ParallamaError, OSError) as errors:
        problems = list(_leaves(errors))
    for problem in problems:
        with suppress(OSError):  # the terminal may be gone
            print(f"parallama up: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


main()
