"""What is left of somebody's limits, and when each starts again."""

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal

from parallama.admin.shapes import GrantLeft, Quota, Quotas
from parallama.admin.visit import Office
from parallama.buckets import Bucket, bucket, granted, spent
from parallama.counters import Seen
from parallama.db.ledger import Span, Used, spending
from parallama.db.policies import policy_of
from parallama.endpoints import METERED
from parallama.limits import Unit, Window


async def quotas(office: Office, user_id: str, key_id: str | None = None) -> Quotas:
    """
    Of all keys' limits, or of one key's. Raises Unavailable.

    What the counters do not know is read from the usage rows, as ratelimit will at the next call.
    """
    at = office.now()
    now, zone = at.timestamp(), office.config.rate_limiting.zone
    policy = await policy_of(office.store, user_id)
    limits = [
        bucket(limit, now, zone)
        for limit in policy.limits
        if key_id is None or limit.key in ("", key_id)
    ]
    grants = [grant for grant in policy.grants if grant.created_at <= now < grant.expires_at]
    every = [*limits, *map(granted, grants)]
    seen = await office.counters.look(user_id, [each.hold(0) for each in every], now)
    rows = await _rows(office, user_id, every, seen)
    used = [
        each.used if each.known else spent(b, rows[b.start, b.end])
        for b, each in zip(every, seen, strict=True)
    ]
    left = [
        max(0, b.limit.amount - count - each.reserved)
        for b, count, each in zip(every, used, seen, strict=True)
    ]
    told = zip(every, used, seen, left, strict=True)
    return Quotas(
        user_id=user_id,
        at=at,
        limits=[_quota(b, u, s.reserved, n) for b, u, s, n in told if not b.grant],
        grants=[
            GrantLeft(
                id=grant.id,
                gateway=grant.gateway,
                model=grant.model,
                unit=grant.unit,
                amount=_amount(grant.unit, grant.amount),
                left=_amount(grant.unit, n),
                expires_at=_time(grant.expires_at),
            )
            for grant, n in zip(grants, left[len(limits) :], strict=True)
        ],
    )


async def _rows(
    office: Office, user_id: str, every: Sequence[Bucket], seen: Sequence[Seen]
) -> dict[tuple[int, int], Sequence[Used]]:
    """Sums of usage rows, by the windows that the counters do not know."""
    unknown = (b for b, each in zip(every, seen, strict=True) if not each.known)
    windows = sorted({(b.start, b.end) for b in unknown})
    spans: list[Span] = [(_time(start), _time(end)) for start, end in windows]
    nothing = (_time(0), _time(0))
    found = await spending(office.store, user_id, spans, nothing, endpoints=METERED)
    return dict(zip(windows, found.sums, strict=True))


def _quota(b: Bucket, used: int, reserved: int, left: int) -> Quota:
    limit = b.limit
    return Quota(
        gateway=limit.gateway,
        model=limit.model,
        key_id=limit.key or None,
        unit=limit.unit,
        window=limit.window,
        shadow=limit.shadow,
        limit=_amount(limit.unit, limit.amount),
        used=_amount(limit.unit, used),
        reserved=_amount(limit.unit, reserved),
        left=_amount(limit.unit, left),
        resets_at=None if limit.window is Window.MOMENT else _time(b.end),
    )


def _amount(unit: Unit, parts: int) -> int | Decimal:
    """What is counted in parts of a unit is no whole number of it."""
    return parts if unit.parts == 1 else Decimal(parts) / unit.parts


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
