"""Grants: what a user may use beyond the limits for a while."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama.db import names
from parallama.db.manage.engine import reading
from parallama.db.manage.limits import Amount, check_amount, check_gateway
from parallama.db.manage.pages import Page, paged
from parallama.db.manage.people import find_user
from parallama.db.manage.tables import limit_grants as table
from parallama.db.manage.tables import users
from parallama.desk import Desk
from parallama.errors import NotFound, UsageError
from parallama.limits import ANY, Unit


@dataclass(frozen=True, slots=True)
class Granted:
    """One grant. It is over once `expires_at` has come."""

    id: str
    user_id: str
    username: str
    gateway: str
    model: str
    unit: Unit
    amount: Amount
    created_at: datetime
    expires_at: datetime


_GRANTS = select(table, users.c.username).join(users, users.c.id == table.c.user_id)


async def grant(
    desk: Desk,
    who: str,
    unit: Unit,
    amount: Amount,
    *,
    until: datetime,
    gateway: str = ANY,
    model: str = ANY,
) -> Granted:
    """
    Give a user, by name or id, that much beyond the limits. Several grants add up.

    Raises UsageError for one that would be over already, or that grants nothing.
    """
    check_gateway(gateway)
    model = names.check_model(model)
    if unit is Unit.CONCURRENT:
        raise UsageError("what runs at once cannot be granted: set another --concurrent limit")
    if not check_amount(unit, amount):
        raise UsageError("a grant of 0 grants nothing")
    if until <= desk.now:
        raise UsageError(f"a grant cannot end in the past: {until.isoformat()}")
    async with desk.writing() as work:
        user = await find_user(work.connection, who)
        id = str(uuid4())
        query = insert(table).values(
            id=id,
            user_id=user.id,
            gateway_type=gateway,
            model=model,
            unit=unit,
            amount=None if unit is Unit.COST else amount,
            cost=amount if unit is Unit.COST else None,
            created_at=desk.now,
            expires_at=until,
        )
        await work.connection.execute(query)
        granted = await _find(work.connection, id)
        await work.record("grants.create", user.username, id=id, after=granted)
        work.changed("limits", user.id)
    return granted


async def list_grants(
    engine: AsyncEngine,
    who: str | None = None,
    *,
    after: datetime | None = None,
    page: Page | None = None,
) -> list[Granted]:
    """
    Every grant, or those of one user; what ends first comes first.

    Those that are over stay: usage rows name them. With `after` only those that end later.
    """
    order = (users.c.username, table.c.expires_at, table.c.id)
    query = _GRANTS.order_by(*order) if page is None else paged(_GRANTS, page, order)
    async with reading(engine) as connection:
        if who is not None:
            query = query.where(users.c.id == (await find_user(connection, who)).id)
        if after is not None:
            query = query.where(table.c.expires_at > after)
        return [_granted(row) for row in await connection.execute(query)]


async def get_grant(engine: AsyncEngine, id: str) -> Granted:
    """Raises NotFound."""
    async with reading(engine) as connection:
        return await _find(connection, id)


async def revoke_grant(desk: Desk, id: str) -> Granted:
    """Remove a grant; what was used of it stays used. Raises NotFound."""
    async with desk.writing() as work:
        found = await _find(work.connection, id)
        await work.connection.execute(delete(table).where(table.c.id == found.id))
        await work.record("grants.revoke", found.username, id=found.id, before=found)
        work.changed("limits", found.user_id)
    return found


async def _find(connection: AsyncConnection, id: str) -> Granted:
    row = None
    if names.looks_like_id(id):
        query = _GRANTS.where(table.c.id == id.lower())
        row = (await connection.execute(query)).first()
    if row is None:
        raise NotFound(f"there is no grant {id!r}")
    return _granted(row)


def _granted(row: Any) -> Granted:
    amount: int | Decimal = row.cost if row.amount is None else row.amount
    return Granted(
        id=row.id,
        user_id=row.user_id,
        username=row.username,
        gateway=row.gateway_type,
        model=row.model,
        unit=Unit(row.unit),
        amount=amount,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
