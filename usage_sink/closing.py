"""A stored row closes its call's reservation: what was not charged yet is charged by the row."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from decimal import ROUND_UP, Decimal
from math import ceil

from parallama.clock import Clock
from parallama.counters import Counters
from parallama.limits import Unit
from parallama.roles import METERED
from parallama.usage import UsageRecord

log = logging.getLogger(__name__)

# Calls whose reservation could not be closed yet; one that is forgotten is found by its lease.
_OWED = 50_000


class Closer:
    """Tells the counters of rows. While Redis is away it remembers what it has to tell."""

    def __init__(self, counters: Counters, *, clock: Clock) -> None:
        self._counters = counters
        self._clock = clock
        self._owed: deque[UsageRecord] = deque(maxlen=_OWED)

    def stored(self, records: Sequence[UsageRecord]) -> None:
        """These rows are in the database. Returns at once."""
        for record in records:
            if record.endpoint in METERED:
                self._close(record)

    async def run(self, pause: Callable[[], Awaitable[None]]) -> None:
        """For ever: tell again what could not be told."""
        while True:
            await pause()
            for _ in range(len(self._owed)):
                self._close(self._owed.popleft())

    def _close(self, record: UsageRecord) -> None:
        closed = self._counters.close(
            record.user_id,
            record.request_id,
            tokens=record.tokens_used,
            compute=compute_parts(record),
            cost=cost_parts(record.cost),
            now=self._clock(),
        )
        closed.add_done_callback(lambda done: self._closed(record, done))

    def _closed(self, record: UsageRecord, done: "asyncio.Future[int]") -> None:
        error = done.exception()
        if error is None:
            return
        if not self._owed:
            log.warning("reservations wait for redis", extra={"cause": str(error)})
        self._owed.append(record)


def compute_parts(record: UsageRecord) -> int:
    """What the upstream says that it worked, else how long the request took; in milliseconds."""
    if record.compute_ms is not None:
        return max(0, ceil(record.compute_ms))
    return max(0, ceil(record.request_duration * Unit.COMPUTE_SECONDS.parts))


def cost_parts(cost: Decimal | None) -> int:
    """In the parts that are counted, rounded up."""
    if cost is None:
        return 0
    return int((cost * Unit.COST.parts).to_integral_value(ROUND_UP))
