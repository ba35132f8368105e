"""Limits: which exist, which meet a request, and the calendar windows they count in (pure)."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum

ANY = "*"
_LATEST = ":latest"


class Unit(StrEnum):
    """What is limited."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    COMPUTE_SECONDS = "compute_seconds"
    COST = "cost"
    CONCURRENT = "concurrent"

    @property
    def parts(self) -> int:
        """Counters hold whole numbers: into so many parts they divide one of this unit."""
        return _PARTS.get(self, 1)


_PARTS = {Unit.COMPUTE_SECONDS: 1000, Unit.COST: 10**9}


class Window(StrEnum):
    """For how long is counted. A moment is no time at all: what runs at once."""

    MOMENT = "moment"
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"

    def bounds(self, now: float, zone: tzinfo = UTC) -> tuple[int, int]:
        """
        Start and end, in seconds since the epoch, of the calendar window around `now` in `zone`.

        Where clocks change a day has 23 or 25 hours, and the hour that comes twice is two windows.
        A moment begins with the epoch and does not end.
        """
        if self is Window.MOMENT:
            return 0, FOREVER
        second = int(now // 1)
        if self is Window.MINUTE:
            start = second // 60 * 60
            return start, start + 60
        if self is Window.HOUR:
            # From one full hour on the clock to the next: one that jumps by half of one, as Lord
            # Howe's, takes longer to get there.
            start = second - _past_hour(second, zone)
            start -= _past_hour(start, zone)
            end = start + 3600
            return start, end + -_past_hour(end, zone) % 3600
        first = datetime.fromtimestamp(second, zone).replace(hour=0, minute=0, second=0, fold=0)
        if self is Window.DAY:
            after = first + timedelta(days=1)
        else:
            first = first.replace(day=1)
            after = (first + timedelta(days=32)).replace(day=1)
        return int(first.timestamp()), int(after.timestamp())


def _past_hour(at: int, zone: tzinfo) -> int:
    local = datetime.fromtimestamp(at, zone)
    return local.minute * 60 + local.second


FOREVER = 2**40
"""An end that no clock of ours reaches, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Limit:
    """
    At most `amount` parts of `unit` (see `Unit.parts`) in each `window`, for one user.

    `gateway` is a name or `*`. `model` is a name, a prefix that ends in `*`, or `*`; all models
    it covers share one count. With `key` it is for calls with this key alone, by its id. An amount
    of 0 refuses every call. A `shadow` counts and refuses nothing. What was used before `set_at`
    (seconds since the epoch) nobody counted yet.
    """

    gateway: str
    model: str
    unit: Unit
    window: Window
    amount: int
    key: str = ""
    shadow: bool = False
    set_at: float = 0.0

    def covers(self, gateway: str, model: str, key: str) -> bool:
        """No other spelling of a model's name, as Ollama knows several, gets round its limit."""
        return (
            self.gateway in (ANY, gateway)
            and self.key in ("", key)
            and name_matches(plain_name(self.model), plain_name(model))
        )


@dataclass(frozen=True, slots=True)
class Grant:
    """
    What one user may use of `unit` beyond the limits of that unit, in all, while it lasts.

    It is touched only where a limit is full. Times are seconds since the epoch.
    """

    id: str
    gateway: str
    model: str
    unit: Unit
    amount: int
    created_at: float
    expires_at: float

    def covers(self, gateway: str, model: str, now: float) -> bool:
        return (
            self.gateway in (ANY, gateway)
            and self.created_at <= now < self.expires_at
            and name_matches(plain_name(self.model), plain_name(model))
        )


def name_matches(pattern: str, name: str) -> bool:
    """
    Whether `name` is `pattern`, or begins with what stands before its trailing `*`.

    Ollama means `x:latest` by `x`.
    """
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    return name.removesuffix(_LATEST) == pattern.removesuffix(_LATEST)


def plain_name(name: str) -> str:
    """The shortest of the spellings under which Ollama finds the same model."""
    return name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")


def merge(defaults: list[Limit], own: list[Limit]) -> tuple[Limit, ...]:
    """
    A role's limits, each replaced by the user's own of the same gateway, model, unit and window.

    Those of keys and those in the shadow stand beside them.
    """
    cells = {
        (at.key, at.gateway, at.model, at.unit, at.window, at.shadow): at
        for at in (*defaults, *own)
    }
    return tuple(cells.values())
