"""One way for every service to live and to leave."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from parallama import logs
from parallama.config import Config, load
from parallama.errors import ParallamaError

log = logging.getLogger(__name__)


def run(service: str, main: Callable[[Config], Coroutine[Any, Any, None]]) -> None:
    """The whole `__main__` of a service: arguments, configuration, logs, event loop, exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {service}")
    parser.add_argument("--config", type=Path, default=os.environ.get("PARALLAMA_CONFIG"))
    path = parser.parse_args().config
    if path is None:
        parser.error("name the configuration by --config or PARALLAMA_CONFIG")
    try:
        config = load(path, os.environ)
        logs.configure(config.logging, service=service)
        uvloop.run(main(config))
    except ParallamaError as error:
        print(f"{service}: {error}", file=sys.stderr)
        sys.exit(1)


async def run_until_stopped(
    register: Callable[[grpc.aio.Server], None], *, listen: str, grace: float
) -> None:
    """
    Serve gRPC on the unix socket `listen` until SIGTERM or SIGINT.

    On the way out health says NOT_SERVING first; calls that run have `grace` seconds to end.
    """
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    register(server)
    with suppress(FileNotFoundError):
        os.unlink(listen)
    if not server.add_insecure_port(f"unix:{listen}"):
        raise ParallamaError(f"cannot listen on {listen}")
    await server.start()
    os.chmod(listen, 0o600)
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    log.info("serving", extra={"listen": listen})
    await stop.wait()
    await checks.enter_graceful_shutdown()
    await server.stop(grace)
    log.info("stopped")
