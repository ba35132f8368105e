"""Which buckets a call touches, how much it holds, and what the answer says (pure)."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from parallama.buckets import Bucket as Bucket
from parallama.buckets import buckets as buckets
from parallama.buckets import granted
from parallama.buckets import running as running
from parallama.limits import ANY, Grant, Limit, Unit, Window

# The longest that openai-python obeys `retry-after`.
LONGEST_RETRY = 120

# Most tokens that one call is held or charged for; Envoy's own bound for an addend.
MOST_TOKENS = 1_000_000_000

# A model's name can be of any length, and there is a usage row for each call.
_LONGEST_NAME = 80

# Where only calls in flight stand in the way, nobody knows when they end. Soon, as a rule.
_HELD_RETRY = 5


class Reserve(NamedTuple):
    """A call that wants to spend. `max_tokens` is None where the client named no maximum."""

    user: str
    key: str
    gateway: str
    dialect: str
    model: str
    endpoint: str
    max_tokens: int | None
    body_bytes: int
    request_id: str


class Settle(NamedTuple):
    """
    A call that ended, the tokens it really used, and what is to be learned from it. `grants` is as
    in UsageRecord.
    """

    user: str
    reservation: str
    used: int
    key: str = ""
    gateway: str = ""
    model: str = ""
    body_bytes: int = 0
    prompt_tokens: int | None = None
    """As the upstream reported them; None where it did not."""
    bounded: bool = False
    """The client named a maximum, so the answer's length says nothing about what is usual."""
    grants: str = ""


class Need(NamedTuple):
    """What a call may use: tokens of prompt and answer, compute in ms, money in billionths."""

    prompt: int
    answer: int
    compute: int = 0
    cost: int = 0

    @property
    def tokens(self) -> int:
        """At least 1."""
        return min(self.prompt + self.answer, MOST_TOKENS) or 1

    def of(self, unit: Unit) -> int:
        match unit:
            case Unit.TOKENS:
                return self.tokens
            case Unit.COMPUTE_SECONDS:
                return self.compute
            case Unit.COST:
                return self.cost
            case _:
                return 1


class Level(NamedTuple):
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
        limit = self.bucket.limit
        if limit.unit is Unit.CONCURRENT:
            return limit.amount == 0
        return self.used >= limit.amount

    @property
    def refuses(self) -> bool:
        return self.full and not self.bucket.limit.shadow


class Room(NamedTuple):
    """The tightest limit of one unit: the amount, what is left of it, seconds until it resets."""

    limit: int
    left: int
    resets_in: int


class Admitted(NamedTuple):
    """
    `granted` tokens are held. `cap` is how many of them the answer may have; None leaves it alone.

    `would_refuse` names the shadow limits that had no room, `grants` is as in UsageRecord.
    `decision` is kept with the usage row: see `decision`.
    """

    reservation: str
    granted: int
    requests: Room | None
    tokens: Room | None
    cap: int | None = None
    would_refuse: tuple[str, ...] = ()
    grants: str = ""
    decision: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    code: str
    message: str
    retry_after: int
    may_retry: bool
    requests: Room | None
    tokens: Room | None
    decision: str = ""


def paid_by(met: Iterable[Bucket]) -> str:
    """The grants among these, as UsageRecord says it."""
    return ",".join([f"{at.limit.unit}:{at.grant}" for at in met if at.grant])


def instead(
    levels: Sequence[Level], grants: Sequence[Grant], gateway: str, model: str, now: float
) -> Iterator[list[Bucket]]:
    """
    Where limits were full: the buckets to try in place of those, for each choice of grants.

    A grant takes the place of all limits of its unit. A full unit without a grant has no choice.
    """
    full = dict.fromkeys(level.bucket.limit.unit for level in levels if level.refuses)
    kept = [at.bucket for at in levels if at.bucket.limit.unit not in full]
    choices = [
        [granted(at) for at in grants if at.unit is unit and at.covers(gateway, model, now)]
        for unit in full
    ]
    for chosen in product(*choices) if full else ():
        yield [*kept, *chosen]


def admit(
    levels: Sequence[Level],
    reservation: str,
    granted: int,
    now: float,
    cap: int | None = None,
    decision: str = "",
) -> Admitted:
    return Admitted(
        reservation,
        granted,
        _room(levels, Unit.REQUESTS, now),
        _room(levels, Unit.TOKENS, now),
        cap,
        tuple([describe(level.bucket.limit) for level in levels if level.full]),
        paid_by([level.bucket for level in levels]),
        decision,
    )


def in_the_way(levels: Iterable[Level]) -> Level:
    """The limit among the full ones that stands in the way for longest."""
    return max((level for level in levels if level.refuses), key=_stands_in_the_way)


def tightest(levels: Iterable[Level]) -> Level | None:
    """The limit of which the smallest part is left; None without any that could refuse."""
    found, least = None, 2.0
    for level in levels:
        limit = level.bucket.limit
        part = (limit.amount - level.used - level.reserved) / (limit.amount or 1)
        if part < least and not limit.shadow:
            found, least = level, part
    return found


def decision(level: Level | None, need: Need, policy_at: float) -> str:
    """
    Why a call was let in or refused, for its usage row: members of a JSON object. The limit that
    decided, or was the tightest; what of it was used and held then, and what the call needs, in
    its own unit; when it ends. `policy_at` is when the database was asked which limits there are.
    """
    if level is None:
        return f'"policy_at":{policy_at:.3f}'
    bucket = level.bucket
    unit = bucket.limit.unit
    used: float = level.used
    held: float = level.reserved
    needs: float = need.of(unit)
    if unit.parts != 1:
        used, held, needs = (float(f"{n / unit.parts:.9g}") for n in (used, held, needs))
    return (
        f'"policy_at":{policy_at:.3f},"limit":{_name(bucket.limit)},"used":{used},"held":{held},'
        f'"needs":{needs},"ends":{bucket.end}'
    )


def refuse(levels: Sequence[Level], now: float, decision: str = "") -> Refused:
    """Names the limit among the full ones that stands in the way for longest."""
    worst = in_the_way(levels)
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
        decision=decision,
    )


def duration(seconds: int) -> str:
    """As Go writes it: `1s`, `6m0s`, `23h59m1s`."""
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    if hour:
        return f"{hour}h{minute}m{second}s"
    return f"{minute}m{second}s" if minute else f"{second}s"


def describe(limit: Limit) -> str:
    """A limit in a few words, such as `100 tokens per day on ollama for model llama3`."""
    return f"{_amount(limit)} {_per(limit)}{_where(limit)}"


@lru_cache(maxsize=4096)
def _name(limit: Limit) -> str:
    text = describe(limit)
    return json.dumps(text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "\u2026")


def _stands_in_the_way(level: Level) -> tuple[bool, bool, int]:
    return level.bucket.limit.amount == 0, level.gone, level.bucket.end


def _room(levels: Iterable[Level], unit: Unit, now: float) -> Room | None:
    """Of limits with equally much left, the one that takes longest to reset."""
    tight: tuple[int, int, int] | None = None
    for bucket, used, reserved, _ in levels:
        limit = bucket.limit
        if limit.unit is unit and not limit.shadow:
            room = max(0, limit.amount - used - reserved), -bucket.end, limit.amount
            if tight is None or room < tight:
                tight = room
    if tight is None:
        return None
    left, end, amount = tight
    return Room(amount, left, _seconds_until(-end, now))


def _seconds_until(end: int, now: float) -> int:
    return max(1, math.ceil(end - now))


def _sentence(level: Level, now: float) -> str:
    limit = level.bucket.limit
    if limit.amount == 0:
        return (
            f"You have no allowance for {limit.unit}{_where(limit)}: "
            f"your limit is 0 {_per(limit)}. Ask your administrator for one."
        )
    which = f"limit of {describe(limit)}"
    if limit.unit is Unit.CONCURRENT:
        return f"You have reached your {which}. Try again when one of them has finished."
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


def _where(limit: Limit) -> str:
    where = "" if limit.gateway == ANY else f" on {limit.gateway}"
    if limit.model != ANY:
        where += f" for model {limit.model}"
    return f"{where} with this key" if limit.key else where


def _amount(limit: Limit) -> str:
    match limit.unit:
        case Unit.COST:
            cost = Decimal(limit.amount) / limit.unit.parts
            return f"{cost.normalize():f} of cost"
        case Unit.COMPUTE_SECONDS:
            return f"{limit.amount // limit.unit.parts} compute seconds"
        case Unit.CONCURRENT:
            return "1 request" if limit.amount == 1 else f"{limit.amount} requests"
        case unit:
            return f"{limit.amount} {unit.removesuffix('s') if limit.amount == 1 else unit}"


def _per(limit: Limit) -> str:
    return "at once" if limit.window is Window.MOMENT else f"per {limit.window}"
