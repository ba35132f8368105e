"""
The admin process: what it is made of.

What model servers offer it answers always; the admin API where that is enabled.
"""

import asyncio
import gc
import importlib
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial

import uvicorn

from parallama import changes, daemon, rpc
from parallama.admin.catalog import hosts
from parallama.admin.catalog.aliases import Aliases
from parallama.admin.catalog.catalog import Catalog, through
from parallama.admin.catalog.discovery import Discovery
from parallama.admin.catalog.lists import App, Lists
from parallama.admin.catalog.metrics import Metrics
from parallama.admin.front import Front, Later
from parallama.config import Config
from parallama.db import Store
from parallama.errors import ParallamaError
from parallama.presence import LOOK_SECONDS, Presence, opened
from parallama.resp import Redis
from parallama.stores import connect_redis, socket_path

log = logging.getLogger(__name__)

# Longer than Envoy keeps a connection that nobody uses (idle_timeout of its cluster).
_IDLE_SECONDS = 60

# A key may be restricted to many models, and all of them are told in one header.
_LARGEST_HEAD = 1 << 20


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: uvicorn would end the process by the one that stopped it."""
        yield


async def main(config: Config, wait: bool) -> None:
    told = config.api_gateways
    async with (
        opened(config.database) as store,
        connect_redis(config) as signals,
        connect_redis(config) as redis,
        AsyncExitStack() as office,
    ):
        presence = Presence(store, monotonic=time.monotonic)
        await presence.begin(wait=wait)
        aliases = Aliases(store, told.model_mappings)
        catalog = Catalog(
            through(socket_path(config.run_dir / "catalog.sock")),
            gateways=told.enabled,
            every=told.discovery.cache_ttl,
            clock=time.monotonic,
        )
        page = Discovery(
            config,
            catalog,
            aliases,
            hosts=partial(hosts.look, socket_path(config.run_dir / "envoy-admin.sock")),
            used=Metrics(store, clock=time.monotonic).look,
        )
        api = Later(partial(_api, config, store, redis, office)) if config.admin.enabled else None
        front = Front(
            lists=Lists(catalog, aliases), page=page, discovery=told.discovery.enabled, api=api
        )
        path = socket_path(config.run_dir / "admin.sock")
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(catalog.run(), name="lists"),
                tasks.create_task(
                    changes.watch(
                        signals,
                        on_change=aliases.on_change,
                        on_lost=aliases.pause,
                        on_found=aliases.resume,
                    ),
                    name="change signal",
                ),
                tasks.create_task(
                    presence.watch(partial(asyncio.sleep, LOOK_SECONDS)), name="database"
                ),
            ]
            await serve(front, path, grace=config.shutdown.drain_seconds)
            for task in background:
                task.cancel()


async def _api(config: Config, store: Store, redis: Redis, stack: AsyncExitStack) -> App:
    """Its modules take a second to load, in which lists go on to be answered."""
    office = await asyncio.to_thread(importlib.import_module, "parallama.admin.office")
    app: App = await office.make(config, store, redis, stack)
    return app


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
            h11_max_incomplete_event_size=_LARGEST_HEAD,
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
