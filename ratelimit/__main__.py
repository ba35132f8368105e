"""The ratelimit process: what it is made of."""

import asyncio
from contextlib import aclosing
from functools import partial

from envoy.service.ratelimit.v3.rls_pb2_grpc import add_RateLimitServiceServicer_to_server

from parallama import changes, daemon
from parallama.clock import system_clock
from parallama.config import Config
from parallama.db import database
from parallama.db.policies import limits_of
from parallama.stores import connect_redis, socket_path
from ratelimit.buckets import Buckets
from ratelimit.policies import Policies
from ratelimit.rules import Estimate
from ratelimit.service import RateLimit


async def main(config: Config) -> None:
    told = config.rate_limiting
    async with (
        database(config.database) as db,
        connect_redis(config) as signals,
        # `Pipeline` keeps its own time; a time-out of the connection would cost a task a write.
        connect_redis(config, socket_timeout=None) as counters,
        aclosing(
            Buckets(counters, lease=told.reservation_seconds, timeout=config.redis.timeout_seconds)
        ) as buckets,
    ):
        policies = Policies(partial(limits_of, db), size=told.cache_size)
        service = RateLimit(
            buckets,
            policies.limits_of,
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
                partial(add_RateLimitServiceServicer_to_server, service),
                listen=socket_path(config.run_dir / "ratelimit.sock"),
                grace=config.shutdown.drain_seconds,
            )
            watching.cancel()


daemon.run("ratelimit", main)
