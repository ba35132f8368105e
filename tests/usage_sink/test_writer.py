"""Rows wait for the database: in batches, in order, with patience, and never in silence."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import pytest

from parallama.errors import SchemaError, Unavailable
from parallama.usage import UsageRecord
from tests.parallama.db_on_disk import a_record
from usage_sink.writer import Writer, writing


class Ledger:
    """Keeps rows in memory. Fails as often as it is told, and waits while its gate is shut."""

    def __init__(self, *, failures: Sequence[Exception] = (), shut: bool = False) -> None:
        self.batches: list[list[str]] = []
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.always: Exception | None = None
        self._failures = list(failures)
        if not shut:
            self.gate.set()

    async def add(self, records: Sequence[UsageRecord]) -> int:
        self.asked.set()
        await self.gate.wait()
        if self.always is not None:
            raise self.always
        if self._failures:
            raise self._failures.pop(0)
        before = set(self.rows)
        self.batches.append([record.request_id for record in records])
        return len({record.request_id for record in records} - before)

    @property
    def rows(self) -> list[str]:
        return [row for batch in self.batches for row in batch]


def a_writer(
    ledger: Ledger, *, batch_rows: int = 10, flush_seconds: float = 0, queue_rows: int = 100
) -> Writer:
    return Writer(
        ledger.add, batch_rows=batch_rows, flush_seconds=flush_seconds, queue_rows=queue_rows
    )


def told(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await story()

    asyncio.run(bounded())


async def put(writer: Writer, *names: object) -> None:
    for name in names:
        await writer.put(a_record(str(name)))


def names(count: int) -> list[str]:
    return [str(n) for n in range(count)]


def test_rows_are_stored_in_order_and_in_batches_of_at_most_that_size() -> None:
    async def story() -> None:
        ledger = Ledger()
        async with writing(a_writer(ledger, batch_rows=10), deadline=10) as writer:
            await put(writer, *range(35))
        assert ledger.rows == names(35)
        assert [len(batch) for batch in ledger.batches] == [10, 10, 10, 5]

    told(story)


def test_a_lonely_row_is_stored_without_company() -> None:
    async def story() -> None:
        ledger = Ledger()
        async with writing(a_writer(ledger, flush_seconds=0.01), deadline=10) as writer:
            await put(writer, "r1")
            await writer.drain()
            assert ledger.rows == ["r1"]

    told(story)


def test_rows_that_come_together_are_stored_together() -> None:
    async def story() -> None:
        ledger = Ledger()
        async with writing(a_writer(ledger, flush_seconds=0.05), deadline=10) as writer:
            for name in names(5):
                await put(writer, name)
                await asyncio.sleep(0)
            await writer.drain()
        assert ledger.batches == [names(5)]

    told(story)


def test_while_a_batch_is_stored_new_rows_are_taken_and_kept_for_the_next() -> None:
    async def story() -> None:
        ledger = Ledger(shut=True)
        async with writing(a_writer(ledger), deadline=10) as writer:
            await put(writer, "r1")
            await ledger.asked.wait()
            await put(writer, "r2", "r3")
            ledger.gate.set()
        assert ledger.batches == [["r1"], ["r2", "r3"]]

    told(story)


def test_put_waits_when_the_queue_is_full_and_nothing_is_dropped() -> None:
    async def story() -> None:
        ledger = Ledger(shut=True)
        async with writing(a_writer(ledger, queue_rows=2), deadline=10) as writer:
            await put(writer, "in the batch")
            await ledger.asked.wait()
            await put(writer, "first", "second")
            one_more = asyncio.create_task(put(writer, "one more"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not one_more.done()
            ledger.gate.set()
            await one_more
        assert ledger.rows == ["in the batch", "first", "second", "one more"]

    told(story)


@pytest.mark.parametrize(
    "error", [Unavailable("the disk is full"), SchemaError("a newer version was here")]
)
def test_a_batch_that_failed_is_tried_again_and_the_order_kept(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        ledger = Ledger(failures=[error, error])
        async with writing(a_writer(ledger, batch_rows=2), deadline=10) as writer:
            await put(writer, "r1", "r2", "r3")
        assert ledger.rows == ["r1", "r2", "r3"]

    told(story)
    said = [at for at in caplog.records if at.message == "rows not stored yet"]
    assert [(at.rows, at.cause) for at in said] == [(2, str(error))] * 2  # type: ignore[attr-defined]


def test_on_the_way_out_everything_is_stored_first() -> None:
    async def story() -> None:
        ledger = Ledger(failures=[Unavailable("busy")])
        async with writing(a_writer(ledger, flush_seconds=0.05), deadline=10) as writer:
            await put(writer, *range(25))
            assert ledger.rows == []
        assert ledger.rows == names(25)

    told(story)


@pytest.mark.parametrize("count", [1, 3, 25])
def test_at_the_deadline_it_says_how_many_rows_are_lost(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Those in the batch that was being stored among them."""

    async def story() -> None:
        ledger = Ledger()
        ledger.always = Unavailable("away")
        async with writing(a_writer(ledger), deadline=0.2) as writer:
            await put(writer, *range(count))
        assert ledger.rows == []

    told(story)
    lost = [at for at in caplog.records if at.levelno == logging.ERROR]
    assert [(at.message, at.rows) for at in lost] == [  # type: ignore[attr-defined]
        ("rows lost: the database did not take them", count)
    ]


def test_a_database_that_hangs_does_not_hold_the_process() -> None:
    async def story() -> None:
        async with writing(a_writer(Ledger(shut=True)), deadline=0.1) as writer:
            await put(writer, "r1")

    told(story)


def test_rows_that_were_there_already_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def story() -> None:
        async with writing(a_writer(Ledger()), deadline=10) as writer:
            await put(writer, "r1")
            await writer.drain()
            await put(writer, "r1", "r2")

    told(story)
    said = [at for at in caplog.records if at.message == "rows were there already"]
    assert [at.rows for at in said] == [1]  # type: ignore[attr-defined]


def test_an_error_inside_is_not_taken_for_a_deadline(caplog: pytest.LogCaptureFixture) -> None:
    """A service whose own work timed out must not end as if all were well."""

    async def story() -> None:
        async with writing(a_writer(Ledger()), deadline=10):
            raise TimeoutError("something else")

    with pytest.raises(BaseExceptionGroup):
        told(story)
    assert "rows lost" not in caplog.text


def test_what_nobody_planned_costs_its_batch_at_most(caplog: pytest.LogCaptureFixture) -> None:
    """The process goes on, and says so: all rows that wait would be lost with it."""

    async def story() -> None:
        ledger = Ledger(failures=[ValueError("nobody planned this")])
        async with writing(a_writer(ledger, batch_rows=2), deadline=10) as writer:
            await put(writer, *range(6))
        assert ledger.rows[-4:] == ["2", "3", "4", "5"]

    told(story)
    assert any(at.levelno >= logging.ERROR for at in caplog.records)


def test_leaving_does_not_wait_for_company() -> None:
    ledger = Ledger()

    async def story() -> None:
        async with writing(a_writer(ledger, flush_seconds=60), deadline=5) as writer:
            await writer.put(a_record("r1"))

    told(story)
    assert ledger.rows == ["r1"]
