"""Limits: set, shown, removed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, and_, delete, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama import keys, money
from parallama.db import names
from parallama.db.manage.credentials import find_key
from parallama.db.manage.engine import insert_or, reading
from parallama.db.manage.pages import Page, paged
from parallama.db.manage.people import find_user
from parallama.db.manage.roles import check_role
from parallama.db.manage.tables import api_keys, users
from parallama.db.manage.tables import gateway_rate_limits as table
from parallama.db.policies import COLUMNS, Cell
from parallama.desk import Desk
from parallama.errors import NotFound, UsageError
from parallama.limits import ANY, Unit
from parallama.roles import BUILT_IN, Permissions

GATEWAYS = ("ollama", "openai", ANY)

Amount = int | Decimal
"""Money for what is limited by cost, else a whole number."""

# Counters pass through doubles on their way, which are exact up to 2 ** 53.
_LARGEST_COUNT = 10**15
_COST_DECIMALS = 9

_ROLE = "role:"
_KEY = "key:"


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose limits: the defaults of a role, a user's own, or those of one of a user's keys."""

    label: str
    role: str | None = None
    user_id: str | None = None
    key_id: str | None = None

    @property
    def owner(self) -> tuple[str, str | None]:
        """The column that says so, and what is in it."""
        if self.role is not None:
            return "role", self.role
        return ("user_id", self.user_id) if self.key_id is None else ("key_id", self.key_id)

    @property
    def is_it(self) -> ColumnElement[bool]:
        column, value = self.owner
        return table.c[column] == value


@dataclass(frozen=True, slots=True)
class Policy:
    """
    The limits of one scope for one gateway and model; a cell that is not there is no limit.

    `user_id` is the user's, and for a key that of its user.
    """

    id: str
    scope: str
    user_id: str | None
    username: str | None
    key_id: str | None
    key_name: str | None
    gateway: str
    model: str
    shadow: bool
    amounts: Mapping[Cell, Amount]
    updated_at: datetime


async def set_limits(
    desk: Desk,
    whose: str,
    *,
    gateway: str,
    model: str,
    amounts: Mapping[Cell, Amount],
    shadow: bool = False,
) -> Policy:
    """Set the cells in `amounts`; the others stay as they are."""
    check_gateway(gateway)
    model = names.check_model(model)
    if not amounts:
        raise UsageError("name at least one limit, such as --tokens-per-day 100000")
    changed: dict[str, Any] = {"updated_at": desk.now}
    for cell, amount in amounts.items():
        changed[COLUMNS[cell]] = check_amount(cell[0], amount)
    async with desk.writing() as work:
        connection = work.connection
        scope = await _find_scope(connection, desk.roles, whose)
        column, owner = scope.owner
        this = and_(
            scope.is_it,
            table.c.gateway_type == gateway,
            table.c.model == model,
            table.c.shadow == shadow,
        )
        before = await _list(connection, this)
        query = insert_or(desk.engine, table).values(
            id=str(uuid4()),
            **{column: owner},
            gateway_type=gateway,
            model=model,
            shadow=shadow,
            **changed,
        )
        await connection.execute(
            query.on_conflict_do_update(
                index_elements=[column, "gateway_type", "model", "shadow"], set_=changed
            )
        )
        (policy,) = await _list(connection, this)
        await work.record(
            "limits.set",
            scope.label,
            id=policy.id,
            before=before[0] if before else None,
            after=policy,
        )
        work.changed("limits", policy.user_id or "")
    return policy


async def unset_limits(
    desk: Desk,
    whose: str,
    *,
    gateway: str | None = None,
    model: str | None = None,
    shadow: bool | None = None,
) -> tuple[Scope, int]:
    """
    Remove what was set for this user, key or role: all of it, or for one gateway and model, or
    only what is in the shadow, or only what is not.

    Returns whose they were and how many. Raises NotFound where one was named and none was set.
    """
    if gateway is not None:
        check_gateway(gateway)
    async with desk.writing() as work:
        scope = await _find_scope(work.connection, desk.roles, whose)
        which = [scope.is_it]
        if gateway is not None:
            which.append(table.c.gateway_type == gateway)
        if model is not None:
            which.append(table.c.model == names.check_model(model))
        if shadow is not None:
            which.append(table.c.shadow == shadow)
        before = await _list(work.connection, *which)
        if not before and len(which) > 1:
            raise NotFound(f"{scope.label} has no limits of its own there")
        for policy in before:
            await work.connection.execute(delete(table).where(table.c.id == policy.id))
            await work.record("limits.unset", scope.label, id=policy.id, before=policy)
        work.changed("limits", scope.user_id or "")
    return scope, len(before)


async def list_limits(
    engine: AsyncEngine,
    whose: str | None = None,
    *,
    roles: Mapping[str, Permissions] = BUILT_IN,
    page: Page | None = None,
) -> list[Policy]:
    """
    All limits that were set, or those that count for one scope: for a key also its user's, for a
    user those of all keys, for both the role's. Of a page the order is that of the ids.
    """
    async with reading(engine) as connection:
        if whose is None:
            return await _list(connection, page=page)
        scope = await _find_scope(connection, roles, whose)
        if scope.user_id is None:
            return await _list(connection, scope.is_it, page=page)
        user = await find_user(connection, scope.user_id)
        key = api_keys.c.user_id == user.id if scope.key_id is None else scope.is_it
        which = or_(table.c.user_id == user.id, table.c.role == user.role, key)
        return await _list(connection, which, page=page)


async def get_limits(engine: AsyncEngine, id: str) -> Policy:
    """Raises NotFound."""
    async with reading(engine) as connection:
        found = await _list(connection, table.c.id == id) if names.looks_like_id(id) else []
    if not found:
        raise NotFound(f"there are no limits {id!r}")
    return found[0]


async def user_of(
    engine: AsyncEngine, whose: str, *, roles: Mapping[str, Permissions] = BUILT_IN
) -> str | None:
    """The id of the user whose this is; None for a role's."""
    async with reading(engine) as connection:
        return (await _find_scope(connection, roles, whose)).user_id


def check_gateway(gateway: str) -> None:
    if gateway not in GATEWAYS:
        raise UsageError(f"there is no gateway {gateway!r}: the gateways are {', '.join(GATEWAYS)}")


def check_amount(unit: Unit, amount: Amount) -> Amount:
    """What counters can hold to its last digit. Raises UsageError."""
    most = _LARGEST_COUNT // unit.parts
    if unit is Unit.COST:
        return money.check(Decimal(amount), "a limit of cost", decimals=_COST_DECIMALS, most=most)
    if not isinstance(amount, int) or not 0 <= amount <= most:
        raise UsageError(f"a limit is a whole number from 0 to {most}, not {amount}")
    return amount


async def _list(
    connection: AsyncConnection, *which: ColumnElement[bool], page: Page | None = None
) -> list[Policy]:
    query = (
        select(
            table,
            users.c.username,
            users.c.id.label("owner_id"),
            api_keys.c.public_id,
            api_keys.c.name.label("key_name"),
        )
        .join(api_keys, api_keys.c.id == table.c.key_id, isouter=True)
        .join(
            users,
            or_(users.c.id == table.c.user_id, users.c.id == api_keys.c.user_id),
            isouter=True,
        )
        .where(*which)
    )
    if page is not None:
        query = paged(query, page, (table.c.id,))
    else:
        query = query.order_by(
            # Defaults first. Databases do not agree where NULL belongs.
            table.c.role.is_(None),
            table.c.role,
            users.c.username,
            table.c.key_id.is_not(None),
            api_keys.c.public_id,
            table.c.gateway_type,
            table.c.model,
            table.c.shadow,
        )
    return [_policy(row) for row in await connection.execute(query)]


async def _find_scope(
    connection: AsyncConnection, roles: Mapping[str, Permissions], text: str
) -> Scope:
    """A user by name or id, `role:NAME`, or `key:NAME_OR_ID`. Raises NotFound or UsageError."""
    if text.startswith(_KEY):
        key = await find_key(connection, text.removeprefix(_KEY))
        return Scope(_key_label(key.public_id), user_id=key.user_id, key_id=key.id)
    if not text.startswith(_ROLE):
        user = await find_user(connection, text)
        return Scope(user.username, user_id=user.id)
    return Scope(text, role=await check_role(connection, roles, text.removeprefix(_ROLE)))


def _key_label(public_id: str) -> str:
    """Not its name, which others may have too."""
    return f"{_KEY}{keys.PREFIX}{public_id}"


def _policy(row: Any) -> Policy:
    if row.role is not None:
        scope = f"{_ROLE}{row.role}"
    else:
        scope = row.username if row.key_id is None else _key_label(row.public_id)
    return Policy(
        id=row.id,
        scope=scope,
        user_id=row.owner_id,
        username=row.username,
        key_id=row.key_id,
        key_name=row.key_name,
        gateway=row.gateway_type,
        model=row.model,
        shadow=row.shadow,
        amounts=dict(_amounts(row)),
        updated_at=row.updated_at,
    )


def _amounts(row: Any) -> Iterable[tuple[Cell, Amount]]:
    for cell, column in COLUMNS.items():
        amount = row._mapping[column]
        if amount is not None:
            yield cell, amount
