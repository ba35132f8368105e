"""Users: made, shown, changed."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama.config import Authentication
from parallama.db import names
from parallama.db.manage.engine import reading
from parallama.db.manage.pages import Page, paged
from parallama.db.manage.roles import check_role
from parallama.db.manage.tables import api_keys, refresh_tokens, user_roles, users
from parallama.desk import Desk, Work
from parallama.errors import Conflict, NotFound
from parallama.roles import Role


@dataclass(frozen=True, slots=True)
class User:
    """`role` also says whose default limits count; `more_roles` grant more, in order."""

    id: str
    username: str
    role: str
    more_roles: tuple[str, ...]
    has_password: bool
    created_at: datetime
    updated_at: datetime
    disabled_at: datetime | None


_COLUMNS = users.c["id", "username", "role", "created_at", "updated_at", "disabled_at"]
_USERS = select(*_COLUMNS, users.c.password_hash.is_not(None).label("has_password"))


async def create_user(
    desk: Desk, name: str, role: str = Role.USER, *, more_roles: Iterable[str] = ()
) -> User:
    """Raises Conflict where there is a user of that name, also when both are created at once."""
    name = names.check_username(name)
    id = str(uuid4())
    async with desk.writing() as work:
        query = insert(users).values(
            id=id,
            username=name,
            role=await check_role(work.connection, desk.roles, role),
            is_admin=role == Role.ADMIN,
            created_at=desk.now,
            updated_at=desk.now,
        )
        await _unless_taken(work.connection, query, name)
        await _set_more_roles(work, desk, id, more_roles)
        user = await find_user(work.connection, id)
        await work.record("users.create", name, id=id, after=user)
    return user


async def list_users(engine: AsyncEngine, page: Page | None = None) -> list[User]:
    """By name."""
    query = _USERS.order_by(users.c.username)
    if page is not None:
        query = paged(_USERS, page, (users.c.username,))
    async with reading(engine) as connection:
        rows = (await connection.execute(query)).all()
        more = await _more_roles(connection)
    return [_user(row, more.get(row.id, ())) for row in rows]


async def get_user(engine: AsyncEngine, who: str) -> User:
    """`who` is a user's name or id. Raises NotFound."""
    async with reading(engine) as connection:
        return await find_user(connection, who)


async def update_user(
    desk: Desk,
    who: str,
    *,
    role: str | None = None,
    more_roles: Iterable[str] | None = None,
    username: str | None = None,
) -> User:
    """Change what is given. Usage rows keep the name that the user had at the time."""
    changes: dict[str, Any] = {}
    if username is not None:
        changes["username"] = names.check_username(username)
    async with desk.writing() as work:
        if role is not None:
            role = await check_role(work.connection, desk.roles, role)
            changes |= {"role": role, "is_admin": role == Role.ADMIN}
        async with _keeping_an_admin(desk, work):
            before = await find_user(work.connection, who)
            if more_roles is not None:
                await _set_more_roles(work, desk, before.id, more_roles)
            return await _change(work, "users.update", before, changes)


async def disable_user(desk: Desk, who: str) -> User:
    """None of the user's credentials works until `enable_user`."""
    async with desk.writing() as work, _keeping_an_admin(desk, work):
        before = await find_user(work.connection, who)
        return await _change(work, "users.disable", before, {"disabled_at": desk.now})


async def enable_user(desk: Desk, who: str) -> User:
    async with desk.writing() as work:
        before = await find_user(work.connection, who)
        return await _change(work, "users.enable", before, {"disabled_at": None})


async def set_password(
    desk: Desk, who: str, password: str | None, *, settings: Authentication
) -> User:
    """
    From now on the user logs in with this one, or with None not at all. All sessions end.

    Raises UsageError where it is too weak.
    """
    from parallama import passwords

    hash = None
    if password is not None:
        user = await get_user(desk.engine, who)
        passwords.check(password, username=user.username, min_length=settings.password_min_length)
        rounds = settings.password_hash_rounds
        hash = await asyncio.to_thread(passwords.hash, password, rounds=rounds)
    async with desk.writing() as work:
        before = await find_user(work.connection, who)
        values = {"password_hash": hash} | await _end_sessions(work, before)
        return await _change(work, "users.set-password", before, values)


async def log_out(desk: Desk, who: str) -> User:
    """End all of a user's sessions. Keys stay good."""
    async with desk.writing() as work:
        before = await find_user(work.connection, who)
        return await _change(work, "users.log-out", before, await _end_sessions(work, before))


async def delete_user(desk: Desk, who: str) -> User:
    """With the user go all credentials and limits. What was used stays on record."""
    async with desk.writing() as work, _keeping_an_admin(desk, work):
        user = await find_user(work.connection, who)
        await work.connection.execute(delete(users).where(users.c.id == user.id))
        await work.record("users.delete", user.username, id=user.id, before=user)
        work.changed("user", user.id)
        work.changed("limits", user.id)
    return user


async def count(engine: AsyncEngine) -> tuple[int, int]:
    """How many users there are, and how many keys that were not revoked."""
    everybody = select(func.count()).select_from(users).scalar_subquery()
    unrevoked = (
        select(func.count())
        .select_from(api_keys)
        .where(api_keys.c.revoked_at.is_(None))
        .scalar_subquery()
    )
    async with reading(engine) as connection:
        row = (await connection.execute(select(everybody, unrevoked))).one()
    return row[0], row[1]


async def find_user(connection: AsyncConnection, who: str) -> User:
    """`who` is a user's name or id. Raises NotFound."""
    if names.looks_like_id(who):
        query = _USERS.where(users.c.id == who.lower())
    else:
        query = _USERS.where(users.c.username == names.normal(who))
    row = (await connection.execute(query)).first()
    if row is None:
        raise NotFound(f"there is no user {who!r}")
    return _user(row, (await _more_roles(connection, row.id)).get(row.id, ()))


async def _change(work: Work, action: str, before: User, changes: dict[str, Any]) -> User:
    query = update(users).where(users.c.id == before.id).values(**changes, updated_at=work.now)
    await _unless_taken(work.connection, query, changes.get("username", before.username))
    after = await find_user(work.connection, before.id)
    await work.record(action, after.username, id=after.id, before=before, after=after)
    work.changed("user", after.id)
    if after.role != before.role:  # another role has other defaults
        work.changed("limits", after.id)
    return after


async def _end_sessions(work: Work, user: User) -> dict[str, Any]:
    """What to change in the user's row, so that no token of before is good."""
    lock = select(users.c.id).where(users.c.id == user.id).with_for_update(key_share=True)
    await work.connection.execute(lock)  # before the tokens, as whoever uses one does
    query = update(refresh_tokens).where(
        refresh_tokens.c.user_id == user.id, refresh_tokens.c.revoked_at.is_(None)
    )
    await work.connection.execute(query.values(revoked_at=work.now))
    # Times in tokens are whole seconds. One that is issued in this same second is told of it, and
    # says the next (tokens.issue).
    return {"tokens_valid_from": work.now.replace(microsecond=0) + timedelta(seconds=1)}


@asynccontextmanager
async def _keeping_an_admin(desk: Desk, work: Work) -> AsyncIterator[None]:
    """Raises Conflict where the block takes the last one away, and the desk is to keep one."""
    query = (
        select(users.c.id)
        .where(users.c.disabled_at.is_(None))
        .where(
            or_(
                users.c.role == Role.ADMIN,
                users.c.id.in_(select(user_roles.c.user_id).where(user_roles.c.role == Role.ADMIN)),
            )
        )
    )
    before: Sequence[Any] = ()
    if desk.keeps_an_admin:  # the lock lets others wait who would take away another at this moment
        locked = query.order_by(users.c.id).with_for_update()
        before = (await work.connection.execute(locked)).all()
    yield
    if before and (await work.connection.execute(query.limit(1))).first() is None:
        raise Conflict("this is the last admin who can come in: make another one first")


async def _set_more_roles(work: Work, desk: Desk, id: str, wanted: Iterable[str]) -> None:
    await work.connection.execute(delete(user_roles).where(user_roles.c.user_id == id))
    for role in dict.fromkeys(wanted):
        role = await check_role(work.connection, desk.roles, role)
        await work.connection.execute(insert(user_roles).values(user_id=id, role=role))


async def _more_roles(
    connection: AsyncConnection, id: str | None = None
) -> dict[str, tuple[str, ...]]:
    query = select(user_roles).order_by(user_roles.c.role)
    if id is not None:
        query = query.where(user_roles.c.user_id == id)
    found: dict[str, tuple[str, ...]] = {}
    for row in await connection.execute(query):
        found[row.user_id] = (*found.get(row.user_id, ()), row.role)
    return found


async def _unless_taken(connection: AsyncConnection, query: Any, username: str) -> None:
    try:
        await connection.execute(query)
    except IntegrityError as error:
        raise Conflict(f"there is a user {username!r} already") from error


def _user(row: Any, more_roles: tuple[str, ...]) -> User:
    return User(
        id=row.id,
        username=row.username,
        role=row.role,
        more_roles=more_roles,
        has_password=row.has_password,
        created_at=row.created_at,
        updated_at=row.updated_at,
        disabled_at=row.disabled_at,
    )
