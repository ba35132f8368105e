"""What names of models mean on each gateway: in the configuration, and in the database."""

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from parallama import mappings
from parallama.cache import Cache
from parallama.changes import Change

Tables = Mapping[str, str]
"""By gateway, as facts.lua reads them. One that has none is not there."""

_ALL = "all"


class Mapped:
    """
    Remembers what `find` says the database has, until a change signal names mappings; without the
    signal nothing is remembered. `configured` and `defaults` are by gateway, too.
    """

    def __init__(
        self,
        find: Callable[[], Awaitable[Mapping[str, mappings.Table]]],
        *,
        configured: Mapping[str, mappings.Table] = MappingProxyType({}),
        defaults: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._find = find
        self._configured = configured
        self._defaults = defaults
        self._cache: Cache[str, Tables] = Cache(size=1)

    def at_once(self) -> Tables | None:
        """None where the database has to be asked."""
        return self._cache.peek(_ALL)

    async def find(self) -> Tables:
        """Raises Unavailable."""
        return await self._cache.get(_ALL, self._load) or {}

    async def _load(self) -> Tables:
        stored = await self._find()
        tables = {}
        for gateway in {*self._configured, *self._defaults, *stored}:
            table = mappings.merged(self._configured.get(gateway, {}), stored.get(gateway, {}))
            text = mappings.aliases(table, self._defaults.get(gateway))
            if text:
                tables[gateway] = text
        return tables

    def on_change(self, change: Change) -> None:
        if change.kind in ("mappings", "everything"):
            self._cache.forget_all()

    def pause(self) -> None:
        self._cache.pause()

    def resume(self) -> None:
        self._cache.resume()
