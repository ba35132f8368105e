"""Usage: what can be asked about it."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    String,
    and_,
    case,
    cast,
    func,
    or_,
    select,
    tuple_,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama.db.ledger import COLUMNS
from parallama.db.manage.engine import reading
from parallama.db.manage.people import find_user
from parallama.db.manage.tables import gateway_usage_logs as table
from parallama.errors import NotFound
from parallama.usage import UsageRecord

_PAGE_ROWS = 1000
_ROWS = select(*(table.c[column] for column in COLUMNS))

BY: Mapping[str, Mapping[str, ColumnElement[Any]]] = MappingProxyType(
    {
        "user": {"user": table.c.username, "user_id": table.c.user_id},
        "key": {"key_id": table.c.key_id},
        "gateway": {"gateway": table.c.gateway_type},
        "model": {"model_name": table.c.model_name},
        "day": {"day": cast(func.date(table.c.timestamp), String)},
    }
)
"""What `summary` can group by, and the columns that this gives."""

_UNPRICED = and_(table.c.cost.is_(None), table.c.tokens_used > 0)


def _sum(numbers: ColumnElement[Any]) -> ColumnElement[int]:
    """A whole number: PostgreSQL would make a decimal of it."""
    return func.coalesce(cast(func.sum(numbers), BigInteger), 0)


_SUMS: Mapping[str, ColumnElement[Any]] = MappingProxyType(
    {
        "requests": func.count(),
        "errors": _sum(case((table.c.status_code >= 400, 1), else_=0)),
        "aborted": _sum(case((table.c.aborted, 1), else_=0)),
        "prompt_tokens": _sum(table.c.prompt_tokens),
        "completion_tokens": _sum(table.c.completion_tokens),
        "tokens_used": _sum(table.c.tokens_used),
        # None where nothing has a cost, and next to it how much this leaves out.
        "cost": func.sum(table.c.cost),
        "without_cost": _sum(case((_UNPRICED, 1), else_=0)),
    }
)


@dataclass(frozen=True, slots=True)
class Which:
    """Rows of one user (by name or id, also one who is gone), from `since` to before `until`."""

    user: str | None = None
    since: datetime | None = None
    until: datetime | None = None


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
