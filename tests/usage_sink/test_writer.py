"""Rows wait for the database: in batches, in order, with patience, and never in silence."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from decimal import Decimal

import pytest

from parallama.db.ledger import Added
from parallama.errors import SchemaError, Unavailable
from parallama.trail import Letter
from parallama.usage import UsageRecord
from tests.parallama.db_on_disk import a_record
from usage_sink.storing import Storing
from usage_sink.writer import Settled, Writer, writing


class Ledger:
    """Keeps rows in memory. Fails as often as it is told, and waits while its gate is shut."""

    def __init__(self, *, failures: Sequence[Exception] = (), shut: bool = False) -> None:
        self.batches: list[list[str]] = []
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.always: Exception | None = None
        self.refused: set[str] = set()
        self.letters: list[Letter] = []
        self.disk_is_full = False
        self._failures = list(failures)
        if not shut:
            self.gate.set()

    async def add(self, records: Sequence[UsageRecord]) -> Added:
        self.asked.set()
        await self.gate.wait()
        if self.always is not None:
            raise self.always
        if self._failures:
            raise self._failures.pop(0)
        before = set(self.rows)
        taken = [record for record in records if record.request_id not in self.refused]
        self.batches.append([record.request_id for record in taken])
        new = len({record.request_id for record in taken} - before)
        return Added(new, tuple((record, "odd") for record in records if record not in taken))

    def set_aside(self, letters: Iterable[Letter]) -> None:
        if self.disk_is_full:
            raise OSError(28, "No space left on device")
        self.letters += letters

    @property
    def rows(self) -> list[str]:
        return [row for batch in self.batches for row in batch]


def a_writer(
    ledger: Ledger,
    *,
    batch_rows: int = 10,
    flush_seconds: float = 0,
    queue_rows: int = 100,
    settled: Settled | None = None,
) -> Writer:
    return Writer(
        Storing(ledger.add, ledger.set_aside),
        Settled() if settled is None else settled,
        batch_rows=batch_rows,
        flush_seconds=flush_seconds,
        queue_rows=queue_rows,
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
    caplog.set_level("INFO")

    async def story() -> None:
        ledger = Ledger(failures=[error, error])
        async with writing(a_writer(ledger, batch_rows=2), deadline=10) as writer:
            await put(writer, "r1", "r2", "r3")
        assert ledger.rows == ["r1", "r2", "r3"]

    told(story)
    said = [at for at in caplog.records if at.message == "rows not stored yet"]
    assert [(at.rows, at.cause) for at in said] == [(2, str(error))]  # type: ignore[attr-defined]
    assert "rows are stored again" in caplog.messages


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


def test_what_nobody_planned_is_kept_aside_and_the_others_stored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story() -> None:
        ledger = Ledger(failures=[ValueError("nobody planned this")])
        async with writing(a_writer(ledger, batch_rows=2), deadline=10) as writer:
            await put(writer, *range(6))
        assert ledger.rows[-4:] == ["2", "3", "4", "5"]
        assert [at.row and at.row.request_id for at in ledger.letters] == ["0", "1"]
        assert {at.reason for at in ledger.letters} == {"a mistake in Parallama: ValueError"}

    told(story)
    assert any(at.levelno >= logging.ERROR for at in caplog.records)


def test_leaving_does_not_wait_for_company() -> None:
    ledger = Ledger()

    async def story() -> None:
        async with writing(a_writer(ledger, flush_seconds=60), deadline=5) as writer:
            await writer.put(a_record("r1"))

    told(story)
    assert ledger.rows == ["r1"]


# What the database refuses, and what the trail need not be asked for.


def test_a_row_that_is_refused_is_kept_aside_with_the_reason_and_the_others_are_stored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story() -> None:
        ledger, settled = Ledger(), Settled()
        ledger.refused = {"2"}
        async with writing(a_writer(ledger, settled=settled), deadline=10) as writer:
            await put(writer, *range(4))
        assert ledger.rows == ["0", "1", "3"]
        assert [(at.reason, at.row and at.row.request_id) for at in ledger.letters] == [
            ("odd", "2")
        ]
        assert [settled.take(name) for name in names(5)] == [True] * 4 + [False]

    told(story)
    (said,) = [at for at in caplog.records if at.levelno == logging.ERROR]
    assert (said.message, said.rows, said.request_id) == (  # type: ignore[attr-defined]
        "rows refused by the database, and kept aside", 1, "2",
    )  # fmt: skip


def test_a_row_that_neither_database_nor_disk_takes_is_left_to_the_trail(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story() -> None:
        ledger, settled = Ledger(), Settled()
        ledger.refused, ledger.disk_is_full = {"1"}, True
        async with writing(a_writer(ledger, settled=settled), deadline=10) as writer:
            await put(writer, *range(3))
        assert ledger.rows == ["0", "2"]
        assert [settled.take(name) for name in names(3)] == [True, False, True]

    told(story)
    assert "rows refused by the database, and not kept aside" in caplog.text


def test_rows_are_priced_before_and_told_after_they_are_stored() -> None:
    async def story() -> None:
        ledger = Ledger()
        heard: list[str] = []

        async def price(records: Sequence[UsageRecord]) -> Sequence[UsageRecord]:
            assert ledger.rows == []
            return [replace(record, cost=Decimal(2)) for record in records]

        def stored(records: Sequence[UsageRecord]) -> None:
            assert ledger.rows == ["1", "2"]
            heard.extend(record.request_id for record in records)
            raise RuntimeError("who was told has a problem")

        ledger.refused = {"3"}
        storing = Storing(ledger.add, ledger.set_aside, price=price, stored=stored)
        new, nowhere = await storing.store([a_record(name) for name in "123"])
        assert (new, nowhere, heard) == (2, set(), ["1", "2"])
        assert [at.row and at.row.cost for at in ledger.letters] == [Decimal(2)]

    told(story)


def test_a_price_list_that_cannot_be_read_makes_rows_wait() -> None:
    async def story() -> None:
        ledger, asked = Ledger(), 0

        async def price(records: Sequence[UsageRecord]) -> Sequence[UsageRecord]:
            nonlocal asked
            asked += 1
            if asked == 1:
                raise Unavailable("away")
            return records

        await Storing(ledger.add, ledger.set_aside, price=price).store([a_record("1")])
        assert (ledger.rows, asked) == (["1"], 2)

    told(story)


def test_the_oldest_ids_are_forgotten_and_each_is_asked_for_once() -> None:
    settled = Settled(2)
    settled.add(["1", "2", "3"])
    assert [settled.take(id) for id in ("1", "2", "3", "3", None)] == [
        False, True, True, False, False,
    ]  # fmt: skip


def test_at_the_deadline_rows_that_the_trail_has_are_not_called_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story() -> None:
        ledger = Ledger()
        ledger.always = Unavailable("away")
        async with writing(a_writer(ledger), deadline=0.1, missing=lambda ids: ids & {"1"}) as to:
            await put(to, *range(25))

    told(story)
    said = [(at.message, at.rows) for at in caplog.records if hasattr(at, "rows")]
    assert said[-2:] == [
        ("rows wait in the trail", 24),
        ("rows lost: the database did not take them", 1),
    ]
