"""Whether the database is there: asked every few seconds, and said once when that changes."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from parallama.clock import Clock
from parallama.config import Database
from parallama.db import revisions
from parallama.db.store import Store, open_store
from parallama.errors import Unavailable

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""From one look to the next."""


@asynccontextmanager
async def opened(settings: Database) -> AsyncIterator[Store]:
    """The configured database, which need not be there yet; `Presence` checks its tables."""
    store = open_store(settings)
    try:
        yield store
    finally:
        await store.close()


def _nothing() -> None:
    pass


class Presence:
    """
    Whoever goes by what the database said is told by `too_long` when it has been away for more than
    `patience` seconds, and again at each look until it is back. `monotonic` is in seconds.
    """

    def __init__(
        self,
        store: Store,
        *,
        monotonic: Clock,
        patience: float = 0.0,
        too_long: Callable[[], None] = _nothing,
    ) -> None:
        self._store = store
        self._monotonic = monotonic
        self._patience = patience
        self._too_long = too_long
        self._seen: float | None = None
        self._away = False

    def there(self) -> bool:
        """What the last look said."""
        return self._seen is not None and not self._away

    def lately(self) -> bool:
        """Whether it is there, or was so `patience` seconds ago."""
        return self.there() or (
            self._seen is not None and self._monotonic() - self._seen <= self._patience
        )

    async def begin(self, *, wait: bool) -> None:
        """The first look. Raises SchemaError, and unless it is to be waited for Unavailable."""
        if wait:
            await self.look()
        else:
            await self._ask()

    async def look(self) -> None:
        """Raises SchemaError where it is there for the first time and its tables are not ours."""
        try:
            await self._ask()
        except Unavailable as error:
            if not self._away:
                log.error("database away", extra={"cause": str(error)})
            self._away = True
            if not self.lately():
                self._too_long()

    async def watch(self, pause: Callable[[], Awaitable[None]]) -> None:
        """For ever."""
        while True:
            await pause()
            await self.look()

    async def _ask(self) -> None:
        revision = await self._store.revision()
        if self._seen is None:  # later on `parallama db upgrade` may run, and then a restart
            revisions.check(revision, self._store.where)
        self._seen = self._monotonic()
        if self._away:
            log.info("database is there")
        self._away = False
