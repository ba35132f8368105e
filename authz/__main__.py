"""The authz process: what it is made of."""

import asyncio
from functools import partial

from authz.keyring import Keyring
from authz.service import CHECK, Authz
from parallama import changes, daemon, rpc
from parallama.clock import system_clock
from parallama.config import Config
from parallama.db import database
from parallama.db.accounts import find_key
from parallama.stores import connect_redis, socket_path


async def main(config: Config) -> None:
    async with database(config.database) as db, connect_redis(config) as redis:
        keyring = Keyring(partial(find_key, db), size=config.authentication.key_cache_size)
        service = Authz(keyring, gateways=config.api_gateways.enabled, clock=system_clock)
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(
                changes.watch(
                    redis,
                    on_change=keyring.on_change,
                    on_lost=keyring.pause,
                    on_found=keyring.resume,
                ),
                name="change signal",
            )
            await daemon.run_until_stopped(
                rpc.Server({CHECK: service.check}),
                listen=socket_path(config.run_dir / "authz.sock"),
                grace=config.shutdown.drain_seconds,
            )
            watching.cancel()


daemon.run("authz", main)
