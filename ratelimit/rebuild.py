"""Counters that were lost, or that begin now, learn from the usage rows what was spent."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

from parallama.buckets import Bucket, spent
from parallama.counters import Counters, on_the_way
from parallama.db.ledger import Span, Spending
from parallama.errors import Unavailable
from parallama.limits import Unit

# More often than that nobody loses counters while they are built.
_TRIES = 3


class Rebuild:
    """
    Call it with all running buckets of a user of whom the counters do not know some.

    `spending` reads the rows of a user: sums of each span, and the ids of those in another one.
    """

    def __init__(
        self,
        counters: Counters,
        spending: Callable[[str, Sequence[Span], Span], Awaitable[Spending]],
    ) -> None:
        self._counters = counters
        self._spending = spending
        self._running: dict[tuple[str, frozenset[str]], asyncio.Future[None]] = {}

    async def __call__(self, user: str, running: Sequence[Bucket], now: float) -> None:
        """Raises Unavailable. Who asks for what is being rebuilt shares that."""
        which = (user, frozenset(bucket.name for bucket in running))
        work = self._running.get(which)
        if work is None:
            work = asyncio.ensure_future(self._rebuild(user, running, now))
            self._running[which] = work
            work.add_done_callback(lambda _: self._running.pop(which))
        await asyncio.shield(work)

    async def _rebuild(self, user: str, running: Sequence[Bucket], now: float) -> None:
        counted = [at for at in running if at.limit.unit is not Unit.CONCURRENT]
        spans = sorted({(at.start, at.end) for at in counted})
        for _ in range(_TRIES):
            since = await self._counters.begin(user, now)
            asked = [_span(*span) for span in spans]
            found = await self._spending(user, asked, _span(*on_the_way(since)))
            sums = dict(zip(spans, found.sums, strict=True))
            told = [(at.hold(0), spent(at, sums[at.start, at.end])) for at in counted]
            if await self._counters.seed(user, since, told, found.recent, now):
                return
        raise Unavailable("the counters cannot be used: they are lost again and again")


def _span(start: float, end: float) -> Span:
    return datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(end, UTC)
