"""The authz process: what it is made of."""

import asyncio
import time
from functools import partial

from authz.keyring import Keyring
from authz.service import CHECK, Authz
from parallama import changes, daemon, rpc
from parallama.clock import system_clock
from parallama.config import Config
from parallama.db.accounts import find_key
from parallama.presence import LOOK_SECONDS, Presence, opened
from parallama.stores import connect_redis, socket_path


async def main(config: Config, wait: bool) -> None:
    async with opened(config.database) as db, connect_redis(config) as redis:
        keyring = Keyring(partial(find_key, db), size=config.authentication.key_cache_size)
        presence = Presence(
            db,
            monotonic=time.monotonic,
            patience=config.authentication.without_database_seconds,
            too_long=keyring.forget_all,
        )
        await presence.begin(wait=wait)
        gateways = config.api_gateways
        service = Authz(
            keyring,
            gateways=gateways.enabled,
            text_counted=gateways.text_counted,
            clock=system_clock,
        )
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(
                    changes.watch(
                        redis,
                        on_change=keyring.on_change,
                        on_lost=keyring.pause,
                        on_found=keyring.resume,
                    ),
                    name="change signal",
                ),
                tasks.create_task(
                    presence.watch(partial(asyncio.sleep, LOOK_SECONDS)), name="database"
                ),
            ]
            await daemon.run_until_stopped(
                rpc.Server({CHECK: service.check}, well=presence.lately),
                listen=socket_path(config.run_dir / "authz.sock"),
                grace=config.shutdown.drain_seconds,
            )
            for task in background:
                task.cancel()


daemon.run("authz", main)
