"""One way for every service to live and to leave."""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop

from parallama import logs, rpc
from parallama.config import Config, load
from parallama.errors import ParallamaError, leaves

log = logging.getLogger(__name__)


Main = Callable[[Config, bool], Coroutine[Any, Any, None]]
"""With the configuration, and whether to wait for a database that does not answer yet."""


def run(service: str, main: Main) -> None:
    """The whole `__main__` of a service: arguments, configuration, logs, event loop, exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {service}")
    parser.add_argument("--config", type=Path, default=os.environ.get("PARALLAMA_CONFIG"))
    parser.add_argument("--no-wait", action="store_true", help="end where the database is away")
    told = parser.parse_args()
    path = told.config
    if path is None:
        parser.error("name the configuration by --config or PARALLAMA_CONFIG")
    problems: list[BaseException] = []
    try:
        config = load(path, os.environ)
        logs.configure(config.logging, service=service)
        uvloop.run(main(config, not told.no_wait))
    except* ParallamaError as group:
        problems = list(leaves(group))
    for problem in problems:
        print(f"{service}: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


async def run_until_stopped(server: rpc.Server, *, listen: str, grace: float) -> None:
    """
    Serve gRPC on the unix socket `listen` until SIGTERM or SIGINT.

    On the way out health says NOT_SERVING; calls that run have `grace` seconds to end.
    """
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    try:
        await server.start(listen)
    except OSError as error:
        raise ParallamaError(f"cannot listen on {listen} ({error.strerror})") from error
    gc.collect()
    gc.freeze()  # modules and classes stay: no collection has to walk through them while calls wait
    log.info("serving", extra={"listen": listen})
    await stop.wait()
    await server.stop(grace)
    log.info("stopped")
