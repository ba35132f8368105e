"""Usage: what can be asked about it."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Dialect,
    String,
    TypeDecorator,
    and_,
    case,
    cast,
    func,
    or_,
    select,
    tuple_,
    type_coerce,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from parallama.db.ledger import COLUMNS
from parallama.db.manage.engine import reading
from parallama.db.manage.people import find_user
from parallama.db.manage.tables import gateway_usage_logs as table
from parallama.db.sums import exact_sum, from_parts, money_from_parts
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


class _ExactSum(FunctionElement[Any]):
    """`exact_sum` of one column."""

    inherit_cache = True


@compiles(_ExactSum)
def _in_sql(element: _ExactSum, compiler: SQLCompiler, **options: Any) -> str:
    (column,) = element.clauses
    # Twice for SQLite, so what stands there must not be a parameter that is given once.
    text = compiler.process(column, literal_binds=True, **options)
    return exact_sum(text, compiler.dialect.name)  # type: ignore[arg-type]


class _Count(TypeDecorator[int]):
    """A whole number, 0 where nothing was added up."""

    impl = String
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], int]:
        if dialect.name == "sqlite":
            return lambda told: 0 if told is None else from_parts(told)
        return lambda told: 0 if told is None else int(told)


class _Cost(TypeDecorator[Decimal]):
    """Money, None where nothing was added up."""

    impl = String
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        if dialect.name == "sqlite":
            return lambda told: None if told is None else money_from_parts(told)
        return lambda told: told


def _sum(numbers: ColumnElement[Any]) -> ColumnElement[int]:
    return type_coerce(_ExactSum(numbers), _Count())


_SUMS: Mapping[str, ColumnElement[Any]] = MappingProxyType(
    {
        "requests": func.count(),
        "errors": _sum(case((table.c.status_code >= 400, 1), else_=0)),
        "aborted": _sum(case((table.c.aborted, 1), else_=0)),
        "prompt_tokens": _sum(table.c.prompt_tokens),
        "completion_tokens": _sum(table.c.completion_tokens),
        "tokens_used": _sum(table.c.tokens_used),
        # None where nothing has a cost, and next to it how much this leaves out.
        "cost": type_coerce(_ExactSum(table.c.cost), _Cost()),
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
    engine: AsyncEngine,
    which: Which,
    *,
    newest_first: bool = False,
    after: tuple[datetime, str] | None = None,
    limit: int | None = None,
) -> AsyncIterator[UsageRecord]:
    """
    The records in the order of time, beyond the one of this time and request. Reads a page at a
    time, so a slow reader holds up nobody.

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
    if after is not None:
        last = tuple_(*after, types=_POSITION)
        page = query.where(position < last if newest_first else position > last)
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


async def find_row(engine: AsyncEngine, request_id: str) -> UsageRecord | None:
    """That of one request."""
    async with reading(engine) as connection:
        query = _ROWS.where(table.c.request_id == request_id)
        row = (await connection.execute(query)).first()
    return None if row is None else UsageRecord(*row)


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
