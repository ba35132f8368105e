"""Which buckets a call touches, how much it holds, and what the answer says (pure)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

from parallama.limits import ANY, Limit, Unit, Window

# The longest that openai-python obeys `retry-after`.
LONGEST_RETRY = 120

# Most tokens that one call is held or charged for; Envoy's own bound for an addend.
MOST_TOKENS = 1_000_000_000

# Where only calls in flight stand in the way, nobody knows when they end. Soon, as a rule.
_HELD_RETRY = 5


@dataclass(frozen=True, slots=True)
class Reserve:
    """A call that wants to spend. `max_tokens` is None where the client named no maximum."""

    user: str
    gateway: str
    dialect: str
    model: str
    endpoint: str
    max_tokens: int | None
    body_bytes: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Settle:
    """A call that ended, the tokens it really used, and what is to be learned from it."""

    user: str
    reservation: str
    used: int
    model: str = ""
    body_bytes: int = 0
    prompt_tokens: int | None = None
    """As the upstream reported them; None where it did not."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """
    The count of one limit in one of its windows, which ends at `end`.

    `name` leaves the limit's amount out: a limit that is changed keeps its count.
    """

    limit: Limit
    name: str
    end: int


@dataclass(frozen=True, slots=True)
class Level:
    """What a bucket holds after a decision. `full`: it had no room for the call."""

    bucket: Bucket
    used: int
    reserved: int
    full: bool

    @property
    def left(self) -> int:
        return max(0, self.bucket.limit.amount - self.used - self.reserved)

    @property
    def gone(self) -> bool:
        """Nothing is left even when every call in flight has given back what it holds."""
        return self.used >= self.bucket.limit.amount


@dataclass(frozen=True, slots=True)
class Room:
    """The tightest limit of one unit: the amount, what is left of it, seconds until it resets."""

    limit: int
    left: int
    resets_in: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """`reservation` is what will be settled; None where no tokens are limited."""

    reservation: str | None
    granted: int
    requests: Room | None
    tokens: Room | None


@dataclass(frozen=True, slots=True)
class Refused:
    code: str
    message: str
    retry_after: int
    may_retry: bool
    requests: Room | None
    tokens: Room | None


UNLIMITED = Admitted(None, 0, None, None)


def buckets(limits: Iterable[Limit], gateway: str, model: str, now: float) -> list[Bucket]:
    """The buckets a call has to find room in: those that count requests come first."""
    minute = int(now // 60)
    met = [_bucket(limit, minute) for limit in limits if limit.covers(gateway, model)]
    met.sort(key=_counts_tokens)
    return met


def requests_among(met: Sequence[Bucket]) -> int:
    return sum(bucket.limit.unit is Unit.REQUESTS for bucket in met)


def admit(levels: Sequence[Level], reservation: str, granted: int, now: float) -> Admitted:
    requests, tokens = _room(levels, Unit.REQUESTS, now), _room(levels, Unit.TOKENS, now)
    if tokens is None:
        return Admitted(None, 0, requests, None)
    return Admitted(reservation, granted, requests, tokens)


def refuse(levels: Sequence[Level], now: float) -> Refused:
    """Names the limit among the full ones that stands in the way for longest."""
    worst = max((level for level in levels if level.full), key=_stands_in_the_way)
    limit = worst.bucket.limit
    wait = _seconds_until(worst.bucket.end, now)
    if not worst.gone:
        wait = min(wait, _HELD_RETRY)
    hard = worst.gone and (limit.window is not Window.MINUTE or limit.amount == 0)
    return Refused(
        code="insufficient_quota" if hard else "rate_limit_exceeded",
        message=_sentence(worst, now),
        retry_after=wait,
        may_retry=wait <= LONGEST_RETRY and limit.amount > 0,
        requests=_room(levels, Unit.REQUESTS, now),
        tokens=_room(levels, Unit.TOKENS, now),
    )


def duration(seconds: int) -> str:
    """As Go writes it: `1s`, `6m0s`, `23h59m1s`."""
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    if hour:
        return f"{hour}h{minute}m{second}s"
    return f"{minute}m{second}s" if minute else f"{second}s"


@lru_cache(maxsize=4096)
def _bucket(limit: Limit, minute: int) -> Bucket:
    """No window is shorter than a minute, so all calls of one minute share this."""
    start, end = limit.window.bounds(minute * 60)
    parts = (limit.gateway, limit.model, limit.unit, limit.window)
    return Bucket(limit, ":".join([*(quote(part, safe="") for part in parts), str(start)]), end)


def _counts_tokens(bucket: Bucket) -> bool:
    return bucket.limit.unit is Unit.TOKENS


def _stands_in_the_way(level: Level) -> tuple[bool, bool, int]:
    return level.bucket.limit.amount == 0, level.gone, level.bucket.end


def _room(levels: Iterable[Level], unit: Unit, now: float) -> Room | None:
    """Of limits with equally much left, the one that takes longest to reset."""
    tight: Level | None = None
    for level in levels:
        if level.bucket.limit.unit is unit and (
            tight is None or (level.left, -level.bucket.end) < (tight.left, -tight.bucket.end)
        ):
            tight = level
    if tight is None:
        return None
    return Room(tight.bucket.limit.amount, tight.left, _seconds_until(tight.bucket.end, now))


def _seconds_until(end: int, now: float) -> int:
    return max(1, math.ceil(end - now))


def _sentence(level: Level, now: float) -> str:
    limit = level.bucket.limit
    where = "" if limit.gateway == ANY else f" on {limit.gateway}"
    if limit.model != ANY:
        where += f" for model {limit.model}"
    if limit.amount == 0:
        return (
            f"You have no allowance for {limit.unit}{where}: your limit is 0 per {limit.window}. "
            "Ask your administrator for one."
        )
    unit = limit.unit.removesuffix("s") if limit.amount == 1 else limit.unit
    which = f"limit of {limit.amount} {unit} per {limit.window}{where}"
    if not level.gone:
        return (
            f"Your requests that are still running hold the rest of your {which}. "
            "Try again when one of them has finished, or ask for fewer tokens (max_tokens)."
        )
    resets = f"It resets in {duration(_seconds_until(level.bucket.end, now))}"
    if limit.window is Window.MINUTE:
        return f"You have reached your {which}. {resets}: try again then."
    return (
        f"You have used up your {which}. {resets}: "
        "wait until then, or ask your administrator for a higher limit."
    )
