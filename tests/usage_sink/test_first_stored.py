"""A row that both ways bring: which one is stored, and that the counters say what the row says."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from parallama.db.ledger import Added, add
from parallama.errors import Unavailable
from parallama.trail import Line, understood
from parallama.usage import UsageRecord
from tests.parallama.db_on_disk import on
from tests.usage_sink.lines import a_line, a_trail, append, lines
from usage_sink.closing import as_stored
from usage_sink.follower import Follower
from usage_sink.storing import Storing
from usage_sink.writer import Settled, Writer, writing


def a_record(id: str) -> UsageRecord:
    """As the trail tells it."""
    (found,), _ = understood([Line(0, a_line(id))], "usage.jsonl")
    return found.record


def counted(id: str) -> UsageRecord:
    """As the stream brings it, with tokens that the trail does not know."""
    return replace(a_record(id), tokens_used=4711, token_source="estimated")


def test_what_the_stream_brought_is_stored_as_it_brought_it(tmp_path: Path) -> None:
    """While the database is away both ways wait for it, and the trail waits for the stream."""
    rows: dict[str, UsageRecord] = {}
    back = asyncio.Event()

    async def add(records: Sequence[UsageRecord]) -> Added:
        await back.wait()
        new = [record for record in records if record.request_id not in rows]
        rows.update((record.request_id, record) for record in new)
        return Added(len(new), ())

    async def story() -> None:
        trail = a_trail(tmp_path)
        storing, settled = Storing(add, trail.set_aside), Settled()
        writer = Writer(storing, settled, batch_rows=2, flush_seconds=0.01, queue_rows=100)
        follower = Follower(
            trail, storing, settled, batch_rows=9, monotonic=lambda: 0, ahead=writer.until_stored
        )
        append(trail.current, lines(*(f"r{n}" for n in range(9))))
        async with asyncio.timeout(10), writing(writer, deadline=5):
            for n in range(8):
                await writer.put(counted(f"r{n}"))
            reading = asyncio.create_task(follower.catch_up())
            await asyncio.wait([reading], timeout=0.05)
            assert not reading.done()
            back.set()
            await reading

    asyncio.run(story())
    assert {id: row.tokens_used for id, row in rows.items()} == {
        **{f"r{n}": 4711 for n in range(8)},
        "r8": a_record("r8").tokens_used,
    }


def test_who_gives_up_waiting_for_room_is_waited_for_no_longer() -> None:
    async def away(records: Sequence[UsageRecord]) -> Added:
        raise Unavailable("away")

    async def story() -> None:
        writer = Writer(
            Storing(away, list), Settled(), batch_rows=1, flush_seconds=0.01, queue_rows=1
        )
        await writer.put(a_record("r1"))
        late = asyncio.create_task(writer.put(a_record("r2")))
        await asyncio.wait([late], timeout=0.01)
        waiting = asyncio.create_task(writer.until_stored(["r2"]))
        await asyncio.wait([waiting], timeout=0.01)
        assert not waiting.done()
        late.cancel()
        async with asyncio.timeout(5):
            await waiting
            first = asyncio.create_task(writer.until_stored(["r1"]))
            await asyncio.wait([first], timeout=0.01)
            assert writer.give_up() == {"r1"}
            await first

    asyncio.run(story())


def test_of_rows_that_were_there_the_counters_are_told_what_the_database_says(
    tmp_path: Path,
) -> None:
    """A sink that died after it had stored a row tells the counters by the trail's line of it."""
    told: list[UsageRecord] = []

    async def story(opened) -> None:  # type: ignore[no-untyped-def]
        await add(opened.store, [counted("r1")])
        storing = Storing(
            lambda records: add(opened.store, records),
            list,
            as_stored=lambda records: as_stored(opened.store, records),
            stored=told.extend,
        )
        assert await storing.store([a_record("r1"), a_record("r2")]) == (1, set())

    on(tmp_path, story)
    used = {record.request_id: record.tokens_used for record in told}
    assert used == {"r1": 4711, "r2": a_record("r2").tokens_used}
    assert {record.cost for record in told} == {Decimal(0)}


def test_what_cannot_be_looked_up_is_told_as_it_came() -> None:
    told: list[UsageRecord] = []

    async def add(records: Sequence[UsageRecord]) -> Added:
        return Added(0, ())

    async def away(records: Sequence[UsageRecord]) -> Sequence[UsageRecord]:
        raise Unavailable("away")

    storing = Storing(add, list, as_stored=away, stored=told.extend)
    asyncio.run(storing.store([a_record("r1")]))
    assert told == [a_record("r1")]
