"""The ratelimit process: what it is made of."""

import asyncio
from contextlib import aclosing
from functools import partial

from parallama import changes, daemon, rpc
from parallama.clock import system_clock
from parallama.config import Config
from parallama.db import database
from parallama.db.policies import limits_of
from parallama.stores import connect_redis, socket_path
from ratelimit.buckets import Buckets
from ratelimit.estimate import Estimate
from ratelimit.policies import Policies
from ratelimit.service import SHOULD_RATE_LIMIT, RateLimit


async def main(config: Config) -> None:
    told = config.rate_limiting
    async with (
        database(config.database) as db,
        connect_redis(config) as signals,
        connect_redis(config) as counters,
        aclosing(
            Buckets(counters, lease=told.reservation_seconds, timeout=config.redis.timeout_seconds)
        ) as buckets,
    ):
        policies = Policies(partial(limits_of, db), size=told.cache_size)
        service = RateLimit(
            buckets,
            policies,
            clock=system_clock,
            estimate=Estimate(
                bytes_per_token=told.bytes_per_token, default_max_tokens=told.default_max_tokens
            ),
            when_down=told.when_redis_is_away,
        )
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(
                changes.watch(
                    signals,
                    on_change=policies.on_change,
                    on_lost=policies.pause,
                    on_found=policies.resume,
                ),
                name="change signal",
            )
            await daemon.run_until_stopped(
                rpc.Server(
                    {SHOULD_RATE_LIMIT: service.should_rate_limit},
                    undo={SHOULD_RATE_LIMIT: service.untaken},
                ),
                listen=socket_path(config.run_dir / "ratelimit.sock"),
                grace=config.shutdown.drain_seconds,
            )
            watching.cancel()


daemon.run("ratelimit", main)
