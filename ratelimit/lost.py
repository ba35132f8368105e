"""Calls whose end nobody told become usage rows, marked as what they are."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from parallama.clock import Clock
from parallama.counters import Call, Counters, Lost
from parallama.errors import ParallamaError
from parallama.usage import Spent, UsageRecord

log = logging.getLogger(__name__)

_WHY = "the end of this request was not told"


class Finder:
    """
    Looks for leases that are over.

    `add_lost` stores rows of requests that have none; `spent_by` tells what those used that have
    one, of which only the counters were not told; `charge` puts into buckets what is in none;
    `name_of` tells a user's name, None where the user is gone.
    """

    def __init__(
        self,
        counters: Counters,
        add_lost: Callable[[Sequence[UsageRecord]], Awaitable[int]],
        spent_by: Callable[[Sequence[str], datetime], Awaitable[Mapping[str, Spent]]],
        charge: Callable[[Call, Spent], Awaitable[None]],
        name_of: Callable[[str], Awaitable[str | None]],
        *,
        clock: Clock,
    ) -> None:
        self._counters = counters
        self._add_lost = add_lost
        self._spent_by = spent_by
        self._charge = charge
        self._name_of = name_of
        self._clock = clock

    async def look(self) -> int:
        """How many rows were written."""
        lost = await self._counters.expire(self._clock())
        if not lost:
            return 0
        names = {at.call.user: await self._name_of(at.call.user) for at in lost}
        rows = [_row(at, names[at.call.user] or at.call.user) for at in lost]
        written = await self._add_lost(rows)
        began = min(row.timestamp for row in rows) - timedelta(days=1)
        spent = await self._spent_by([row.request_id for row in rows], began)
        for at in lost:
            if (told := spent.get(at.call.request_id)) is not None:
                await self._tell(at, told)
        await self._counters.drop(lost)
        if written:
            log.warning("requests without an end became rows", extra={"rows": written})
        return written

    async def _tell(self, lost: Lost, spent: Spent) -> None:
        """The counters do not know what the row of this call says."""
        call = lost.call
        if lost.uncounted:
            await self._charge(call, spent)
        else:
            now = self._clock()
            await self._counters.close(call.user, call.request_id, spent, began=call.at, now=now)

    async def run(self, pause: Callable[[], Awaitable[None]]) -> None:
        """For ever. Who is away makes it wait: what was found is found again."""
        while True:
            await pause()
            try:
                await self.look()
            except ParallamaError as error:
                log.info("lost requests not looked for", extra={"cause": str(error)})


def _row(lost: Lost, username: str) -> UsageRecord:
    call = lost.call
    return UsageRecord(
        request_id=call.request_id,
        timestamp=datetime.fromtimestamp(call.at, UTC),
        user_id=call.user,
        username=username,
        key_id=call.key or None,
        gateway=call.gateway,
        dialect=call.dialect,
        endpoint=call.endpoint,
        model_name=call.model or None,
        served_model=None,
        prompt_tokens=None,
        completion_tokens=None,
        cached_tokens=None,
        tokens_used=lost.tokens or 0,
        token_source="unknown",  # noqa: S106 - not a password
        streamed=False,
        finished=False,
        aborted=False,
        status_code=0,
        flags="",
        error_message=_WHY,
        request_duration=0.0,
        time_to_first_token=None,
        compute_ms=None,
        upstream_host=None,
        cost=None,
        grants=call.grants or None,
    )
