"""Counters that were lost, or that begin now, learn from the usage rows what was spent."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from math import ceil

from parallama.counters import Counters
from parallama.db.ledger import Used
from parallama.limits import Unit
from ratelimit.rules import Bucket

# Calls of this long ago may still have to be settled though their row is stored.
_RECENT = 120


class Rebuild:
    """
    Call it with buckets of a user that the counters do not know.

    `used_since` gives the sums of the rows from a time on, `stored_since` their requests' ids.
    """

    def __init__(
        self,
        counters: Counters,
        used_since: Callable[[str, datetime], Awaitable[Sequence[Used]]],
        stored_since: Callable[[str, datetime], Awaitable[Iterable[str]]],
    ) -> None:
        self._counters = counters
        self._used_since = used_since
        self._stored_since = stored_since
        self._running: dict[tuple[str, frozenset[str]], asyncio.Future[None]] = {}

    async def __call__(self, user: str, met: Sequence[Bucket], now: float) -> None:
        """Raises Unavailable. Who asks for what is being rebuilt shares that."""
        which = (user, frozenset(bucket.name for bucket in met))
        running = self._running.get(which)
        if running is None:
            running = asyncio.ensure_future(self._rebuild(user, met, now))
            self._running[which] = running
            running.add_done_callback(lambda _: self._running.pop(which))
        await asyncio.shield(running)

    async def _rebuild(self, user: str, met: Sequence[Bucket], now: float) -> None:
        counted = [bucket for bucket in met if bucket.limit.unit is not Unit.CONCURRENT]
        sums: dict[int, Sequence[Used]] = {}
        recent: Iterable[str] = ()
        starts = sorted({bucket.start for bucket in counted})
        for i, start in enumerate(starts):
            sums[start] = await self._used_since(user, datetime.fromtimestamp(start, UTC))
            if not sums[start]:  # nor since any later time
                sums |= dict.fromkeys(starts[i:], ())
                break
        if sums[starts[0]]:
            recent = await self._stored_since(user, datetime.fromtimestamp(now - _RECENT, UTC))
        spent = [
            # What was spent of a grant is not in the rows: they do not say what paid for them.
            (bucket.hold(0), 0 if bucket.granted else _sum(bucket, sums[bucket.start]))
            for bucket in counted
        ]
        await self._counters.seed(user, spent, recent, now)


def _sum(bucket: Bucket, rows: Iterable[Used]) -> int:
    limit = bucket.limit
    covered = [
        row for row in rows if limit.covers(row.gateway, row.model_name or "", row.key_id or "")
    ]
    match limit.unit:
        case Unit.REQUESTS:
            return sum(row.requests for row in covered)
        case Unit.TOKENS:
            return sum(row.tokens for row in covered)
        case Unit.COMPUTE_SECONDS:
            return ceil(sum(row.compute_ms for row in covered))
        case _:
            return ceil(sum((row.cost for row in covered), Decimal()) * limit.unit.parts)
