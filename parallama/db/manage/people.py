"""Users and API keys: made, shown, changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama import keys
from parallama.db import names
from parallama.db.manage.engine import reading, writing
from parallama.db.manage.tables import api_keys, users
from parallama.errors import Conflict, NotFound, UsageError
from parallama.roles import Role


@dataclass(frozen=True, slots=True)
class User:
    id: str
    username: str
    role: Role
    created_at: datetime
    updated_at: datetime
    disabled_at: datetime | None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret, which nobody can show again."""

    id: str
    public_id: str
    name: str | None
    user_id: str
    username: str
    models: tuple[str, ...] | None
    networks: tuple[str, ...] | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


_USERS = select(*users.c["id", "username", "role", "created_at", "updated_at", "disabled_at"])
_KEYS = select(
    *api_keys.c["id", "public_id", "name", "user_id", "models", "networks"],
    *api_keys.c["created_at", "expires_at", "revoked_at", "last_used_at"],
    users.c.username,
).join(users, users.c.id == api_keys.c.user_id)


async def create_user(engine: AsyncEngine, name: str, role: Role, *, now: datetime) -> User:
    """Raises Conflict where there is a user of that name, also when both are created at once."""
    name = names.check_username(name)
    user = User(str(uuid4()), name, role, created_at=now, updated_at=now, disabled_at=None)
    async with writing(engine) as connection:
        query = insert(users).values(
            id=user.id,
            username=user.username,
            role=role,
            is_admin=role is Role.ADMIN,
            created_at=now,
            updated_at=now,
        )
        await _unless_taken(connection, query, name)
    return user


async def list_users(engine: AsyncEngine) -> list[User]:
    async with reading(engine) as connection:
        rows = await connection.execute(_USERS.order_by(users.c.username))
    return [_user(row) for row in rows]


async def get_user(engine: AsyncEngine, who: str) -> User:
    """`who` is a user's name or id. Raises NotFound."""
    async with reading(engine) as connection:
        return await find_user(connection, who)


async def update_user(
    engine: AsyncEngine,
    who: str,
    *,
    now: datetime,
    role: Role | None = None,
    username: str | None = None,
) -> User:
    """Change what is given. Usage rows keep the name that the user had at the time."""
    changes: dict[str, Any] = {}
    if role is not None:
        changes |= {"role": role, "is_admin": role is Role.ADMIN}
    if username is not None:
        changes["username"] = names.check_username(username)
    return await _change_user(engine, who, changes, now)


async def disable_user(engine: AsyncEngine, who: str, *, now: datetime) -> User:
    """None of the user's keys works until `enable_user`."""
    return await _change_user(engine, who, {"disabled_at": now}, now)


async def enable_user(engine: AsyncEngine, who: str, *, now: datetime) -> User:
    return await _change_user(engine, who, {"disabled_at": None}, now)


async def delete_user(engine: AsyncEngine, who: str) -> User:
    """With the user go the keys and limits. What was used stays on record."""
    async with writing(engine) as connection:
        user = await find_user(connection, who)
        await connection.execute(delete(users).where(users.c.id == user.id))
    return user


async def create_key(
    engine: AsyncEngine,
    who: str,
    minted: keys.Minted,
    *,
    now: datetime,
    name: str | None = None,
    expires_at: datetime | None = None,
    models: list[str] | None = None,
    networks: list[str] | None = None,
) -> ApiKey:
    """Store what `minted` leaves behind, for a user by name or id. `models` None allows all."""
    if expires_at is not None and expires_at <= now:
        raise UsageError(f"a key cannot expire in the past: {expires_at.isoformat()}")
    given = {
        "id": str(uuid4()),
        "public_id": minted.public_id,
        "name": None if name is None else names.check_key_name(name),
        "models": names.check_models(models),
        "networks": names.check_networks(networks),
        "created_at": now,
        "expires_at": expires_at,
    }
    async with writing(engine) as connection:
        user = await find_user(connection, who)
        query = insert(api_keys).values(**given, user_id=user.id, key_hash=minted.secret_hash)
        await connection.execute(query)
        return await find_key(connection, minted.public_id)


async def list_keys(engine: AsyncEngine, who: str | None = None) -> list[ApiKey]:
    """Every key, or those of one user by name or id; oldest first."""
    async with reading(engine) as connection:
        query = _KEYS.order_by(api_keys.c.created_at, api_keys.c.id)
        if who is not None:
            query = query.where(users.c.id == (await find_user(connection, who)).id)
        rows = await connection.execute(query)
    return [_key(row) for row in rows]


async def get_key(engine: AsyncEngine, which: str) -> ApiKey:
    """`which` is a key's id, its public id (with or without `plm_`), or its name."""
    async with reading(engine) as connection:
        return await find_key(connection, which)


async def revoke_key(engine: AsyncEngine, which: str, *, now: datetime) -> ApiKey:
    """For good. Revoking twice keeps the first time."""
    async with writing(engine) as connection:
        key = await find_key(connection, which)
        if key.revoked_at is None:
            query = update(api_keys).where(api_keys.c.id == key.id).values(revoked_at=now)
            await connection.execute(query)
        return await find_key(connection, key.id)


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
    return _user(row)


async def _change_user(
    engine: AsyncEngine, who: str, changes: Mapping[str, Any], now: datetime
) -> User:
    async with writing(engine) as connection:
        user = await find_user(connection, who)
        query = update(users).where(users.c.id == user.id).values(**changes, updated_at=now)
        await _unless_taken(connection, query, changes.get("username", user.username))
        return await find_user(connection, user.id)


async def _unless_taken(connection: AsyncConnection, query: Any, username: str) -> None:
    try:
        await connection.execute(query)
    except IntegrityError as error:
        raise Conflict(f"there is a user {username!r} already") from error


async def find_key(connection: AsyncConnection, which: str) -> ApiKey:
    parsed = keys.parse(which)
    if parsed is not None:
        raise UsageError(
            "that is a whole key, and other users of this machine can see command lines: "
            f"name it by its public part, {keys.PREFIX}{parsed.public_id}"
        )
    if names.looks_like_id(which):
        query = _KEYS.where(api_keys.c.id == which.lower())
        found = [_key(row) for row in await connection.execute(query)]
    else:
        public_id = which.removeprefix(keys.PREFIX)
        query = _KEYS.where(
            or_(api_keys.c.public_id == public_id, api_keys.c.name == names.normal(which))
        )
        found = [_key(row) for row in await connection.execute(query)]
        found = (
            [key for key in found if key.public_id == public_id]
            or [key for key in found if key.revoked_at is None]
            or found
        )
    if not found:
        raise NotFound(f"there is no key {which!r}")
    if len(found) > 1:
        raise Conflict(f"{len(found)} keys are named {which!r}: name one by its id")
    return found[0]


def _user(row: Any) -> User:
    return User(
        id=row.id,
        username=row.username,
        role=Role(row.role),
        created_at=row.created_at,
        updated_at=row.updated_at,
        disabled_at=row.disabled_at,
    )


def _key(row: Any) -> ApiKey:
    return ApiKey(
        id=row.id,
        public_id=row.public_id,
        name=row.name,
        user_id=row.user_id,
        username=row.username,
        models=_tuple(row.models),
        networks=_tuple(row.networks),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)
