"""How the gateways were used in the last minutes, by the usage rows."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from statistics import median

from parallama.clock import Clock
from parallama.db.store import Store
from parallama.endpoints import METERED
from parallama.errors import ParallamaError

WINDOW_SECONDS = 300
_KEEP_SECONDS = 10.0
_SECONDS = 1.0

# The last ones stand for all: to sort a hundred thousand is not cheap.
_MOST = 1000
_METERED = tuple(sorted(METERED))
_PLACES = ", ".join("?" * len(_METERED))
_COUNT = f"""
SELECT gateway_type, COUNT(*) FROM gateway_usage_logs
WHERE timestamp >= ? AND endpoint IN ({_PLACES}) GROUP BY gateway_type
"""  # noqa: S608 - question marks
_FIRST_TOKENS = f"""
SELECT gateway_type, time_to_first_token FROM gateway_usage_logs
WHERE timestamp >= ? AND time_to_first_token IS NOT NULL AND endpoint IN ({_PLACES})
ORDER BY timestamp DESC LIMIT {_MOST}
"""  # noqa: S608 - question marks, and a number of ours


@dataclass(frozen=True, slots=True)
class Use:
    """Calls that spend tokens, and half of the answers began within so many seconds."""

    requests: int
    first_token: float | None


async def used(store: Store, now: datetime) -> Mapping[str, Use]:
    """By gateway. Raises Unavailable."""
    given = (now - timedelta(seconds=WINDOW_SECONDS), *_METERED)
    counts = {gateway: int(count) for gateway, count in await store.read(_COUNT, given)}
    took: dict[str, list[float]] = {}
    for gateway, seconds in await store.read(_FIRST_TOKENS, given):
        took.setdefault(gateway, []).append(float(seconds))
    return {
        gateway: Use(count, round(median(took[gateway]), 3) if gateway in took else None)
        for gateway, count in counts.items()
    }


class Metrics:
    """What `used` says, asked at most every few seconds. None while the database is away."""

    def __init__(self, store: Store, *, clock: Clock) -> None:
        self._ask: Callable[[datetime], Awaitable[Mapping[str, Use]]] = lambda now: used(store, now)
        self._clock = clock
        self._at = float("-inf")
        self._told: Mapping[str, Use] | None = None

    async def look(self) -> Mapping[str, Use] | None:
        if self._clock() - self._at > _KEEP_SECONDS:
            self._at = self._clock()  # others need not ask meanwhile
            try:
                async with asyncio.timeout(_SECONDS):
                    self._told = await self._ask(datetime.now(UTC))
            except (ParallamaError, TimeoutError):
                self._told = None
        return self._told
