"""What names mean on each gateway, as its operator wrote them."""

import asyncio
import logging
from collections.abc import Mapping

from parallama.admin.catalog.merging import Alias
from parallama.cache import Cache
from parallama.changes import Change
from parallama.db.mappings import mappings_of
from parallama.db.store import Store
from parallama.errors import ParallamaError
from parallama.mappings import Table, plain

log = logging.getLogger(__name__)

_SECONDS = 0.5
_ALL = "all"

Tables = Mapping[str, Table]


class Aliases:
    """
    The tables of the configuration, and those of the database, which count before them.

    They are as old as the last change signal. While the database is away, what it said last counts.
    """

    def __init__(self, store: Store, configured: Tables) -> None:
        self._store = store
        self._configured = configured
        self._cache: Cache[str, Tables] = Cache(size=1)
        self._stored: Tables = {}
        self._away = False

    def on_change(self, change: Change) -> None:
        if change.kind in ("mappings", "everything"):
            self._cache.forget_all()

    def pause(self) -> None:
        self._cache.pause()

    def resume(self) -> None:
        self._cache.resume()

    async def of(self, gateway: str) -> tuple[Alias, ...]:
        """By name. Nobody waits long for a database that does not answer."""
        try:
            async with asyncio.timeout(_SECONDS):
                stored = await self._cache.get(_ALL, self._read)
            self._stored, self._away = stored or {}, False
        except (ParallamaError, TimeoutError) as error:
            if not self._away:
                log.warning("mappings not read", extra={"cause": str(error) or "no answer"})
            self._away = True
        found: dict[str, Alias] = {}
        for table in (self._configured.get(gateway, {}), self._stored.get(gateway, {})):
            found |= {plain(name): Alias(name, model) for name, model in table.items()}
        return tuple(sorted(found.values(), key=lambda each: each.name))

    async def _read(self) -> Tables:
        return await mappings_of(self._store)
