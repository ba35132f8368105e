"""`/admin/v1/keys`: for whoever hands them out, and for the owners of theirs."""

import asyncio
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from parallama import keys, sshkeys
from parallama.admin.bounds import check_gives, check_key, key_grants
from parallama.admin.cursors import USUAL, Cursor, Limit, Listing, listing, page
from parallama.admin.etags import etag
from parallama.admin.problems import forbidden
from parallama.admin.routes import users
from parallama.admin.shapes import KeyChange, NewKey, Rotation
from parallama.admin.visit import Visit, needs
from parallama.db.manage import credentials
from parallama.db.manage.credentials import ApiKey
from parallama.db.names import looks_like_id
from parallama.errors import NotFound

router = APIRouter(prefix="/admin/v1/keys", tags=["keys"])

Reads = Annotated[Visit, needs("keys:read", own=True)]


class Key(BaseModel):
    """A key without its secret. `key_prefix` is the part of it that everybody may see."""

    id: str
    public_id: str
    key_prefix: str
    kind: str
    name: str | None
    user_id: str
    username: str
    models: list[str] | None
    networks: list[str] | None
    gateways: list[str] | None
    scopes: list[str] | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    previous_expires_at: datetime | None


class NewSecret(Key):
    """The only time that the key itself is shown."""

    key: str | None = Field(
        description="null of a public key, and where the same Idempotency-Key asked again: it is "
        "kept nowhere. Rotate the key if it was never received."
    )


@router.get("")
async def list_keys(
    visit: Reads, user: str | None = None, limit: Limit = USUAL, cursor: Cursor = None
) -> Listing[Key]:
    """Oldest first, with those that expired or were revoked; all, or those of one user."""
    whose = await _whose(visit, user)
    here = page(cursor, limit, datetime, str)
    found = await credentials.list_keys(visit.engine, whose, here)
    shown = listing(found, here, lambda key: (key.created_at, key.id))
    return Listing(items=list(map(_shown, shown.items)), next_cursor=shown.next_cursor)


@router.post("", status_code=201)
async def create_key(
    given: NewKey, visit: Annotated[Visit, needs("keys:create", own=True)], response: Response
) -> NewSecret:
    """
    The key is in this answer and nowhere else.

    It can be used for nothing that the caller may not do: bound it by `scopes` where its user may.
    """
    bounds: dict[str, Any] = given.model_dump(exclude={"user", "public_key"})
    whose = await _whose(visit, given.user) or visit.user_id
    await _check(visit, whose, bounds)
    minted = None
    async with visit.working() as desk:
        if given.public_key is not None:
            public_key = sshkeys.read(given.public_key)
            key = await credentials.add_public_key(desk, whose, public_key, **bounds)
        else:
            minted = await _mint(visit)
            key = await credentials.create_key(desk, whose, minted, **bounds)
    response.headers["location"] = f"{router.prefix}/{key.id}"
    response.headers["etag"] = etag(key)
    return _with_secret(key, minted)


@router.get("/{key}")
async def get_key(key: str, visit: Reads, response: Response) -> Key:
    """By id."""
    found = await reached(visit, key)
    response.headers["etag"] = etag(found)
    return _shown(found)


@router.patch("/{key}")
async def update_key(
    key: str,
    given: KeyChange,
    visit: Annotated[Visit, needs("keys:update", own=True)],
    response: Response,
) -> Key:
    """What it is then can be used for nothing that the caller may not do."""
    found = await reached(visit, key)
    changes = given.model_dump(exclude_unset=True)
    await _check(visit, found.user_id, {**asdict(found), **changes})
    async with visit.working() as desk:
        changed = await credentials.update_key(desk, found.id, **changes)
    response.headers["etag"] = etag(changed)
    return _shown(changed)


@router.post("/{key}/rotate")
async def rotate_key(
    key: str,
    visit: Annotated[Visit, needs("keys:rotate", own=True)],
    response: Response,
    given: Rotation | None = None,
) -> NewSecret:
    """Another secret for the same key, in this answer and nowhere else."""
    found = await reached(visit, key)
    await _check(visit, found.user_id, asdict(found))
    minted = await _mint(visit)
    async with visit.working() as desk:
        grace = (given or Rotation()).grace
        changed = await credentials.rotate_key(desk, found.id, minted, grace=grace)
    response.headers["etag"] = etag(changed)
    return _with_secret(changed, minted)


@router.post("/{key}/revoke")
async def revoke_key(
    key: str, visit: Annotated[Visit, needs("keys:revoke", own=True)], response: Response
) -> Key:
    """Within a second, for good."""
    found = await reached(visit, key)
    async with visit.working() as desk:
        changed = await credentials.revoke_key(desk, found.id)
    response.headers["etag"] = etag(changed)
    return _shown(changed)


async def _whose(visit: Visit, user: str | None) -> str | None:
    """The id of the user who was named; for who reaches only their own, theirs."""
    if user is None:
        return visit.reach
    return (await users.reached(visit, user)).id


async def reached(visit: Visit, id: str) -> ApiKey:
    """By id alone: of a name that others use, too, one would learn that they do."""
    found = await credentials.get_key(visit.engine, id) if looks_like_id(id) else None
    if found is None or not visit.reaches(found.user_id):
        raise NotFound(f"there is no key {id!r}")
    return found


async def _check(visit: Visit, owner: str, bounds: dict[str, Any]) -> None:
    """Whether the caller may have such a key made, or learn its secret."""
    grants = key_grants(await users.account_of(visit, owner), bounds["scopes"])
    check_gives(visit.permissions, grants, "this key could do more")
    own = None
    if visit.key_id is not None:
        own = await credentials.get_key(visit.engine, visit.key_id)
        if own.gateways is not None:
            raise forbidden("Your own key is restricted to some gateways: use another one.")
    check_key(
        own,
        models=bounds["models"],
        networks=bounds["networks"],
        expires_at=bounds["expires_at"],
    )


async def _mint(visit: Visit) -> keys.Minted:
    office = visit.office
    rounds = office.config.authentication.key_hash_rounds
    return await asyncio.to_thread(keys.mint, office.random_bytes, rounds=rounds)


def _shown(key: ApiKey) -> Key:
    return Key(**asdict(key), key_prefix=credentials.shown_id(key))


def _with_secret(key: ApiKey, minted: keys.Minted | None) -> NewSecret:
    token = None if minted is None else minted.token
    return NewSecret(**asdict(key), key_prefix=credentials.shown_id(key), key=token)
