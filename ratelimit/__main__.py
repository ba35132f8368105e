"""The ratelimit process: what it is made of."""

import asyncio
import time
from contextlib import aclosing
from functools import partial

from parallama import changes, daemon, rpc
from parallama.changes import Change
from parallama.clock import system_clock
from parallama.config import Config
from parallama.counters import Counters
from parallama.db import accounts, ledger
from parallama.db.policies import policy_of
from parallama.db.prices import prices_of
from parallama.endpoints import METERED
from parallama.presence import LOOK_SECONDS, Presence, opened
from parallama.prices import Prices
from parallama.stores import connect_redis, socket_path
from ratelimit.charging import Charging
from ratelimit.estimate import Estimate
from ratelimit.lost import Finder
from ratelimit.outage import Away, Outage, a_second
from ratelimit.policies import Policies
from ratelimit.rebuild import Rebuild
from ratelimit.service import SHOULD_RATE_LIMIT, RateLimit


async def main(config: Config, wait: bool) -> None:
    told = config.rate_limiting
    away: dict[str, Away] = {
        gateway: told.when_redis_is_away_by_gateway.get(gateway, told.when_redis_is_away)
        for gateway in config.api_gateways.enabled
    }
    async with (
        opened(config.database) as db,
        connect_redis(config) as signals,
        connect_redis(config) as redis,
        aclosing(
            Counters(redis, lease=told.reservation_seconds, timeout=config.redis.timeout_seconds)
        ) as counters,
    ):
        presence = Presence(db, monotonic=time.monotonic)
        await presence.begin(wait=wait)
        policies = Policies(partial(policy_of, db), size=told.cache_size)
        prices = Prices(partial(prices_of, db))
        outage = Outage(away, processes=told.processes, monotonic=time.monotonic)
        rebuild = Rebuild(counters, partial(ledger.spending, db, endpoints=METERED))
        charging = Charging(counters, policies, rebuild, clock=system_clock, zone=told.zone)
        service = RateLimit(
            counters,
            policies,
            clock=system_clock,
            zone=told.zone,
            estimate=Estimate(
                bytes_per_token=told.bytes_per_token, default_max_tokens=told.default_max_tokens
            ),
            prices=prices,
            rebuild=rebuild,
            charging=charging,
            outage=outage,
            hard=told.enforcement == "hard",
        )
        finder = Finder(
            counters,
            partial(ledger.add_lost, db),
            partial(ledger.spent_by, db),
            partial(charging.charge, stored=True),
            partial(accounts.name_of, db),
            clock=system_clock,
        )

        def on_change(change: Change) -> None:
            policies.on_change(change)
            prices.on_change(change)

        def on_lost() -> None:
            policies.pause()
            prices.pause()

        def on_found() -> None:
            policies.resume()
            prices.resume()

        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(
                    changes.watch(signals, on_change=on_change, on_lost=on_lost, on_found=on_found),
                    name="change signal",
                ),
                tasks.create_task(outage.pay(service.settle, pause=a_second), name="debts"),
                tasks.create_task(finder.run(a_second), name="lost calls"),
                tasks.create_task(
                    presence.watch(partial(asyncio.sleep, LOOK_SECONDS)), name="database"
                ),
            ]
            await daemon.run_until_stopped(
                rpc.Server(
                    {SHOULD_RATE_LIMIT: service.should_rate_limit},
                    undo={SHOULD_RATE_LIMIT: service.untaken},
                ),
                listen=socket_path(config.run_dir / "ratelimit.sock"),
                grace=config.shutdown.drain_seconds,
            )
            for task in background:
                task.cancel()
            await service.aclose()


daemon.run("ratelimit", main)
