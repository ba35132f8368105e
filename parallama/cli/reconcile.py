"""`parallama usage reconcile`."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from parallama.cli.desk import load_config
from parallama.cli.options import ConfigPath, Output, OutputFormat
from parallama.cli.show import show
from parallama.errors import ParallamaError

if TYPE_CHECKING:
    from parallama.config import Config
    from parallama.db.ledger import Added
    from parallama.reconcile import Found
    from parallama.usage import UsageRecord

# ratelimit looks each second for leases that are over.
_FOUND_WITHIN_SECONDS = 10

Repair = Annotated[bool, typer.Option("--repair", help="Store the rows that are missing.")]


def reconcile(
    repair: Repair = False, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """
    Compare the trail with the rows, and count every difference.

    The trail (state_dir/trail) has requests of the last day or two, and older ones whose rows are
    missing. All is safe while the gateway runs. Exit code 1 when something differs; with --repair,
    when something still does.

    \b
    lines              of the trail that are requests
    under way          of them ended a moment ago, and their rows are still to come
    without row        of them have no row, or one that is marked unknown
    unreadable         of the trail is no line, and is not kept aside yet
    kept aside         in trail/refused.jsonl: lines that cannot be read, rows that were refused
    rows unknown       of requests whose end nobody told: in itself no difference
    mended             rows that --repair stored
    late reservations  are open beyond their lease; none where Redis cannot be asked
    differs            what of this is left to be mended
    """
    found = asyncio.run(_reconcile(load_config(config), repair=repair))
    show({**asdict(found), "differs": found.differs}, output)
    if found.differs:
        raise typer.Exit(1)


async def _reconcile(config: "Config", *, repair: bool) -> "Found":
    from parallama.db import database
    from parallama.db.known import count_unknown, known
    from parallama.db.ledger import add
    from parallama.db.prices import prices_of
    from parallama.prices import PriceList
    from parallama.reconcile import Reconciliation
    from parallama.trail import Trail

    now, days = datetime.now(UTC), config.usage.retention_days
    stored: list[UsageRecord] = []
    async with database(config.database) as store:
        prices = PriceList(await prices_of(store))

        async def add_priced(records: "Sequence[UsageRecord]") -> "Added":
            priced = [prices.priced(record) for record in records]
            added = await add(store, priced)
            refused = {record.request_id for record, _ in added.refused}
            stored.extend(record for record in priced if record.request_id not in refused)
            return added

        work = Reconciliation(
            Trail(config.state_dir / "trail"),
            partial(known, store),
            add_priced,
            now=now,
            oldest=None if days is None else now - timedelta(days=days),
            repair=repair,
        )
        try:
            found = await work.run()
        except OSError as error:
            raise ParallamaError(
                f"the trail in {config.state_dir} cannot be read or written ({error.strerror}):"
                " run this as the user of the gateway"
            ) from error
        found.rows_unknown = await count_unknown(store)
    found.late_reservations = await _late(config, now, stored)
    return found


async def _late(config: "Config", now: datetime, stored: "Sequence[UsageRecord]") -> int | None:
    """Close the reservations of rows that were just stored, and count those open for too long."""
    from parallama.counters import Counters
    from parallama.counters.closing import close_all
    from parallama.errors import Unavailable
    from parallama.stores import connect_redis

    limits = config.rate_limiting
    async with (
        connect_redis(config) as redis,
        aclosing(
            Counters(redis, lease=limits.reservation_seconds, timeout=config.redis.timeout_seconds)
        ) as counters,
    ):
        try:
            await close_all(counters, stored, now.timestamp())
            return await counters.overdue(now.timestamp() - _FOUND_WITHIN_SECONDS)
        except Unavailable:
            return None
