"""The authz process: what it is made of."""

import asyncio
import time
from contextlib import aclosing
from functools import partial

from authz.bearers import Bearers
from authz.issuers import trusted
from authz.keyring import Keyring
from authz.mapped import Mapped
from authz.service import CHECK, Authz
from authz.signed import SEEN, Signatures
from authz.streams import JUDGE, Streams
from parallama import changes, daemon, rpc, shapes
from parallama.changes import Change
from parallama.clock import system_clock
from parallama.config import Config
from parallama.db.accounts import find_key
from parallama.db.mappings import mappings_of
from parallama.endpoints import ADMIN, DISCOVERY
from parallama.pipeline import Pipeline
from parallama.presence import LOOK_SECONDS, Presence, opened
from parallama.stores import connect_redis, socket_path


async def main(config: Config, wait: bool) -> None:
    told = config.authentication
    async with (
        opened(config.database) as db,
        connect_redis(config) as signals,
        connect_redis(config) as redis,
        aclosing(Pipeline(redis, SEEN, timeout=config.redis.timeout_seconds)) as memory,
    ):
        find = partial(find_key, db, roles=config.known_roles)
        issuers = trusted(
            config, db, clock=system_clock, on_withdrawn=lambda name: keyring.forget_tokens_of(name)
        )
        bearers = Bearers(
            issuers, size=told.key_cache_size, skew=told.clock_skew_seconds, clock=system_clock
        )
        keyring = Keyring(find, bearers, size=told.key_cache_size)
        signatures = Signatures(
            find,
            memory,
            window=told.signature_window_seconds,
            size=told.key_cache_size,
            clock=system_clock,
        )
        streams = Streams(db, size=told.key_cache_size)
        mapped = Mapped(
            partial(mappings_of, db),
            configured=config.api_gateways.model_mappings,
            defaults=config.api_gateways.default_models,
        )
        remembering = (keyring, signatures, streams, mapped)

        def on_change(change: Change) -> None:
            for each in remembering:
                each.on_change(change)

        def on_lost() -> None:
            for each in remembering:
                each.pause()

        def on_found() -> None:
            for each in remembering:
                each.resume()

        def forget_all() -> None:
            on_change(Change("everything"))

        presence = Presence(
            db,
            monotonic=time.monotonic,
            patience=told.without_database_seconds,
            too_long=forget_all,
        )
        await presence.begin(wait=wait)
        service = Authz(
            keyring,
            signatures,
            mapped,
            gateways=[
                *config.api_gateways.enabled,
                *[ADMIN] * config.admin.enabled,
                *[DISCOVERY] * config.api_gateways.discovery.enabled,
            ],
            text_counted=config.api_gateways.text_counted,
            shapes=shapes.written(config.request_shapes) if config.request_shapes else {},
            clock=system_clock,
        )
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(
                    changes.watch(signals, on_change=on_change, on_lost=on_lost, on_found=on_found),
                    name="change signal",
                ),
                tasks.create_task(
                    presence.watch(partial(asyncio.sleep, LOOK_SECONDS)), name="database"
                ),
                *(
                    tasks.create_task(issuer.keys.run(), name="keys of an issuer")
                    for issuer in issuers.values()
                ),
            ]
            await daemon.run_until_stopped(
                rpc.Server({CHECK: service.check, JUDGE: streams.judge}, well=presence.lately),
                listen=socket_path(config.run_dir / "authz.sock"),
                grace=config.shutdown.drain_seconds,
            )
            for task in background:
                task.cancel()


daemon.run("authz", main)
