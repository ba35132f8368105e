"""`parallama usage prune`."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from parallama.cli.desk import load_config
from parallama.cli.options import ConfigPath, Output, OutputFormat, parse_age, parse_time
from parallama.cli.show import show
from parallama.errors import UsageError

if TYPE_CHECKING:
    from parallama.config import Config

Before = Annotated[
    str | None, typer.Option(metavar="TIME", help="Remove what began before then: ISO 8601.")
]
OlderThan = Annotated[
    str | None, typer.Option(metavar="AGE", help="Remove what is older than this, such as 90d.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count what would be removed.")]


def prune(
    before: Before = None,
    older_than: OlderThan = None,
    dry_run: DryRun = False,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Remove old requests for good; without a time, those older than usage.retention_days.

    Keep at least two months: limits by month are counted anew from these rows when Redis lost its
    counters.
    """
    loaded = load_config(config)
    end = _end(before, older_than, loaded.usage.retention_days, datetime.now(UTC))
    rows = asyncio.run(_prune(loaded, end, dry_run))
    show({"before": end, "rows": rows, "removed": not dry_run}, output)


def _end(
    before: str | None, older_than: str | None, retention_days: int | None, now: datetime
) -> datetime:
    if before is not None and older_than is not None:
        raise UsageError("name either --before or --older-than")
    if before is not None:
        end = parse_time(before)
        if end > now:
            raise UsageError(f"{before} is in the future: that would remove everything")
        return end
    age = timedelta(days=retention_days) if retention_days is not None else None
    if older_than is not None:
        age = parse_age(older_than)
        if age is None:
            raise UsageError(f"not an age: {older_than!r}; write 90d or 52w")
    if age is None:
        raise UsageError("name --before TIME or --older-than AGE, or set usage.retention_days")
    try:
        return now - age
    except OverflowError:
        raise UsageError(f"too long a time: {older_than}") from None


async def _prune(config: "Config", end: datetime, dry_run: bool) -> int:
    from parallama.db import database, ledger

    async with database(config.database) as store:
        return await (ledger.count_before if dry_run else ledger.prune)(store, end)
