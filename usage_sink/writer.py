"""Rows wait here until the database has them: a bounded queue, batches, retries."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from parallama.errors import ParallamaError
from parallama.usage import UsageRecord

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.1
_LONGEST_RETRY_SECONDS = 5.0


class Writer:
    """
    Stores records in batches. A batch is forgotten only after `add` returned.

    When the queue is full `put` waits, which in the end holds back Envoy.
    """

    def __init__(
        self,
        add: Callable[[Sequence[UsageRecord]], Awaitable[int]],
        *,
        batch_rows: int,
        flush_seconds: float,
        queue_rows: int,
    ) -> None:
        self._add = add
        self._batch_rows = batch_rows
        self._flush_seconds = flush_seconds
        self._queue: asyncio.Queue[UsageRecord] = asyncio.Queue(queue_rows)
        self._in_hand = 0
        self._hurry = asyncio.Event()

    async def put(self, record: UsageRecord) -> None:
        await self._queue.put(record)

    async def run(self) -> None:
        """Write for ever."""
        while True:
            batch = [await self._queue.get()]
            if self._queue.qsize() < self._batch_rows:
                await self._linger()
            while len(batch) < self._batch_rows and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            self._in_hand = len(batch)
            await self._store(batch)
            self._in_hand = 0
            for _ in batch:
                self._queue.task_done()

    async def drain(self) -> None:
        """Return when all that was put is stored. From now on no row waits for others."""
        self._hurry.set()
        await self._queue.join()

    @property
    def waiting(self) -> int:
        """Rows that are not stored yet."""
        return self._queue.qsize() + self._in_hand

    async def _linger(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._flush_seconds):
                await self._hurry.wait()

    async def _store(self, batch: Sequence[UsageRecord]) -> None:
        pause = _FIRST_RETRY_SECONDS
        while True:
            try:
                stored = await self._add(batch)
            except ParallamaError as error:
                log.warning("rows not stored yet", extra={"rows": len(batch), "cause": str(error)})
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_RETRY_SECONDS)
            except Exception:
                # Not the store's state but the rows, or a mistake of ours: trying again is no help,
                # and all others still wait.
                log.exception("rows lost: they cannot be stored", extra={"rows": len(batch)})
                return
            else:
                if stored < len(batch):
                    log.info("rows were there already", extra={"rows": len(batch) - stored})
                return


@asynccontextmanager
async def writing(writer: Writer, *, deadline: float) -> AsyncIterator[Writer]:
    """Run `writer`; on the way out give it `deadline` seconds to store what it was given."""
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(writer.run(), name="usage writer")
        try:
            yield writer
            await _drain(writer, deadline)
        finally:
            running.cancel()


async def _drain(writer: Writer, deadline: float) -> None:
    try:
        async with asyncio.timeout(deadline):
            await writer.drain()
    except TimeoutError:
        log.error("rows lost: the database did not take them", extra={"rows": writer.waiting})
