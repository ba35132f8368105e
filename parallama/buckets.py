"""Buckets: the counts of limits in their windows, by name (pure)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, tzinfo
from decimal import Decimal
from functools import lru_cache
from urllib.parse import quote

from parallama.counters import Hold, bucket_name
from parallama.db.ledger import Used
from parallama.limits import Grant, Limit, Unit, Window


@dataclass(frozen=True, slots=True)
class Bucket:
    """
    The count of one limit in one of its windows, from `start` to before `end`; or of the grant with
    the id `grant`, as long as that lasts.
    """

    limit: Limit
    name: str
    start: int
    end: int
    grant: str = ""

    def counts(self, gateway: str, model: str, key: str, grants: str) -> bool:
        """Whether a call counts here that was paid for by these grants, as UsageRecord says it."""
        paid = dict(part.split(":", 1) for part in grants.split(",") if ":" in part)
        by = paid.get(self.limit.unit, "")
        return by == self.grant and (bool(by) or self.limit.covers(gateway, model, key))

    def hold(self, amount: int) -> Hold:
        limit = self.limit
        # A window that had begun when the limit was set is looked up, whoever is known by then.
        start = self.start if limit.set_at <= self.start else 0
        return Hold(self.name, limit.unit, limit.amount, amount, start, self.end, limit.shadow)


def buckets(
    limits: Iterable[Limit], gateway: str, model: str, key: str, now: float, zone: tzinfo = UTC
) -> list[Bucket]:
    """The buckets a call has to find room in."""
    minute = int(now // 60)
    return [_bucket(limit, minute, zone) for limit in limits if limit.covers(gateway, model, key)]


def bucket(limit: Limit, now: float, zone: tzinfo = UTC) -> Bucket:
    """That of one limit, whatever calls it is for."""
    return _bucket(limit, int(now // 60), zone)


def running(
    limits: Iterable[Limit], grants: Iterable[Grant], now: float, zone: tzinfo = UTC
) -> list[Bucket]:
    """All buckets of a user in which something can be counted now."""
    minute = int(now // 60)
    lasting = [granted(at) for at in grants if at.created_at <= now < at.expires_at]
    return [*(_bucket(limit, minute, zone) for limit in limits), *lasting]


def granted(grant: Grant) -> Bucket:
    """What is used of a grant is counted as long as it lasts."""
    limit = Limit(grant.gateway, grant.model, grant.unit, Window.MONTH, grant.amount)
    start, end = int(grant.created_at), math.ceil(grant.expires_at)
    return Bucket(limit, f"grant:{quote(grant.id, safe='')}", start, end, grant.id)


def spent(bucket: Bucket, rows: Iterable[Used]) -> int:
    """What belongs into a bucket by the sums of usage rows of its time."""
    covered = [
        row
        for row in rows
        if bucket.counts(row.gateway, row.model_name or "", row.key_id or "", row.grants or "")
    ]
    parts = bucket.limit.unit.parts
    match bucket.limit.unit:
        case Unit.REQUESTS:
            return sum(row.requests for row in covered)
        case Unit.TOKENS:
            return sum(row.tokens for row in covered)
        case Unit.COMPUTE_SECONDS:
            return math.ceil(sum(row.compute_ms for row in covered))
        case _:
            return math.ceil(sum((row.cost for row in covered), Decimal()) * parts)


@lru_cache(maxsize=4096)
def _bucket(limit: Limit, minute: int, zone: tzinfo) -> Bucket:
    """No window is shorter than a minute, so all calls of one minute share this."""
    start, end = limit.window.bounds(minute * 60, zone)
    return Bucket(limit, bucket_name(limit, start), start, end)
