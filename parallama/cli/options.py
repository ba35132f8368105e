"""Options that many commands have."""

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from parallama.errors import UsageError

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"
    CSV = "csv"


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


def _moved(text: str, now: datetime, direction: int) -> datetime:
    age = parse_age(text)
    if age is None:
        return parse_time(text)
    try:
        return now + direction * age
    except OverflowError:
        raise UsageError(f"too long a time: {text}") from None
