"""Rows that are too old are removed once a day."""

import asyncio
from datetime import UTC, datetime

import pytest

from parallama.errors import Unavailable
from usage_sink.pruning import prune_daily

NOW = datetime(2026, 3, 31, 12, 0, tzinfo=UTC)


def test_every_day_what_is_older_goes_and_an_outage_costs_a_day(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[datetime] = []
    days = 0

    async def prune(before: datetime) -> int:
        asked.append(before)
        if days == 1:
            raise Unavailable("away")
        return 7

    async def a_day() -> None:
        nonlocal days
        days += 1
        if days == 3:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(
            prune_daily(
                prune,
                what="usage",
                days=30,
                clock=lambda: NOW.timestamp() + days * 86_400,
                pause=a_day,
            )
        )
    assert asked == [datetime(2026, 3, day, 12, 0, tzinfo=UTC) for day in (1, 2, 3)]
    assert "old rows not removed" in caplog.text
