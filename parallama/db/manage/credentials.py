"""API keys: made, shown, changed, rotated, revoked."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama import keys
from parallama.db import names
from parallama.db.manage.engine import reading
from parallama.db.manage.pages import Page, paged
from parallama.db.manage.people import find_user
from parallama.db.manage.tables import api_keys, users
from parallama.desk import Desk, Work
from parallama.errors import Conflict, NotFound, UsageError
from parallama.roles import permissions
from parallama.sshkeys import PublicKey


@dataclass(frozen=True, slots=True)
class ApiKey:
    """
    A key without its secret, which nobody can show again.

    `kind` is `secret`, or `ssh` for a public key whose owner signs requests. Until
    `previous_expires_at` the secret from before the last rotation is good, too.
    """

    id: str
    public_id: str
    kind: str
    name: str | None
    user_id: str
    username: str
    models: tuple[str, ...] | None
    networks: tuple[str, ...] | None
    gateways: tuple[str, ...] | None
    scopes: tuple[str, ...] | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    previous_expires_at: datetime | None


_KEYS = select(
    *api_keys.c["id", "public_id", "kind", "name", "user_id", "models", "networks"],
    *api_keys.c["gateways", "scopes", "created_at", "expires_at", "revoked_at"],
    *api_keys.c["last_used_at", "previous_expires_at"],
    users.c.username,
).join(users, users.c.id == api_keys.c.user_id)


async def create_key(
    desk: Desk,
    who: str,
    minted: keys.Minted,
    *,
    kind: str = "secret",
    name: str | None = None,
    expires_at: datetime | None = None,
    models: Iterable[str] | None = None,
    networks: Iterable[str] | None = None,
    gateways: Iterable[str] | None = None,
    scopes: Iterable[str] | None = None,
) -> ApiKey:
    """
    Store what `minted` leaves behind, for a user by name or id.

    None of `models`, `networks` and `gateways` allows all; None of `scopes` all that its user may.
    """
    id = str(uuid4())
    values = _checked(
        desk,
        name=name,
        expires_at=expires_at,
        models=models,
        networks=networks,
        gateways=gateways,
        scopes=scopes,
    )
    async with desk.writing() as work:
        user = await find_user(work.connection, who)
        query = insert(api_keys).values(
            **values,
            id=id,
            user_id=user.id,
            kind=kind,
            public_id=minted.public_id,
            key_hash=minted.secret_hash,
            created_at=desk.now,
        )
        try:
            await work.connection.execute(query)
        except IntegrityError as error:  # of a new secret that would be a wonder
            raise Conflict("this public key is registered already: see `keys list`") from error
        key = await find_key(work.connection, id)
        await work.record("keys.create", _label(key), id=id, after=key)
    return key


async def add_public_key(
    desk: Desk, who: str, public_key: PublicKey, *, name: str | None = None, **bounds: Any
) -> ApiKey:
    """
    A key whose owner signs requests; takes what `create_key` takes. Without a name it has that of
    its comment. Raises Conflict where somebody has it already, also where it was revoked.
    """
    minted = keys.Minted("", public_key.public_id, public_key.line)
    name = name or public_key.comment or None
    return await create_key(desk, who, minted, kind="ssh", name=name, **bounds)


async def list_keys(
    engine: AsyncEngine, who: str | None = None, page: Page | None = None
) -> list[ApiKey]:
    """Every key, or those of one user by name or id; oldest first."""
    order = (api_keys.c.created_at, api_keys.c.id)
    query = _KEYS.order_by(*order) if page is None else paged(_KEYS, page, order)
    async with reading(engine) as connection:
        if who is not None:
            query = query.where(users.c.id == (await find_user(connection, who)).id)
        rows = await connection.execute(query)
    return [_key(row) for row in rows]


async def get_key(engine: AsyncEngine, which: str) -> ApiKey:
    """`which` is a key's id, its public id (with or without `plm_`), or its name."""
    async with reading(engine) as connection:
        return await find_key(connection, which)


async def update_key(desk: Desk, which: str, **changes: Any) -> ApiKey:
    """Change what is given of what `create_key` takes, but for the secret; None lifts a bound."""
    values = _checked(desk, **changes)
    async with desk.writing() as work:
        key = await _unrevoked(work, which)
        return await _change(work, "keys.update", key, values)


async def rotate_key(desk: Desk, which: str, minted: keys.Minted, *, grace: timedelta) -> ApiKey:
    """
    Another secret for the same key: its id, limits and usage stay. The old one is good for `grace`.

    Whoever rotates again within that time ends it for the one before the last.
    """
    async with desk.writing() as work:
        key = await _unrevoked(work, which)
        if key.kind != "secret":
            raise UsageError("a public key has no secret to rotate: add another and revoke this")
        hash = select(api_keys.c.key_hash).where(api_keys.c.id == key.id)
        values = {
            "public_id": minted.public_id,
            "key_hash": minted.secret_hash,
            "previous_public_id": key.public_id,
            "previous_key_hash": (await work.connection.execute(hash)).scalar_one(),
            "previous_expires_at": desk.now + grace,
        }
        return await _change(work, "keys.rotate", key, values)


async def revoke_key(desk: Desk, which: str) -> ApiKey:
    """For good. Revoking twice keeps the first time."""
    async with desk.writing() as work:
        key = await find_key(work.connection, which)
        if key.revoked_at is not None:
            return key
        return await _change(work, "keys.revoke", key, {"revoked_at": desk.now})


async def _change(work: Work, action: str, before: ApiKey, values: dict[str, Any]) -> ApiKey:
    query = update(api_keys).where(api_keys.c.id == before.id).values(**values)
    await work.connection.execute(query)
    after = await find_key(work.connection, before.id)
    await work.record(action, _label(after), id=after.id, before=before, after=after)
    work.changed("key", after.id)
    return after


async def _unrevoked(work: Work, which: str) -> ApiKey:
    key = await find_key(work.connection, which)
    if key.revoked_at is not None:
        raise Conflict("this key was revoked, for good: create another")
    return key


def _checked(desk: Desk, **given: Any) -> dict[str, Any]:
    """What was given, as it is stored."""
    expires_at = given.get("expires_at")
    if expires_at is not None and expires_at <= desk.now:
        raise UsageError(f"a key cannot expire in the past: {expires_at.isoformat()}")
    return {name: _CHECKS[name](value) for name, value in given.items()}


def _check_scopes(scopes: Iterable[str] | None) -> list[str] | None:
    if scopes is None:
        return None
    wanted = list(dict.fromkeys(scopes))
    permissions(wanted)
    if not wanted:
        raise UsageError("name at least one permission, or leave the option out to allow all")
    return wanted


_CHECKS: dict[str, Any] = {
    "name": lambda name: None if name is None else names.check_key_name(name),
    "expires_at": lambda at: at,
    "models": names.check_models,
    "networks": names.check_networks,
    "gateways": names.check_gateways,
    "scopes": _check_scopes,
}


def shown_id(key: ApiKey) -> str:
    """As people know it. That of a public key is no part of a secret that begins so."""
    return key.public_id if key.kind == "ssh" else keys.PREFIX + key.public_id


def _label(key: ApiKey) -> str:
    """Not its name, which others may have too."""
    return shown_id(key)


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


def _key(row: Any) -> ApiKey:
    return ApiKey(
        id=row.id,
        public_id=row.public_id,
        kind=row.kind,
        name=row.name,
        user_id=row.user_id,
        username=row.username,
        models=_tuple(row.models),
        networks=_tuple(row.networks),
        gateways=_tuple(row.gateways),
        scopes=_tuple(row.scopes),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
        previous_expires_at=row.previous_expires_at,
    )


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)
