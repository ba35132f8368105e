"""Rows that are too old are removed, once a day."""

import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from parallama.clock import Clock
from parallama.errors import ParallamaError

log = logging.getLogger(__name__)

Pause = Callable[[], Awaitable[None]]


async def prune_daily(
    prune: Callable[[datetime], Awaitable[int]], *, days: int, clock: Clock, pause: Pause
) -> None:
    """For ever; the first time at once. A database that is away is asked again the next day."""
    while True:
        try:
            removed = await prune(datetime.fromtimestamp(clock(), UTC) - timedelta(days=days))
        except ParallamaError as error:
            log.warning("old rows not removed", extra={"cause": str(error)})
        else:
            if removed:
                log.info("old rows removed", extra={"rows": removed})
        await pause()
