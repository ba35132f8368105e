"""A stored row closes its call's reservation: what was not charged yet is charged by the row."""

from asyncio import Future, gather
from collections.abc import Iterable

from parallama.counters import NOT_COUNTED, Call, Counters
from parallama.endpoints import METERED
from parallama.usage import UsageRecord


def close(
    counters: Counters, record: UsageRecord, now: float, *, uncounted: bool = False
) -> "Future[int]":
    """
    What `Counters.close` says. Where that is NOT_COUNTED and the call was admitted, do it again
    with `uncounted`: then ratelimit charges it.
    """
    began = record.timestamp.timestamp()
    late = None
    if uncounted:
        late = Call(
            record.request_id,
            record.user_id,
            record.key_id or "",
            record.gateway,
            record.dialect,
            record.endpoint,
            record.model_name or "",
            began,
            record.grants or "",
        )
    return counters.close(
        record.user_id, record.request_id, record.spent, began=began, now=now, late=late
    )


def is_to_be_closed(record: UsageRecord) -> bool:
    """Others hold nothing."""
    return record.endpoint in METERED


async def close_all(counters: Counters, records: Iterable[UsageRecord], now: float) -> None:
    """Raises Unavailable: what is not closed then ends with its lease."""
    metered = [record for record in records if is_to_be_closed(record)]
    told = await gather(*(close(counters, record, now) for record in metered))
    again = [
        record
        for record, answer in zip(metered, told, strict=True)
        if answer == NOT_COUNTED and record.admitted
    ]
    await gather(*(close(counters, record, now, uncounted=True) for record in again))
