"""The usage_sink process: what it is made of."""

import asyncio
import time
from contextlib import aclosing
from functools import partial

from parallama import daemon, http1, rpc
from parallama.clock import system_clock
from parallama.config import Config
from parallama.counters import Counters
from parallama.db import Store
from parallama.db.expired import remove_expired
from parallama.db.ledger import add, prune
from parallama.db.prices import prices_of
from parallama.presence import LOOK_SECONDS, Presence, opened
from parallama.prices import PriceList
from parallama.stores import connect_redis, socket_path
from parallama.trail import Trail
from usage_sink import counting
from usage_sink.closing import Closer, as_stored
from usage_sink.follower import Follower
from usage_sink.pruning import prune_daily
from usage_sink.service import STREAM, UsageSink
from usage_sink.storing import Records, Storing
from usage_sink.tending import Tender
from usage_sink.writer import Settled, Writer, writing

# About 10 MB of rows. What comes while so many wait for the database waits in the trail.
_QUEUE_ROWS = 5_000

# Envoy's log streams never end by themselves; what they sent is read in far less than this.
_GRACE_SECONDS = 1.0

# Beyond flush_seconds: how long a line of the trail is left for Envoy's stream to bring its row.
_BEHIND_SECONDS = 1.0

# How often is looked whether the trail is free.
_TURN_SECONDS = 0.2

_DAY_SECONDS = 86_400.0


async def main(config: Config, wait: bool) -> None:
    told = config.usage
    trail = Trail(config.state_dir / "trail")
    trail.make()
    async with (
        opened(config.database) as db,
        connect_redis(config) as redis,
        aclosing(
            Counters(
                redis,
                lease=config.rate_limiting.reservation_seconds,
                timeout=config.redis.timeout_seconds,
            )
        ) as counters,
        asyncio.TaskGroup() as tasks,
    ):
        presence = Presence(db, monotonic=time.monotonic)
        await presence.begin(wait=wait)
        settled = Settled()
        closer = Closer(counters, clock=system_clock)
        storing = Storing(
            partial(add, db),
            trail.set_aside,
            price=partial(_priced, db),
            as_stored=partial(as_stored, db),
            stored=closer.stored,
        )
        writer = Writer(
            storing,
            settled,
            batch_rows=told.batch_rows,
            flush_seconds=told.flush_seconds,
            queue_rows=_QUEUE_ROWS,
        )
        follower = Follower(
            trail,
            storing,
            settled,
            batch_rows=told.batch_rows,
            monotonic=time.monotonic,
            ahead=writer.until_stored,
        )
        tender = Tender(
            trail,
            partial(http1.ask, socket_path(config.run_dir / "envoy-admin.sock")),
            file_size=told.trail_file_size,
            max_size=told.trail_max_size,
            monotonic=time.monotonic,
        )
        behind = partial(asyncio.sleep, _BEHIND_SECONDS + told.flush_seconds)

        async def tend_trail() -> None:
            """Once the process in whose place this one is has read what it was sent."""
            await trail.take_turn(partial(asyncio.sleep, _TURN_SECONDS))
            await asyncio.gather(follower.run(behind), tender.run(partial(asyncio.sleep, 1.0)))

        async def catch_up() -> None:
            if trail.is_ours:
                await follower.catch_up()

        loops = [
            tasks.create_task(tend_trail(), name="trail"),
            tasks.create_task(closer.run(partial(asyncio.sleep, 1.0)), name="reservations"),
            tasks.create_task(
                presence.watch(partial(asyncio.sleep, LOOK_SECONDS)), name="database"
            ),
        ]
        daily = partial(prune_daily, clock=system_clock, pause=partial(asyncio.sleep, _DAY_SECONDS))
        # Here, because this process always runs, whether or not people log in with the other.
        tidying = daily(partial(remove_expired, db), what="tokens", days=0)
        loops.append(tasks.create_task(tidying, name="tokens"))
        if told.retention_days is not None:
            pruning = daily(partial(prune, db), what="usage", days=told.retention_days)
            loops.append(tasks.create_task(pruning, name="retention"))
        async with writing(
            writer,
            deadline=config.shutdown.drain_seconds,
            then=catch_up,
            missing=follower.missing,
        ):
            service = UsageSink(
                writer,
                log_requests=config.logging.requests,
                counting=await counting.load() if config.api_gateways.text_counted else None,
            )
            streams = {STREAM: service.stream_access_logs}
            await daemon.run_until_stopped(
                rpc.Server({}, streams, well=lambda: presence.there() and storing.well()),
                listen=socket_path(config.run_dir / "usage_sink.sock"),
                grace=_GRACE_SECONDS,
            )
            for loop in loops:
                loop.cancel()
            await asyncio.wait(loops)
        trail.end_turn()


async def _priced(db: Store, records: Records) -> Records:
    """By the list as it is now: it is short, and asked for once a batch."""
    prices = PriceList(await prices_of(db))
    return [prices.priced(record) for record in records]


daemon.run("usage_sink", main)
