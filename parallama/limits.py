"""Limits: which exist, which meet a request, and the calendar windows they count in (pure)."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

ANY = "*"
_LATEST = ":latest"


class Unit(StrEnum):
    REQUESTS = "requests"
    TOKENS = "tokens"


class Window(StrEnum):
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"

    def bounds(self, now: float) -> tuple[int, int]:
        """Start and end, in seconds since the epoch, of the UTC calendar window around `now`."""
        at = datetime.fromtimestamp(now, UTC).replace(second=0, microsecond=0)
        match self:
            case Window.MINUTE:
                start, size = at, timedelta(minutes=1)
            case Window.HOUR:
                start, size = at.replace(minute=0), timedelta(hours=1)
            case Window.DAY:
                start, size = at.replace(minute=0, hour=0), timedelta(days=1)
        return int(start.timestamp()), int((start + size).timestamp())


@dataclass(frozen=True, slots=True)
class Limit:
    """
    At most `amount` of `unit` in each `window`, for one user.

    `gateway` is a name or `*`. `model` is a name, a prefix that ends in `*`, or `*`; all models
    it covers share one count. An amount of 0 refuses every call.
    """

    gateway: str
    model: str
    unit: Unit
    window: Window
    amount: int

    def covers(self, gateway: str, model: str) -> bool:
        """No other spelling of a model's name, as Ollama knows several, gets round its limit."""
        return self.gateway in (ANY, gateway) and name_matches(_plain(self.model), _plain(model))


def name_matches(pattern: str, name: str) -> bool:
    """
    Whether `name` is `pattern`, or begins with what stands before its trailing `*`.

    Ollama means `x:latest` by `x`.
    """
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    return name.removesuffix(_LATEST) == pattern.removesuffix(_LATEST)


def _plain(name: str) -> str:
    """The shortest of the spellings under which Ollama finds the same model."""
    return name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")


def merge(defaults: list[Limit], own: list[Limit]) -> tuple[Limit, ...]:
    """A role's limits, each replaced by the user's own of the same gateway, model, unit, window."""
    cells = {(at.gateway, at.model, at.unit, at.window): at for at in (*defaults, *own)}
    return tuple(cells.values())
