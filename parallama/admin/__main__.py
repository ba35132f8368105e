"""The admin process: what it is made of."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import aclosing, closing, contextmanager
from datetime import UTC, datetime

import uvicorn

from parallama import daemon, rpc
from parallama.admin import once
from parallama.admin.app import service
from parallama.admin.edge import App
from parallama.admin.visit import Office
from parallama.clock import system_clock
from parallama.config import Config
from parallama.counters import Counters
from parallama.db import database
from parallama.db.manage.schema import managed
from parallama.db.manage.sessions import Sessions
from parallama.errors import ParallamaError
from parallama.lockout import Lockout
from parallama.passwords import Checker
from parallama.pipeline import Pipeline
from parallama.signing import KeyFolder, prepare
from parallama.stores import connect_redis, socket_path

log = logging.getLogger(__name__)

# Longer than Envoy keeps a connection that nobody uses (idle_timeout of its cluster).
_IDLE_SECONDS = 60


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: uvicorn would end the process by the one that stopped it."""
        yield


async def main(config: Config, _wait: bool) -> None:
    # Without the database there is nothing that it could answer: whoever started it tries again.
    told, patience = config.authentication, config.redis.timeout_seconds
    async with (
        managed(config.database) as engine,
        database(config.database) as store,
        connect_redis(config) as redis,
        aclosing(
            Counters(redis, lease=config.rate_limiting.reservation_seconds, timeout=patience)
        ) as counters,
        aclosing(Pipeline(redis, *once.SCRIPTS, timeout=patience)) as kept,
        aclosing(Lockout(redis, told, timeout=patience)) as lockout,
    ):
        with closing(Checker(threads=told.login_threads)) as checker:
            prepare(config, now=system_clock())
            signing = KeyFolder(config, clock=system_clock)
            office = Office(
                config=config,
                engine=engine,
                store=store,
                redis=redis,
                counters=counters,
                sessions=Sessions(
                    told,
                    signing=signing,
                    lockout=lockout,
                    checker=checker,
                    random_bytes=os.urandom,
                ),
                signing=signing,
                now=lambda: datetime.now(UTC),
                random_bytes=os.urandom,
            )
            path = socket_path(config.run_dir / "admin.sock")
            await serve(service(office, kept), path, grace=config.shutdown.drain_seconds)


async def serve(app: App, path: str, *, grace: float) -> None:
    """On a unix socket until SIGTERM or SIGINT; calls that run have `grace` seconds to end."""
    server = _Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=max(1, int(grace)),
        )
    )

    def stop() -> None:
        server.should_exit = True

    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop)
    try:
        listener = rpc.bound(path)
    except OSError as error:
        raise ParallamaError(f"cannot listen on {path} ({error.strerror})") from error
    gc.collect()
    gc.freeze()
    log.info("serving", extra={"listen": path})
    with listener:
        await server.serve([listener])
    log.info("stopped")


daemon.run("admin", main)
