"""What the admin API works with: loaded when it is first needed."""

import os
from contextlib import AsyncExitStack, aclosing, closing
from datetime import UTC, datetime

from parallama.admin import once
from parallama.admin.app import service
from parallama.admin.edge import App
from parallama.admin.visit import Office
from parallama.clock import system_clock
from parallama.config import Config
from parallama.counters import Counters
from parallama.db import Store
from parallama.db.manage.schema import managed
from parallama.db.manage.sessions import Sessions
from parallama.lockout import Lockout
from parallama.passwords import Checker
from parallama.pipeline import Pipeline
from parallama.resp import Redis
from parallama.signing import KeyFolder, prepare


async def make(config: Config, store: Store, redis: Redis, stack: AsyncExitStack) -> App:
    """The API; what it needs is closed with `stack`. Raises ParallamaError."""
    told, patience = config.authentication, config.redis.timeout_seconds
    async with AsyncExitStack() as making:
        engine = await making.enter_async_context(managed(config.database))
        counters = await making.enter_async_context(
            aclosing(
                Counters(redis, lease=config.rate_limiting.reservation_seconds, timeout=patience)
            )
        )
        kept = await making.enter_async_context(
            aclosing(Pipeline(redis, *once.SCRIPTS, timeout=patience))
        )
        lockout = await making.enter_async_context(aclosing(Lockout(redis, told, timeout=patience)))
        checker = making.enter_context(closing(Checker(threads=told.login_threads)))
        signing = KeyFolder(config, clock=system_clock)
        prepare(config, now=system_clock())
        office = Office(
            config=config,
            engine=engine,
            store=store,
            redis=redis,
            counters=counters,
            sessions=Sessions(
                told, signing=signing, lockout=lockout, checker=checker, random_bytes=os.urandom
            ),
            signing=signing,
            now=lambda: datetime.now(UTC),
            random_bytes=os.urandom,
        )
        stack.push_async_exit(making.pop_all())
        return service(office, kept)
