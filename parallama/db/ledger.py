"""A row for each request, written once. What usage_sink does."""

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from operator import attrgetter, itemgetter
from typing import Any

from parallama.db import months
from parallama.db.names import looks_like_id
from parallama.db.store import NoPartition, Refused, Store
from parallama.db.sums import exact_sum
from parallama.usage import NOT_ADMITTED, Spent, UsageRecord, spent_in

_FIELDS = tuple(UsageRecord.__slots__)
COLUMNS = tuple("gateway_type" if field == "gateway" else field for field in _FIELDS)
"""The columns of gateway_usage_logs that hold a record, in the order of its fields."""

_values_of = attrgetter(*_FIELDS)
_LARGEST = 2**63 - 1
_VARIANT = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))

_PRUNE_ROWS = 2000

_ALL = ("id", *COLUMNS)
_REQUEST, _TIME, _KEY = (_ALL.index(name) for name in ("request_id", "timestamp", "key_id"))
_TYPES = {
    "id": "uuid",
    "timestamp": "timestamptz",
    **dict.fromkeys(
        (
            *("prompt_tokens", "completion_tokens", "cached_tokens", "tokens_used"),
            *("status_code", "attempts", "reasoning_tokens"),
        ),
        "bigint",
    ),
    **dict.fromkeys(("streamed", "finished", "aborted"), "boolean"),
    **dict.fromkeys(("request_duration", "time_to_first_token", "compute_ms"), "float8"),
    "cost": "numeric",
}
_FLOATS = tuple(_ALL.index(name) for name, kind in _TYPES.items() if kind == "float8")

_INTO = f"INSERT INTO gateway_usage_logs ({', '.join(_ALL)})"

# Row by row. Within one process SQLite does nothing faster.
_ADD = f"{_INTO} VALUES (?{', ?' * len(COLUMNS)}) ON CONFLICT (request_id) DO NOTHING"
_REPLACE = "DELETE FROM gateway_usage_logs WHERE request_id = ? AND token_source = 'unknown'"

# How far the time of a lost row may be from that of the request it stands for.
_APART = "INTERVAL '1 day'"

# Column by column: half the work, for us and for PostgreSQL, of row by row.
_GIVEN = "unnest({})".format(", ".join(f"?::{_TYPES.get(name, 'text')}[]" for name in _ALL))
_ADD_COLUMNS = f"{_INTO} SELECT * FROM {_GIVEN} ON CONFLICT DO NOTHING"  # noqa: S608 - our names
_REPLACE_COLUMNS = f"""
DELETE FROM gateway_usage_logs
WHERE request_id = ANY(?::text[]) AND token_source = 'unknown'
  AND timestamp BETWEEN ?::timestamptz - {_APART} AND ?::timestamptz + {_APART}
"""  # noqa: S608 - our own words
# Its unique constraint has the time in it, so here a lost row needs to look for the real one. The
# lock makes it wait for those who are just adding that, and makes others wait until it is there.
_LOCK_OUT = "LOCK TABLE gateway_usage_logs IN SHARE ROW EXCLUSIVE MODE"
_ADD_LOST_COLUMNS = f"""
{_INTO}
SELECT * FROM {_GIVEN} AS given ({", ".join(_ALL)})
WHERE NOT EXISTS (
  SELECT 1 FROM gateway_usage_logs AS stored
  WHERE stored.request_id = given.request_id
    AND stored.timestamp BETWEEN given.timestamp - {_APART} AND given.timestamp + {_APART}
)
ON CONFLICT DO NOTHING
"""  # noqa: S608 - our own column names

_USED = """
UPDATE api_keys SET last_used_at = ?
WHERE id = ? AND (last_used_at IS NULL OR last_used_at <= ?)
"""
# A key's last use is known to the minute: most batches have none to note.
_USED_STEP = timedelta(minutes=1)
# As UsageRecord.admitted says it.
_ADMITTED = "\n  ".join(
    (
        "AND (flags <> '' OR upstream_host IS NOT NULL OR token_source = 'unknown')",
        *(f"AND ',' || flags || ',' NOT LIKE '%,{flag},%'" for flag in NOT_ADMITTED),
    )
)
_SUMS = """
SELECT {} AS span, gateway_type, model_name, key_id, grants, COUNT(*),
       {} AS "tokens [sum]",
       SUM(COALESCE(compute_ms, request_duration * 1000)),
       {} AS "cost [money_sum]"
FROM gateway_usage_logs
WHERE user_id = ? AND timestamp >= ? AND timestamp < ? AND endpoint IN ({})
  {}
GROUP BY gateway_type, model_name, key_id, grants
"""
_RECENT = """
SELECT -1, request_id, NULL, NULL, NULL, 0, NULL, NULL, NULL
FROM gateway_usage_logs
WHERE user_id = ? AND timestamp >= ? AND timestamp < ?
"""
_SPENT = """
SELECT request_id, tokens_used, compute_ms, request_duration, cost AS "cost [money]"
FROM gateway_usage_logs
WHERE request_id IN ({}) AND timestamp >= ? AND token_source <> 'unknown'
"""
_COUNT = "SELECT COUNT(*) FROM gateway_usage_logs WHERE timestamp >= ? AND timestamp < ?"
_OLDEST = "SELECT timestamp FROM gateway_usage_logs WHERE timestamp >= ? ORDER BY timestamp LIMIT 1"
_PRUNE = """
DELETE FROM gateway_usage_logs WHERE timestamp < ? AND id IN (
  SELECT id FROM gateway_usage_logs WHERE timestamp < ? ORDER BY timestamp LIMIT ?
)
"""

_Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Added:
    """What became of a batch. Rows that were there already are in neither."""

    stored: int
    refused: tuple[tuple[UsageRecord, str], ...]
    """Rows that the database takes at no time, each with the reason."""


Span = tuple[datetime, datetime]
"""From the one to before the other."""


@dataclass(frozen=True, slots=True)
class Used:
    """Sums of what was admitted."""

    gateway: str
    model_name: str | None
    key_id: str | None
    grants: str | None
    requests: int
    tokens: int
    compute_ms: float
    cost: Decimal


@dataclass(frozen=True, slots=True)
class Spending:
    """What the rows of one user said at one moment."""

    sums: tuple[tuple[Used, ...], ...]
    """For each span that was asked for."""
    recent: tuple[str, ...]
    """Ids of the requests that began in the other span."""


async def add(store: Store, records: Sequence[UsageRecord]) -> Added:
    """
    Store what is not stored yet. A lost row of the same request gives way to the real one.

    Safe to repeat. One unstorable value must not hold back its batch for ever, so it is made
    storable: a number too large becomes the largest, text that is not Unicode gets replacement
    characters. Rows that are refused all the same are returned, and the others stored.

    Raises Unavailable or SchemaError: then repeat it with all of them.
    """
    return await _each_that_fits(store, records, _add)


async def add_lost(store: Store, records: Sequence[UsageRecord]) -> int:
    """
    Store these, whose end nobody told, where no row of their request is there within a day.

    Returns how many that were. What would be refused is left out. Raises as `add` does.
    """
    return (await _each_that_fits(store, records, _add_lost)).stored


async def spending(
    store: Store,
    user_id: str,
    spans: Sequence[Span],
    recent: Span,
    *,
    endpoints: Collection[str],
) -> Spending:
    """Calls of these endpoints that were admitted: neither unauthorised nor refused by a limit."""
    tokens, cost = (exact_sum(column, store.dialect) for column in ("tokens_used", "cost"))
    marks = ", ".join("?" * len(endpoints)) or "NULL"
    parts = [_SUMS.format(i, tokens, cost, marks, _ADMITTED) for i in range(len(spans))]
    values: list[Any] = []
    for span in spans:
        values += (user_id, *span, *endpoints)
    # In one question, so that what is in the one answer is in the other.
    query = "UNION ALL".join([*parts, _RECENT])
    sums: list[list[Used]] = [[] for _ in spans]
    ids: list[str] = []
    for span_or_none, *row in await store.read(query, (*values, user_id, *recent)):
        if span_or_none < 0:
            ids.append(row[0])
            continue
        gateway, model, key, grants, requests, tokens_used, compute, money = row
        sums[span_or_none].append(
            Used(
                gateway,
                model,
                key,
                grants,
                requests,
                int(tokens_used),
                compute or 0.0,
                money or Decimal(0),
            )
        )
    return Spending(tuple(map(tuple, sums)), tuple(ids))


async def spent_by(store: Store, request_ids: Sequence[str], since: datetime) -> dict[str, Spent]:
    """What those used that have a row of their own, as counters count it."""
    query = _SPENT.format(", ".join("?" * len(request_ids)))
    rows = await store.read(query, (*request_ids, since)) if request_ids else []
    return {id: spent_in(*amounts) for id, *amounts in rows}


async def count_before(store: Store, before: datetime) -> int:
    """How many rows `prune` would remove."""
    first = datetime(months.FIRST_YEAR, 1, 1, tzinfo=UTC)
    ((far_off,),) = await store.read(_COUNT, (datetime.min.replace(tzinfo=UTC), min(first, before)))
    oldest = await store.read(_OLDEST, (first,))
    return int(far_off) + (await _count(store, oldest[0][0], before) if oldest else 0)


async def prune(store: Store, before: datetime) -> int:
    """
    Remove rows that are older, and return how many.

    Others can write meanwhile. Raises Unavailable or SchemaError; what is removed stays so.
    """
    removed = await _drop_months(store, before) if store.dialect == "postgresql" else 0
    while True:
        began = time.monotonic()
        (found,) = await store.write((_PRUNE, [(before, before, _PRUNE_ROWS)]))
        removed += found
        if found < _PRUNE_ROWS:
            return removed
        await asyncio.sleep(time.monotonic() - began)  # the others' turn


async def _drop_months(store: Store, before: datetime) -> int:
    removed = 0
    for (name,) in await store.read(months.LIST):
        month = months.month_of(name)
        if month is not None and months.after(month) <= before:
            removed += await _count(store, month, months.after(month))
            await store.write((f"DROP TABLE IF EXISTS {name}", [()]))
    return removed


async def _count(store: Store, start: datetime, end: datetime) -> int:
    """Day by day: no question takes long, however many rows there are."""
    total = 0
    while start < end:
        until = min(start + timedelta(days=1), end)
        ((found,),) = await store.read(_COUNT, (start, until))
        total += found
        start = until
    return total


async def _each_that_fits(
    store: Store,
    records: Sequence[UsageRecord],
    write: Callable[[Store, Sequence[_Row]], Awaitable[int]],
) -> Added:
    """Write all; if that is refused, the halves, and so on to the rows that cannot be written."""
    rows = [
        (id, *_finite(_values_of(record)))
        for id, record in zip(_ids(len(records)), records, strict=True)
    ]
    refused: list[tuple[UsageRecord, str]] = []

    async def attempt(start: int, end: int) -> int:
        if start == end:
            return 0
        try:
            return await write(store, rows[start:end])
        except Refused as error:
            if end - start == 1:
                refused.append((records[start], str(error)))
                return 0
        middle = (start + end) // 2
        return await attempt(start, middle) + await attempt(middle, end)

    try:
        return Added(await write(store, rows) if rows else 0, ())
    except Refused:
        rows = [tuple(map(_storable, row)) for row in rows]
        stored = await attempt(0, len(rows))
        return Added(stored, tuple(refused))


async def _add(store: Store, rows: Sequence[_Row]) -> int:
    ids = [row[_REQUEST] for row in rows]
    if store.dialect == "sqlite":
        work = [(_REPLACE, [(id,) for id in ids]), (_ADD, rows)]
    else:
        times = [row[_TIME] for row in rows]
        work = [
            (_REPLACE_COLUMNS, [(ids, min(times), max(times))]),
            (_ADD_COLUMNS, [_columns(rows)]),
        ]
    _, added, _ = await _write(store, rows, *work, (_USED, _last_uses(rows)))
    return added


async def _add_lost(store: Store, rows: Sequence[_Row]) -> int:
    if store.dialect == "sqlite":
        (added,) = await _write(store, rows, (_ADD, rows))
        return added
    work = [(_LOCK_OUT, [()]), (_ADD_LOST_COLUMNS, [_columns(rows)])]
    _, added = await _write(store, rows, *work)
    return added


async def _write(
    store: Store, rows: Sequence[_Row], *work: tuple[str, Sequence[Sequence[Any]]]
) -> list[int]:
    try:
        return await store.write(*work)
    except NoPartition:
        for month in {months.start_of(row[_TIME]) for row in rows}:
            if months.FIRST_YEAR <= month.year < months.END_YEAR:
                await store.write((months.make(month), [()]))
        return await store.write(*work)


def _columns(rows: Sequence[_Row]) -> _Row:
    # In one order: two writers with the same requests would otherwise wait for each other.
    rows = sorted(rows, key=itemgetter(_REQUEST))
    columns = [list(column) for column in zip(*rows, strict=True)]
    for at in _FLOATS:  # the driver takes no whole numbers among them
        columns[at] = [None if value is None else float(value) for value in columns[at]]
    return tuple(columns)


def _last_uses(rows: Sequence[_Row]) -> list[_Row]:
    newest: dict[str, datetime] = {}
    for row in rows:
        at, key = row[_TIME], row[_KEY]
        if key is not None and (key not in newest or newest[key] < at):
            newest[key] = at
    # In one order, as above.
    return [
        (newest[key], key, newest[key] - _USED_STEP) for key in sorted(newest) if looks_like_id(key)
    ]


def _ids(count: int) -> list[str]:
    """
    UUIDs of version 7, which begin with the time: neighbours in time are neighbours in the index.

    Random ones made each row dirty a page of its own, and a batch cost a third more.
    """
    at = f"{time.time_ns() // 1_000_000:012x}"
    at = f"{at[:8]}-{at[8:]}"
    noise = os.urandom(10 * count).hex()
    return [
        f"{at}-7{n[:3]}-{_VARIANT[n[3]]}{n[4:7]}-{n[7:19]}"
        for n in (noise[i : i + 20] for i in range(0, 20 * count, 20))
    ]


_DURATIONS = tuple(
    _FIELDS.index(name) for name in ("request_duration", "time_to_first_token", "compute_ms")
)


def _finite(values: _Row) -> _Row:
    """What is no number is not known; it would make every sum that it is in one, too."""
    if math.isfinite(sum(values[at] or 0.0 for at in _DURATIONS)):
        return values
    return tuple(map(_storable, values))


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="replace").decode().replace("\0", "\ufffd")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return max(-_LARGEST, min(value, _LARGEST))
    return value
