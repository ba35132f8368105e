"""Usage rows on a real database."""

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import select

from parallama.db import ledger
from parallama.db.manage import people, usage
from parallama.db.manage.tables import gateway_usage_logs
from parallama.db.manage.usage import Which
from parallama.errors import NotFound
from parallama.roles import Role
from parallama.usage import UsageRecord
from tests.parallama.db_on_disk import NOW, Opened, a_minted, a_record, on

BOB = "7c1f2c1e-0000-4000-8000-000000000002"


async def everything(
    at: Opened, which: Which | None = None, **options: object
) -> list[UsageRecord]:
    rows = usage.rows(at.engine, which or Which(), **options)  # type: ignore[arg-type]
    return [record async for record in rows]


async def ids(at: Opened, which: Which, **options: object) -> list[str]:
    return [record.request_id for record in await everything(at, which, **options)]


def test_a_row_comes_back_as_it_was_given(tmp_path: Path) -> None:
    empty = a_record(
        "r2", timestamp=NOW + timedelta(microseconds=1), key_id=None, model_name=None,
        served_model=None, prompt_tokens=None, completion_tokens=None, cached_tokens=None,
        tokens_used=0, token_source="estimated", streamed=False, finished=False, aborted=True,
        status_code=0, flags="DC,UC", error_message="cut", time_to_first_token=None,
        compute_ms=None, upstream_host=None,
    )  # fmt: skip
    full = a_record("r1", prompt_tokens=0, cached_tokens=0, key_id=BOB)

    async def work(at: Opened) -> None:
        assert await ledger.add(at.store, [full, empty]) == 2
        assert await everything(at) == [full, empty]

    on(tmp_path, work)


def test_one_request_is_one_row_however_often_it_is_delivered(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        first = a_record("r1")
        assert await ledger.add(at.store, [first, a_record("r2")]) == 2
        assert await ledger.add(at.store, [a_record("r1", tokens_used=99), a_record("r3")]) == 1
        assert await ledger.add(at.store, [a_record("r4"), a_record("r4")]) == 1
        assert await ledger.add(at.store, []) == 0
        assert (await everything(at))[0] == first
        assert await usage.count(at.engine) == 4

    on(tmp_path, work)


def test_two_writers_with_the_same_rows_store_each_once(tmp_path: Path) -> None:
    rows = [a_record(f"r{number}") for number in range(50)]

    async def work(at: Opened) -> None:
        added = await asyncio.gather(ledger.add(at.store, rows), ledger.add(at.store, rows[::-1]))
        assert sum(added) == 50
        assert await usage.count(at.engine) == 50

    on(tmp_path, work)


def test_a_value_that_fits_no_column_does_not_hold_back_its_batch(tmp_path: Path) -> None:
    strange = a_record(
        "r1",
        model_name="llama\ud800\x00",
        prompt_tokens=2**70,
        completion_tokens=-(2**70),
        request_duration=float("nan"),
        compute_ms=float("inf"),
    )

    async def work(at: Opened) -> None:
        assert await ledger.add(at.store, [strange, a_record("r2")]) == 2
        stored, plain = await everything(at)
        assert stored == replace(
            strange,
            model_name="llama?\ufffd",
            prompt_tokens=2**63 - 1,
            completion_tokens=1 - 2**63,
            request_duration=None,
            compute_ms=None,
        )
        assert plain == a_record("r2")

    on(tmp_path, work)


def test_ids_are_uuids_in_the_order_of_time(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        await ledger.add(at.store, [a_record(f"r{number}") for number in range(500)])
        async with at.engine.connect() as connection:
            found = list(await connection.scalars(select(gateway_usage_logs.c.id)))
        assert len(set(found)) == 500
        assert {UUID(each).version for each in found} == {7}
        assert {str(UUID(each)) == each for each in found} == {True}
        assert {UUID(each).variant for each in found} == {UUID(int=1 << 63).variant}
        assert len({each[:13] for each in found}) <= 2  # the same millisecond, or the next

    on(tmp_path, work)


def test_filters_by_time_include_the_start_and_not_the_end(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        hours = [NOW + timedelta(hours=number) for number in range(4)]
        await ledger.add(at.store, [a_record(f"r{at.hour}", timestamp=at) for at in hours])
        assert await ids(at, Which(since=hours[1], until=hours[3])) == ["r13", "r14"]
        assert await ids(at, Which(), newest_first=True, limit=2) == ["r15", "r14"]

    on(tmp_path, work)


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 4, 5, 6, 11, 100])
def test_pages_join_without_gap_or_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newest_first: bool, limit: int | None
) -> None:
    """Also where many rows have the same time."""
    monkeypatch.setattr(usage, "_PAGE_ROWS", 5)
    times = [NOW + timedelta(seconds=number // 4) for number in range(17)]
    rows = [a_record(f"r{number:02}", timestamp=at) for number, at in enumerate(times)]

    async def work(at: Opened) -> None:
        await ledger.add(at.store, rows)
        wanted = [row.request_id for row in (rows[::-1] if newest_first else rows)][:limit]
        assert await ids(at, Which(), newest_first=newest_first, limit=limit) == wanted

    on(tmp_path, work)


def test_a_user_is_meant_by_name_or_id_also_when_gone_or_renamed(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        anna = await people.create_user(at.engine, "anna", Role.USER, now=NOW)
        mine = a_record("r1", user_id=anna.id, username="anna")
        await ledger.add(at.store, [mine, a_record("r2", user_id=BOB, username="bob")])
        assert await ids(at, Which(user="anna")) == ["r1"]
        assert await ids(at, Which(user=anna.id)) == ["r1"]
        assert await ids(at, Which(user="bob")) == ["r2"]
        assert await ids(at, Which(user=BOB)) == ["r2"]
        with pytest.raises(NotFound, match="'ghost'"):
            await ids(at, Which(user="ghost"))
        await people.update_user(at.engine, "anna", now=NOW, username="anne")
        assert await ids(at, Which(user="anne")) == ["r1"]
        await people.delete_user(at.engine, "anne")
        assert await everything(at, Which(user="anna")) == [mine]

    on(tmp_path, work)


def test_a_name_used_again_does_not_inherit_usage(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        await ledger.add(at.store, [a_record("r1", user_id=BOB, username="bob")])
        await people.create_user(at.engine, "bob", Role.USER, now=NOW)
        assert await ids(at, Which(user="bob")) == []

    on(tmp_path, work)


def test_sums_group_as_asked(tmp_path: Path) -> None:
    tomorrow = NOW + timedelta(days=1)
    rows = [
        a_record("r1", model_name="llama3", tokens_used=30),
        a_record("r2", model_name="gemma", tokens_used=5, status_code=503, aborted=True),
        a_record("r3", timestamp=tomorrow, prompt_tokens=None, completion_tokens=None),
        a_record("r4", user_id=BOB, username="bob", model_name=None, tokens_used=1),
    ]

    async def work(at: Opened) -> None:
        await ledger.add(at.store, rows)
        assert await usage.summary(at.engine, Which(), ["user"]) == [
            {
                "user": "anna", "user_id": rows[0].user_id, "requests": 3, "errors": 1,
                "aborted": 1, "prompt_tokens": 20, "completion_tokens": 40, "tokens_used": 65,
            },
            {
                "user": "bob", "user_id": BOB, "requests": 1, "errors": 0,
                "aborted": 0, "prompt_tokens": 10, "completion_tokens": 20, "tokens_used": 1,
            },
        ]  # fmt: skip
        by_day = await usage.summary(at.engine, Which(user="anna"), ["day", "model"])
        assert [(row["day"], row["model_name"], row["requests"]) for row in by_day] == [
            ("2026-03-01", "gemma", 1),
            ("2026-03-01", "llama3", 1),
            ("2026-03-02", "llama3", 1),
        ]
        (total,) = await usage.summary(at.engine, Which(), [])
        assert (total["requests"], total["tokens_used"]) == (4, 66)

    on(tmp_path, work)


def test_sums_of_nothing_are_zero(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        (total,) = await usage.summary(at.engine, Which(), [])
        assert set(total.values()) == {0}
        assert await usage.summary(at.engine, Which(), ["user"]) == []

    on(tmp_path, work)


def test_a_key_remembers_its_last_use(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        await people.create_user(at.engine, "anna", Role.USER, now=NOW)
        key = await people.create_key(at.engine, "anna", a_minted(), now=NOW)
        assert key.last_used_at is None

        async def last_use_after(*times: datetime) -> datetime | None:
            records = [a_record(f"{at}", timestamp=at, key_id=key.id) for at in times]
            await ledger.add(at.store, records)
            return (await people.get_key(at.engine, key.id)).last_used_at

        minutes = [NOW + timedelta(minutes=number) for number in range(4)]
        assert await last_use_after(minutes[2], minutes[1]) == minutes[2]
        assert await last_use_after(minutes[0]) == minutes[2]
        assert await last_use_after(minutes[3]) == minutes[3]

    on(tmp_path, work)
