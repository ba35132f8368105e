"""While Redis is away: what each gateway does then, and what is owed once it is back."""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from parallama.clock import Clock
from parallama.limits import Unit
from ratelimit import rules

log = logging.getLogger(__name__)

Away = Literal["deny", "allow", "local"]

# Seconds for which nobody asks a Redis again that did not answer: one who waits for it is enough.
_PAUSE = 0.5
# For the usage row: see rules.decision.
_REDIS_AWAY = '"away":"redis"'

# Buckets whose last state is remembered, and calls that are owed.
_BUCKETS = 100_000
_OWED = 100_000


@dataclass(slots=True)
class _Share:
    """Of one bucket: what was last known to be taken, and what this process gave out since."""

    known: int = 0
    used: int = 0
    reserved: int = 0


class Outage:
    """
    What `away` says, by gateway: `deny`, `allow`, or `local`, which gives out a fair share of what
    was left when the counters were last seen: one of `processes` that share them.

    `monotonic` is in seconds.
    """

    def __init__(self, away: Mapping[str, Away], *, processes: int, monotonic: Clock) -> None:
        self._away = away
        self._processes = processes
        self._monotonic = monotonic
        self._remembers = "local" in away.values()
        self._since: float | None = None
        self._shares: OrderedDict[tuple[str, str], _Share] = OrderedDict()
        self._held: dict[str, list[tuple[rules.Bucket, _Share, int]]] = {}
        self._owed: deque[rules.Settle] = deque()

    def lasts(self) -> bool:
        """Redis did not answer a moment ago."""
        return self._since is not None and self._monotonic() < self._since + _PAUSE

    def begins(self, error: BaseException) -> None:
        if self._since is None:
            log.error("limits not checked", extra={"policy": dict(self._away), "cause": str(error)})
        self._since = self._monotonic()

    def ends(self, user: str, levels: Sequence[rules.Level]) -> None:
        """Redis answered, and said this."""
        if self._since is not None:
            self._since = None
            log.info("limits checked again")
            # From here on Redis counts, and is told what is owed.
            self._shares.clear()
        if self._remembers:
            for level in levels:
                key = (user, level.bucket.name)
                self._shares[key] = _Share(level.used + level.reserved)
                self._shares.move_to_end(key)
            while len(self._shares) > _BUCKETS:
                self._shares.popitem(last=False)

    def without_limits(self, ask: rules.Reserve, error: BaseException) -> rules.Admitted | None:
        """Nobody knows which limits there are, because the database is away."""
        log.error("limits not known", extra={"policy": dict(self._away), "cause": str(error)})
        if self._away[ask.gateway] == "allow":
            return rules.Admitted(ask.request_id, 0, None, None, decision='"away":"database"')
        return None

    def reserve(
        self, ask: rules.Reserve, met: Sequence[rules.Bucket], need: rules.Need, now: float
    ) -> rules.Admitted | rules.Refused | None:
        """None is to be denied."""
        away = self._away[ask.gateway]
        if away == "allow" or not met:
            return rules.Admitted(ask.request_id, 0, None, None, decision=_REDIS_AWAY)
        if away == "deny":
            return None
        levels, holds = [], []
        for bucket in met:
            share = self._shares.setdefault((ask.user, bucket.name), _Share())
            amount = need.of(bucket.limit.unit)
            mine = max(0, bucket.limit.amount - share.known) // self._processes
            taken = share.used + share.reserved
            full = taken >= mine or (share.reserved > 0 and taken + amount > mine)
            levels.append(rules.Level(bucket, share.known + share.used, share.reserved, full))
            holds.append((bucket, share, amount))
        if any(level.refuses for level in levels):
            return rules.refuse(levels, now, f'"rule":"limit",{_REDIS_AWAY}')
        for bucket, share, amount in holds:
            if bucket.limit.unit is Unit.REQUESTS:
                share.used += amount
            else:
                share.reserved += amount
        self._held[ask.request_id] = holds
        return rules.admit(levels, ask.request_id, need.tokens, now, decision=_REDIS_AWAY)

    def settle(self, end: rules.Settle) -> None:
        """The call has ended: what it held of our shares is given back, what it used is used."""
        for bucket, share, amount in self._held.pop(end.reservation, ()):
            unit = bucket.limit.unit
            if unit is Unit.REQUESTS:
                continue
            share.reserved -= amount
            if unit is Unit.TOKENS:
                share.used += end.used
            elif unit is not Unit.CONCURRENT:
                share.used += amount

    def owe(self, end: rules.Settle, error: BaseException) -> None:
        """Redis could not be told what a call used."""
        if end.used == 0:
            return
        if len(self._owed) >= _OWED:
            log.error(
                "charge lost",
                extra={"user": end.user, "tokens": end.used, "cause": "too many are owed"},
            )
            return
        if not self._owed:
            log.warning("charges wait for redis", extra={"cause": str(error)})
        self._owed.append(end)

    @property
    def owed(self) -> int:
        """Charges that Redis was not told of yet."""
        return len(self._owed)

    async def pay(
        self, settle: Callable[[rules.Settle], None], *, pause: Callable[[], Awaitable[None]]
    ) -> None:
        """For ever: tell Redis what is owed, once it answers."""
        while True:
            await pause()
            if self.lasts():
                continue
            for _ in range(len(self._owed)):
                settle(self._owed.popleft())


async def a_second() -> None:
    await asyncio.sleep(1)
