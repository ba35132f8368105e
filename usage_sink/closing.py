"""The counters are told of stored rows, at once or when Redis is back."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from decimal import Decimal

from parallama.clock import Clock
from parallama.counters import NOT_COUNTED, Counters
from parallama.counters.closing import close, is_to_be_closed
from parallama.db import Store
from parallama.db.ledger import spent_by
from parallama.limits import Unit
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
            if is_to_be_closed(record):
                self._close(record)

    async def run(self, pause: Callable[[], Awaitable[None]]) -> None:
        """For ever: tell again what could not be told."""
        while True:
            await pause()
            for _ in range(len(self._owed)):
                self._close(self._owed.popleft())

    def _close(self, record: UsageRecord, *, uncounted: bool = False) -> None:
        closed = close(self._counters, record, self._clock(), uncounted=uncounted)
        closed.add_done_callback(lambda done: self._closed(record, done))

    def _closed(self, record: UsageRecord, done: "asyncio.Future[int]") -> None:
        error = done.exception()
        if error is None:
            if done.result() == NOT_COUNTED and record.admitted:
                self._close(record, uncounted=True)
            return
        if not self._owed:
            log.warning("reservations wait for redis", extra={"cause": str(error)})
        self._owed.append(record)


async def as_stored(db: Store, records: Sequence[UsageRecord]) -> list[UsageRecord]:
    """
    With what their rows say was used. Whoever stored a row first may have known less, or more, and
    the counters have to say what the row says.
    """
    since = min(record.timestamp for record in records)
    spent = await spent_by(db, [record.request_id for record in records], since)
    told = []
    for record in records:
        if (at := spent.get(record.request_id)) is not None:
            cost = Decimal(at.cost) / Unit.COST.parts
            record = replace(record, tokens_used=at.tokens, compute_ms=float(at.compute), cost=cost)
        told.append(record)
    return told
