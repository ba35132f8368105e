"""Options that many commands have."""

from datetime import UTC, date, datetime, time, timedelta, tzinfo
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from parallama.errors import UsageError

_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class FileFormat(StrEnum):
    CSV = "csv"
    JSON = "json"
    NDJSON = "ndjson"


def _inherit(ctx: typer.Context, path: Path | None) -> Path | None:
    """`--config` may stand before the noun or behind the verb; the nearer one counts."""
    inherited: Path | None = ctx.find_root().params.get("config")
    return path or inherited


GlobalConfigPath = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        envvar="PARALLAMA_CONFIG",
        help="The configuration file. It may also follow the command.",
    ),
]
ConfigPath = Annotated[
    Path | None,
    typer.Option("--config", metavar="PATH", callback=_inherit, help="The configuration file."),
]
OutputFormat = Annotated[Output, typer.Option("--output", "-o", help="How the answer is written.")]
UserArgument = Annotated[str, typer.Argument(metavar="USER", help="Name or id of the user.")]
Since = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="From then on: ISO 8601 (UTC without a zone), or 24h, 7d for ago."
    ),
]
Until = Annotated[
    str | None, typer.Option(metavar="TIME", help="Before then; written like --since.")
]


def split(text: str | None) -> list[str] | None:
    """The parts of a comma-separated option; None where it was not given."""
    if text is None:
        return None
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_age(text: str) -> timedelta | None:
    """`90s`, `15m`, `24h`, `30d` or `2w`; None for anything else."""
    number, unit = text[:-1], _UNITS.get(text[-1:])
    if unit is None or not number.isascii() or not number.isdecimal():
        return None
    try:
        return timedelta(**{unit: int(number)})
    except OverflowError:
        raise UsageError(f"too long a time: {text}") from None


def parse_time(text: str) -> datetime:
    """ISO 8601, a date or a date with a time; UTC where it names no zone."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"not a time: {text!r}; write 2026-01-31, 2026-01-31T12:00:00Z, 24h or 30d"
        ) from None
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def parse_past(text: str | None, now: datetime) -> datetime | None:
    return None if text is None else _moved(text, now, -1)


def parse_future(text: str | None, now: datetime) -> datetime | None:
    return None if text is None else _moved(text, now, 1)


def parse_end(text: str, now: datetime, zone: tzinfo) -> datetime:
    """
    `3d` from now on, a time, or the end of a day in `zone`: of a date, `today`, `tomorrow`, or the
    weekday that comes next, which may be today. A time without its zone is one in `zone`.
    """
    try:
        day = _day(text.lower(), now.astimezone(zone).date())
        if day is not None:
            # Where clocks change at midnight, it is the moment at which they do.
            return datetime.combine(day + timedelta(days=1), time(), zone).astimezone(UTC)
        age = parse_age(text)
        if age is not None:
            return now + age
        at = datetime.fromisoformat(text)
        return (at.replace(tzinfo=zone) if at.tzinfo is None else at).astimezone(UTC)
    except OverflowError:
        raise UsageError(f"too long a time: {text}") from None
    except ValueError:
        raise UsageError(
            f"not a time: {text!r}; write 3d, tomorrow, Friday, 2026-01-31 or 2026-01-31T12:00"
        ) from None


def _day(word: str, today: date) -> date | None:
    if word in ("today", "tomorrow"):
        return today + timedelta(days=word == "tomorrow")
    for number, name in enumerate(_WEEKDAYS):
        if word in (name, name[:3]):
            return today + timedelta(days=(number - today.weekday()) % 7)
    try:
        return date.fromisoformat(word)
    except ValueError:
        return None


def _moved(text: str, now: datetime, direction: int) -> datetime:
    age = parse_age(text)
    if age is None:
        return parse_time(text)
    try:
        return now + direction * age
    except OverflowError:
        raise UsageError(f"too long a time: {text}") from None
