"""
The months of the usage table, each a partition of it on PostgreSQL (statements only, pure).

Old months are dropped instead of deleted row by row. A month is made when the first row asks for
it. What a clock far off says, before FIRST_YEAR or from END_YEAR on, goes to one partition each:
no clock can make partitions without end, and no row is without a place.
"""

import re
from datetime import UTC, datetime

TABLE = "gateway_usage_logs"
FIRST_YEAR, END_YEAR = 2020, 2100

_NAME = re.compile(rf"{TABLE}_(\d{{4}})_(\d{{2}})")
# Any number that nobody else in this database takes for a lock of theirs.
_LOCK = 7_265_616_001

EDGES = (
    f"CREATE TABLE {TABLE}_before_{FIRST_YEAR} PARTITION OF {TABLE} "
    f"FOR VALUES FROM (MINVALUE) TO ('{FIRST_YEAR}-01-01+00')",
    f"CREATE TABLE {TABLE}_from_{END_YEAR} PARTITION OF {TABLE} "
    f"FOR VALUES FROM ('{END_YEAR}-01-01+00') TO (MAXVALUE)",
)

LIST = f"SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = '{TABLE}'::regclass"  # noqa: S608


def start_of(at: datetime) -> datetime:
    return at.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def after(month: datetime) -> datetime:
    return month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)


def make(month: datetime) -> str:
    """
    Make the partition of a month unless it is there. Who else makes it meanwhile is waited for.

    It is attached, not made in place: that would wait for all who read, and they for it.
    """
    name = f"{TABLE}_{month:%Y_%m}"
    return f"""
DO $$ BEGIN
  PERFORM pg_advisory_xact_lock({_LOCK});
  IF to_regclass('{name}') IS NULL THEN
    CREATE TABLE {name} (LIKE {TABLE} INCLUDING ALL);
    ALTER TABLE {TABLE} ATTACH PARTITION {name}
      FOR VALUES FROM ('{month:%Y-%m-%d}+00') TO ('{after(month):%Y-%m-%d}+00');
  END IF;
END $$
"""


def month_of(partition: str) -> datetime | None:
    """The month that a partition holds, by its name."""
    found = _NAME.fullmatch(partition)
    return None if found is None else datetime(int(found[1]), int(found[2]), 1, tzinfo=UTC)
