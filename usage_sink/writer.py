"""Rows of Envoy's stream wait here until the database has them: a bounded queue, and batches."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager, suppress

from parallama.usage import UsageRecord
from usage_sink.storing import Storing

log = logging.getLogger(__name__)

# More ids than come while a line of the trail waits to be looked at. A forgotten one costs a look
# into the database.
_REMEMBERED = 50_000


class Settled:
    """Ids of rows that are stored: the trail is not asked for them. The oldest are forgotten."""

    def __init__(self, size: int = _REMEMBERED) -> None:
        self._ids: dict[str, None] = {}
        self._size = size

    def add(self, ids: Iterable[str]) -> None:
        self._ids.update(dict.fromkeys(ids))
        while len(self._ids) > self._size:
            del self._ids[next(iter(self._ids))]

    def take(self, id: str | None) -> bool:
        """Whether it was there. It is asked for once."""
        return id is not None and self._ids.pop(id, self) is None


class Writer:
    """
    Stores records in batches. A batch is forgotten only after it is stored.

    When the queue is full `put` waits, which holds back Envoy's stream; the trail goes on.
    """

    def __init__(
        self,
        storing: Storing,
        settled: Settled,
        *,
        batch_rows: int,
        flush_seconds: float,
        queue_rows: int,
    ) -> None:
        self._storing = storing
        self._settled = settled
        self._batch_rows = batch_rows
        self._flush_seconds = flush_seconds
        self._queue: asyncio.Queue[UsageRecord] = asyncio.Queue(queue_rows)
        self._in_hand: list[UsageRecord] = []
        self._hurry = asyncio.Event()
        self._held: set[str] = set()  # what was put and is not stored yet
        self._progress = asyncio.Event()

    async def put(self, record: UsageRecord) -> None:
        self._held.add(record.request_id)
        try:
            await self._queue.put(record)
        except asyncio.CancelledError:
            self._let_go([record.request_id])
            raise

    async def until_stored(self, ids: Collection[str]) -> None:
        """Return when none of these waits here."""
        while not self._held.isdisjoint(ids):
            await self._progress.wait()

    async def run(self) -> None:
        """Write for ever."""
        while True:
            batch = [await self._queue.get()]
            if self._queue.qsize() < self._batch_rows:
                await self._linger()
            while len(batch) < self._batch_rows and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            self._in_hand = batch
            await self._store(batch)
            self._in_hand = []
            for _ in batch:
                self._queue.task_done()

    async def drain(self) -> None:
        """Return when all that was put is stored. From now on no row waits for others."""
        self._hurry.set()
        await self._queue.join()

    @property
    def waiting(self) -> int:
        """Rows that are not stored yet."""
        return self._queue.qsize() + len(self._in_hand)

    def give_up(self) -> set[str]:
        """The ids of the rows that wait, which are forgotten."""
        ids = {record.request_id for record in self._in_hand}
        while not self._queue.empty():
            ids.add(self._queue.get_nowait().request_id)
        self._let_go(ids)
        return ids

    async def _linger(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._flush_seconds):
                await self._hurry.wait()

    async def _store(self, batch: list[UsageRecord]) -> None:
        new, nowhere = await self._storing.store(batch)
        if new < len(batch):
            log.info("rows were there already", extra={"rows": len(batch) - new})
        self._settled.add(record.request_id for record in batch if record.request_id not in nowhere)
        self._let_go([record.request_id for record in batch])

    def _let_go(self, ids: Iterable[str]) -> None:
        self._held.difference_update(ids)
        self._progress.set()
        self._progress = asyncio.Event()


async def _nothing() -> None:
    pass


@asynccontextmanager
async def writing(
    writer: Writer,
    *,
    deadline: float,
    then: Callable[[], Awaitable[None]] = _nothing,
    missing: Callable[[set[str]], set[str]] = set,
) -> AsyncIterator[Writer]:
    """
    Run `writer`. On the way out it has `deadline` seconds to store what it was given, `then` too.

    `missing` tells which of some ids the trail does not have.
    """
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(writer.run(), name="usage writer")
        try:
            yield writer
            await _drain(writer, deadline, then, missing)
        finally:
            running.cancel()


async def _drain(
    writer: Writer,
    deadline: float,
    then: Callable[[], Awaitable[None]],
    missing: Callable[[set[str]], set[str]],
) -> None:
    try:
        async with asyncio.timeout(deadline):
            await writer.drain()
            await then()
    except TimeoutError:
        ids = writer.give_up()
        lost = missing(ids)
        if len(ids) > len(lost):
            log.warning("rows wait in the trail", extra={"rows": len(ids) - len(lost)})
        if lost:
            log.error("rows lost: the database did not take them", extra={"rows": len(lost)})
