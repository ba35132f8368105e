"""What is too old is removed, once a day."""

import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from parallama.clock import Clock
from parallama.errors import ParallamaError

log = logging.getLogger(__name__)

Pause = Callable[[], Awaitable[None]]


async def prune_daily(
    prune: Callable[[datetime], Awaitable[int]],
    *,
    what: str,
    days: int,
    clock: Clock,
    pause: Pause,
) -> None:
    """
    For ever; the first time at once. A database that is away is asked again the next day.

    `what` is removed, for the log.
    """
    while True:
        try:
            removed = await prune(datetime.fromtimestamp(clock(), UTC) - timedelta(days=days))
        except ParallamaError as error:
            log.warning("old rows not removed", extra={"of": what, "cause": str(error)})
        else:
            if removed:
                log.info("old rows removed", extra={"of": what, "rows": removed})
        await pause()
