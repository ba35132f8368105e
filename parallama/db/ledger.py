"""Usage: a row for each request, written once, and what can be asked about them."""

import math
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    ColumnElement,
    bindparam,
    case,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import DataError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama.db.accounts import find_user
from parallama.db.engine import insert_or, reading, writing
from parallama.db.tables import api_keys
from parallama.db.tables import gateway_usage_logs as table
from parallama.errors import NotFound
from parallama.usage import UsageRecord

_PAGE_ROWS = 1000
_LARGEST = 2**63 - 1
_VARIANT = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))

_FIELDS = tuple(UsageRecord.__slots__)
_COLUMNS = tuple("gateway_type" if field == "gateway" else field for field in _FIELDS)
_values_of = attrgetter(*_FIELDS)
_ROWS = select(*(table.c[column] for column in _COLUMNS))
_NEWEST_USE = (
    update(api_keys)
    .where(
        api_keys.c.id == bindparam("key"),
        or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < bindparam("at")),
    )
    .values(last_used_at=bindparam("at"))
)

BY: Mapping[str, Mapping[str, ColumnElement[Any]]] = MappingProxyType(
    {
        "user": {"user": table.c.username, "user_id": table.c.user_id},
        "key": {"key_id": table.c.key_id},
        "gateway": {"gateway": table.c.gateway_type},
        "model": {"model_name": table.c.model_name},
        "day": {"day": func.date(table.c.timestamp)},
    }
)
"""What `summary` can group by, and the columns that this gives."""

_SUMS: Mapping[str, ColumnElement[Any]] = MappingProxyType(
    {
        "requests": func.count(),
        "errors": func.coalesce(func.sum(case((table.c.status_code >= 400, 1), else_=0)), 0),
        "aborted": func.coalesce(func.sum(case((table.c.aborted, 1), else_=0)), 0),
        "prompt_tokens": func.coalesce(func.sum(table.c.prompt_tokens), 0),
        "completion_tokens": func.coalesce(func.sum(table.c.completion_tokens), 0),
        "tokens_used": func.coalesce(func.sum(table.c.tokens_used), 0),
    }
)


@dataclass(frozen=True, slots=True)
class Which:
    """Rows of one user (by name or id, also one who is gone), from `since` to before `until`."""

    user: str | None = None
    since: datetime | None = None
    until: datetime | None = None


async def add(engine: AsyncEngine, records: Sequence[UsageRecord]) -> int:
    """
    Store what is not stored yet, all or nothing, and return how many rows that were.

    One unstorable value must not hold back its batch for ever, so it is made storable: a number
    too large becomes the largest, text that is not Unicode gets replacement characters.
    """
    if not records:
        return 0
    try:
        return await _add(engine, [_values_of(record) for record in records])
    except (OverflowError, UnicodeEncodeError, DataError):
        return await _add(engine, [tuple(map(_storable, _values_of(record))) for record in records])


async def rows(
    engine: AsyncEngine, which: Which, *, newest_first: bool = False, limit: int | None = None
) -> AsyncIterator[UsageRecord]:
    """
    The records in the order of time. Reads a page at a time, so a slow reader holds up nobody.

    Raises NotFound for a user whom nobody knows and who has no rows either.
    """
    position = tuple_(table.c.timestamp, table.c.request_id)
    query = _ROWS.order_by(*(
        (table.c.timestamp.desc(), table.c.request_id.desc())
        if newest_first
        else (table.c.timestamp, table.c.request_id)
    ))  # fmt: skip
    async with reading(engine) as connection:
        query = query.where(*await _conditions(connection, which))
    page = query
    left = limit
    while left is None or left > 0:
        size = _PAGE_ROWS if left is None else min(left, _PAGE_ROWS)
        async with reading(engine) as connection:
            found = (await connection.execute(page.limit(size))).all()
        for row in found:
            yield UsageRecord(*row)
        if len(found) < size:
            return
        left = None if left is None else left - size
        last = tuple_(found[-1].timestamp, found[-1].request_id, types=_POSITION)
        page = query.where(position < last if newest_first else position > last)


_POSITION = (table.c.timestamp.type, table.c.request_id.type)


async def summary(engine: AsyncEngine, which: Which, by: Sequence[str]) -> list[dict[str, Any]]:
    """Sums for each combination of what `by` names (keys of BY); one row where it names nothing."""
    groups = {name: column for each in by for name, column in BY[each].items()}
    async with reading(engine) as connection:
        query = (
            select(*(column.label(name) for name, column in {**groups, **_SUMS}.items()))
            .where(*await _conditions(connection, which))
            .group_by(*groups.values())
            .order_by(*groups.values())
        )
        return [dict(row._mapping) for row in await connection.execute(query)]


async def count(engine: AsyncEngine) -> int:
    async with reading(engine) as connection:
        rows = await connection.execute(select(func.count()).select_from(table))
        return rows.scalar_one()


async def _add(engine: AsyncEngine, values: Sequence[tuple[Any, ...]]) -> int:
    query = insert_or(engine, table).on_conflict_do_nothing(index_elements=["request_id"])
    ids = _ids(len(values))
    rows = [
        dict(zip(_COLUMNS, each, strict=True), id=id) for id, each in zip(ids, values, strict=True)
    ]
    newest: dict[str, datetime] = {}
    for row in rows:
        key, at = row["key_id"], row["timestamp"]
        if key is not None and (key not in newest or newest[key] < at):
            newest[key] = at
    async with writing(engine) as connection:
        added = (await connection.execute(query, rows)).rowcount
        if newest:
            await connection.execute(
                _NEWEST_USE, [{"key": key, "at": at} for key, at in newest.items()]
            )
    return added


def _ids(count: int) -> list[str]:
    """
    UUIDs of version 7, which begin with the time: neighbours in time are neighbours in the index.

    Random ones made each row dirty a page of its own, and a batch cost half as much again.
    """
    at = f"{time.time_ns() // 1_000_000:012x}"
    at = f"{at[:8]}-{at[8:]}"
    noise = os.urandom(10 * count).hex()
    return [
        f"{at}-7{n[:3]}-{_VARIANT[n[3]]}{n[4:7]}-{n[7:19]}"
        for n in (noise[i : i + 20] for i in range(0, 20 * count, 20))
    ]


async def _conditions(connection: AsyncConnection, which: Which) -> list[ColumnElement[bool]]:
    conditions = []
    if which.user is not None:
        conditions.append(await _of_user(connection, which.user))
    if which.since is not None:
        conditions.append(table.c.timestamp >= which.since)
    if which.until is not None:
        conditions.append(table.c.timestamp < which.until)
    return conditions


async def _of_user(connection: AsyncConnection, who: str) -> ColumnElement[bool]:
    try:
        return table.c.user_id == (await find_user(connection, who)).id
    except NotFound:
        gone = or_(table.c.user_id == who, table.c.username == who)
        if (await connection.execute(select(1).where(gone).limit(1))).first() is None:
            raise
        return gone


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="replace").decode().replace("\0", "\ufffd")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return max(-_LARGEST, min(value, _LARGEST))
    return value
