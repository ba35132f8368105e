"""Roles beside those that are built in or configured: made, shown, changed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama.db.manage.engine import reading
from parallama.db.manage.tables import gateway_rate_limits, user_roles, users
from parallama.db.manage.tables import roles as table
from parallama.desk import Desk
from parallama.errors import Conflict, NotFound
from parallama.roles import BUILT_IN, Permissions, check_name, permissions


@dataclass(frozen=True, slots=True)
class NamedRole:
    """`origin` is `built in`, `configuration` or `database`; only the last can be changed here."""

    name: str
    origin: str
    permissions: tuple[str, ...]
    description: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


async def check_role(
    connection: AsyncConnection, known: Mapping[str, Permissions], name: str
) -> str:
    """The role's plain name. Raises NotFound."""
    name = str(name)
    if name in known:
        return name
    stored = list(await connection.scalars(select(table.c.name).order_by(table.c.name)))
    if name not in stored:
        every = ", ".join([*map(str, known), *stored])
        raise NotFound(f"there is no role {name!r}: the roles are {every}")
    return name


async def list_roles(engine: AsyncEngine, known: Mapping[str, Permissions]) -> list[NamedRole]:
    """Those of `known`, which services are started with, before those of the database."""
    async with reading(engine) as connection:
        stored = [_role(row) for row in await connection.execute(select(table).order_by("name"))]
    return [_known(name, granted) for name, granted in known.items()] + stored


async def get_role(engine: AsyncEngine, known: Mapping[str, Permissions], name: str) -> NamedRole:
    """Raises NotFound."""
    if name in known:
        return _known(name, known[name])
    async with reading(engine) as connection:
        return await _find(connection, name)


async def create_role(
    desk: Desk, name: str, granted: Iterable[str], *, description: str | None = None
) -> NamedRole:
    """Raises Conflict where there is a role of that name, UsageError for what is no permission."""
    check_name(name)
    values = {"permissions": _checked(granted), "description": description}
    async with desk.writing() as work:
        taken = select(table.c.name).where(table.c.name == name)
        if name in desk.roles or (await work.connection.execute(taken)).first():
            raise Conflict(f"there is a role {name!r} already")
        query = insert(table).values(name=name, **values, created_at=desk.now, updated_at=desk.now)
        await work.connection.execute(query)
        role = await _find(work.connection, name)
        await work.record("roles.create", name, after=role)
        work.changed("everything")  # a user may have had it by name, from before
    return role


async def update_role(
    desk: Desk,
    name: str,
    *,
    granted: Iterable[str] | None = None,
    description: str | None = None,
) -> NamedRole:
    """Change what is given. It counts for all users of the role within a second."""
    changes: dict[str, Any] = {}
    if granted is not None:
        changes["permissions"] = _checked(granted)
    if description is not None:
        changes["description"] = description
    async with desk.writing() as work:
        _refuse_fixed(desk, name)
        before = await _find(work.connection, name)
        query = update(table).where(table.c.name == name)
        await work.connection.execute(query.values(**changes, updated_at=desk.now))
        after = await _find(work.connection, name)
        await work.record("roles.update", name, before=before, after=after)
        work.changed("everything")
    return after


async def delete_role(desk: Desk, name: str) -> NamedRole:
    """Raises Conflict while users or limits have it."""
    async with desk.writing() as work:
        _refuse_fixed(desk, name)
        role = await _find(work.connection, name)
        for column in (users.c.role, user_roles.c.role, gateway_rate_limits.c.role):
            query = select(func.count()).where(column == name)
            if used := (await work.connection.execute(query)).scalar_one():
                what = "limits" if column.table is gateway_rate_limits else "users"
                raise Conflict(f"the role {name!r} is still that of {used} {what}")
        await work.connection.execute(delete(table).where(table.c.name == name))
        await work.record("roles.delete", name, before=role)
        work.changed("everything")
    return role


async def _find(connection: AsyncConnection, name: str) -> NamedRole:
    row = (await connection.execute(select(table).where(table.c.name == name))).first()
    if row is None:
        raise NotFound(f"there is no role {name!r}")
    return _role(row)


def _refuse_fixed(desk: Desk, name: str) -> None:
    if name in desk.roles:
        origin = "built in" if name in BUILT_IN else "set in the configuration"
        raise Conflict(f"the role {name!r} is {origin} and cannot be changed here")


def _checked(granted: Iterable[str]) -> list[str]:
    """As they were given: `models:*` also grants what is thought of later."""
    wanted = list(dict.fromkeys(granted))
    permissions(wanted)
    return wanted


def _known(name: str, granted: Permissions) -> NamedRole:
    origin = "built in" if name in BUILT_IN else "configuration"
    return NamedRole(str(name), origin, tuple(sorted(granted)))


def _role(row: Any) -> NamedRole:
    return NamedRole(
        name=row.name,
        origin="database",
        permissions=tuple(row.permissions),
        description=row.description,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
