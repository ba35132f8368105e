"""The supervisor process: what `parallama up` becomes."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from parallama import logs
from parallama.config import Config, load
from parallama.errors import ParallamaError
from parallama.stores import socket_path, valkey_socket
from parallama.supervisor import control, folder
from parallama.supervisor.address import address, check_free
from parallama.supervisor.alone import EnvoyAlone
from parallama.supervisor.chain import Chain

log = logging.getLogger("parallama.up")

# What a killed supervisor leaves behind ends in less: see death_signal.
_LEFT_OVER_SECONDS = 15.0


async def run(config: Config, lock: int, welcome: str, kind: type[Chain] = Chain) -> None:
    """
    Serve until SIGTERM, SIGINT or the end of the terminal; a second signal cuts running requests.

    SIGHUP reloads upstream and routes; `control` asks for new processes.
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
        chain = kind(config, tasks, lock, hurry)
        path = socket_path(config.run_dir / control.NAME)
        async with control.listening(path, chain.restart):
            serving = asyncio.create_task(_serve(chain, reload, welcome))
            stopping = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    serving.result()
            finally:
                stopping.cancel()
                serving.cancel()
                await chain.stop()
    log.info("stopped")


async def _serve(chain: Chain, reload: asyncio.Event, welcome: str) -> None:
    await chain.start()
    log.info("serving", extra={"listen": f"http://{address(chain.config)}"})
    print(welcome, end="", flush=True)
    while True:
        await reload.wait()
        reload.clear()
        await chain.reload()


def main() -> None:
    parser = argparse.ArgumentParser(prog="parallama up")
    parser.add_argument("config", type=Path)
    parser.add_argument("--welcome", type=Path, help="a text to show once everything serves")
    parser.add_argument("--envoy-alone", action="store_true")
    told = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while nothing runs, Ctrl-C needs no traceback
    problems: list[BaseException] = []
    try:
        config = load(told.config, os.environ)
        logs.configure(config.logging, service="up")
        welcome = told.welcome.read_text(encoding="utf-8") if told.welcome else ""
        if config.redis.embedded and not told.envoy_alone:
            # The services run in state_dir, where the name is short. Commands run anywhere.
            os.chdir("/")
            socket_path(valkey_socket(config))
        with folder.claim(config.state_dir, wait_seconds=_LEFT_OVER_SECONDS) as lock:
            os.chdir(config.state_dir)
            check_free(config)
            kind = EnvoyAlone if told.envoy_alone else Chain
            _have_one_thread()
            asyncio.run(run(config, lock, welcome, kind))
    except* (ParallamaError, OSError) as errors:
        problems = list(_leaves(errors))
    for problem in problems:
        with suppress(OSError):  # the terminal may be gone
            print(f"parallama up: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


def _have_one_thread() -> None:
    """
    Otherwise children get their death signal once for each thread of ours that is killed, and the
    second one ends an Envoy that is still writing what it cut into the trail.
    """
    if sys.version_info < (3, 12):  # from then on nobody waits for a child in a thread
        with suppress(OSError):  # an old kernel
            os.close(os.pidfd_open(os.getpid()))
            asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


main()
