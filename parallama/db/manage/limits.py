"""Limits: set, shown, removed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, and_, delete, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama.db import names
from parallama.db.manage.engine import insert_or, reading, writing
from parallama.db.manage.people import find_user
from parallama.db.manage.tables import gateway_rate_limits as table
from parallama.db.manage.tables import users
from parallama.db.policies import COLUMNS, Cell
from parallama.errors import NotFound, UsageError
from parallama.limits import ANY, Limit
from parallama.roles import Role

GATEWAYS = ("ollama", "openai", ANY)

# Counters pass through doubles on their way, which are exact up to 2 ** 53.
LARGEST_AMOUNT = 10**15

_ROLE = "role:"


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose limits: a user's own, or the defaults of a role."""

    user_id: str | None
    role: Role | None
    label: str

    @property
    def _is_it(self) -> ColumnElement[bool]:
        if self.role is not None:
            return table.c.role == self.role
        return table.c.user_id == self.user_id


@dataclass(frozen=True, slots=True)
class Policy:
    """The limits of one scope for one gateway and model; a cell that is not there is no limit."""

    id: str
    scope: str
    user_id: str | None
    gateway: str
    model: str
    amounts: Mapping[Cell, int]
    updated_at: datetime


async def find_scope(engine: AsyncEngine, text: str) -> Scope:
    """A user by name or id, or `role:NAME`. Raises NotFound or UsageError."""
    async with reading(engine) as connection:
        return await _find_scope(connection, text)


async def set_limits(
    engine: AsyncEngine,
    whose: str,
    *,
    gateway: str,
    model: str,
    amounts: Mapping[Cell, int],
    now: datetime,
) -> Policy:
    """Set the cells in `amounts`; the others stay as they are."""
    _check_gateway(gateway)
    model = names.check_model(model)
    if not amounts:
        raise UsageError("name at least one limit, such as --tokens-per-day 100000")
    for amount in amounts.values():
        if not 0 <= amount <= LARGEST_AMOUNT:
            raise UsageError(f"a limit is a whole number from 0 to {LARGEST_AMOUNT}, not {amount}")
    async with writing(engine) as connection:
        scope = await _find_scope(connection, whose)
        changed = {COLUMNS[cell]: amount for cell, amount in amounts.items()} | {"updated_at": now}
        owner = "role" if scope.role else "user_id"
        query = insert_or(engine, table).values(
            id=str(uuid4()),
            user_id=scope.user_id,
            role=scope.role,
            gateway_type=gateway,
            model=model,
            **changed,
        )
        await connection.execute(
            query.on_conflict_do_update(
                index_elements=[owner, "gateway_type", "model"], set_=changed
            )
        )
        (policy,) = await _list(
            connection,
            and_(scope._is_it, table.c.gateway_type == gateway, table.c.model == model),
        )
    return policy


async def unset_limits(
    engine: AsyncEngine, whose: str, *, gateway: str | None = None, model: str | None = None
) -> tuple[Scope, int]:
    """
    Remove what was set for this user or role, all of it or for one gateway and model.

    Returns whose they were and how many. Raises NotFound where one was named and none was set.
    """
    if gateway is not None:
        _check_gateway(gateway)
    async with writing(engine) as connection:
        scope = await _find_scope(connection, whose)
        which = [scope._is_it]
        if gateway is not None:
            which.append(table.c.gateway_type == gateway)
        if model is not None:
            which.append(table.c.model == names.check_model(model))
        removed = (await connection.execute(delete(table).where(*which))).rowcount
    if not removed and len(which) > 1:
        raise NotFound(f"{scope.label} has no limits of its own there")
    return scope, removed


async def list_limits(engine: AsyncEngine, whose: str | None = None) -> list[Policy]:
    """All limits that were set, or those of one scope; a user's come with the role's defaults."""
    async with reading(engine) as connection:
        if whose is None:
            return await _list(connection)
        scope = await _find_scope(connection, whose)
        if scope.user_id is None:
            return await _list(connection, scope._is_it)
        role = (await find_user(connection, scope.user_id)).role
        return await _list(connection, or_(scope._is_it, table.c.role == role))


async def _list(connection: AsyncConnection, *which: ColumnElement[bool]) -> list[Policy]:
    query = (
        select(table, users.c.username)
        .join(users, users.c.id == table.c.user_id, isouter=True)
        .where(*which)
        .order_by(table.c.role, users.c.username, table.c.gateway_type, table.c.model)
    )
    return [_policy(row) for row in await connection.execute(query)]


async def _find_scope(connection: AsyncConnection, text: str) -> Scope:
    if not text.startswith(_ROLE):
        user = await find_user(connection, text)
        return Scope(user.id, None, user.username)
    name = text.removeprefix(_ROLE)
    try:
        return Scope(None, Role(name), text)
    except ValueError:
        known = ", ".join(Role)
        raise NotFound(f"there is no role {name!r}: the roles are {known}") from None


def _check_gateway(gateway: str) -> None:
    if gateway not in GATEWAYS:
        raise UsageError(f"there is no gateway {gateway!r}: the gateways are {', '.join(GATEWAYS)}")


def _policy(row: Any) -> Policy:
    return Policy(
        id=row.id,
        scope=row.username if row.role is None else f"{_ROLE}{row.role}",
        user_id=row.user_id,
        gateway=row.gateway_type,
        model=row.model,
        amounts={(limit.unit, limit.window): limit.amount for limit in _limits(row)},
        updated_at=row.updated_at,
    )


def _limits(row: Any) -> Iterable[Limit]:
    for (unit, window), column in COLUMNS.items():
        amount = row._mapping[column]
        if amount is not None:
            yield Limit(row.gateway_type, row.model, unit, window, amount)
