"""`/admin/v1/limits` and `/admin/v1/grants`."""

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from parallama.admin.cursors import USUAL, Cursor, Limit, Listing, listing, page
from parallama.admin.etags import etag
from parallama.admin.routes import keys, users
from parallama.admin.shapes import (
    CELLS,
    EveryGateway,
    Grant,
    Limits,
    NewGrant,
    NewLimits,
    Removed,
)
from parallama.admin.visit import Visit, needs
from parallama.db.manage import grants, limits, people
from parallama.db.manage.grants import Granted
from parallama.db.manage.limits import Policy
from parallama.errors import NotFound, UsageError
from parallama.limits import Unit

router = APIRouter(prefix="/admin/v1/limits", tags=["limits"])
more = APIRouter(prefix="/admin/v1/grants", tags=["limits"])

Reads = Annotated[Visit, needs("limits:read", own=True)]
Writes = Annotated[Visit, needs("limits:write")]
Scope = Annotated[
    str | None, Query(description="Name or id of a user, `role:NAME`, or `key:NAME_OR_ID`.")
]


@router.get("")
async def list_limits(
    visit: Reads, scope: Scope = None, limit: Limit = USUAL, cursor: Cursor = None
) -> Listing[Limits]:
    """
    All that are set, or those that count for one scope: for a key also its user's, for a user those
    of all keys, for both the role's.
    """
    here = page(cursor, limit, str)
    whose = scope if visit.reach is None else await _own(visit, scope)
    found = await limits.list_limits(
        visit.engine, whose, roles=visit.office.config.known_roles, page=here
    )
    shown = listing(found, here, lambda policy: (policy.id,))
    return Listing(items=list(map(_shown, shown.items)), next_cursor=shown.next_cursor)


@router.post("")
async def set_limits(given: NewLimits, visit: Writes, response: Response) -> Limits:
    """Those that are named; others of the same scope, gateway and model stay."""
    amounts: dict[Any, Any] = {
        cell: getattr(given, name)
        for name, cell in CELLS.items()
        if getattr(given, name) is not None
    }
    async with visit.working() as desk:
        policy = await limits.set_limits(
            desk,
            given.scope,
            gateway=given.gateway,
            model=given.model,
            amounts=amounts,
            shadow=given.shadow,
        )
    response.headers["etag"] = etag(policy)
    return _shown(policy)


@router.delete("")
async def unset_limits(
    visit: Writes,
    scope: str,
    gateway: EveryGateway | None = None,
    model: str | None = None,
    shadow: bool | None = None,
) -> Removed:
    """All of a scope, or those of one gateway and model, or only what is in the shadow or not."""
    if model is not None and gateway is None:
        raise UsageError("model needs gateway: limits belong to both")
    async with visit.working() as desk:
        _, removed = await limits.unset_limits(
            desk, scope, gateway=gateway, model=model, shadow=shadow
        )
    return Removed(removed=removed)


@router.get("/{id}")
async def get_limits(id: str, visit: Reads, response: Response) -> Limits:
    """What is set for one scope, gateway and model."""
    found = await limits.get_limits(visit.engine, id)
    if not visit.reaches(found.user_id) and found.user_id is not None:
        raise NotFound(f"there are no limits {id!r}")
    if found.user_id is None and visit.reach is not None:  # a role's, and perhaps another's
        role = (await people.get_user(visit.engine, visit.reach)).role
        if found.scope != f"role:{role}":
            raise NotFound(f"there are no limits {id!r}")
    response.headers["etag"] = etag(found)
    return _shown(found)


@router.delete("/{id}", status_code=204)
async def delete_limits(id: str, visit: Writes) -> None:
    """All of one scope, gateway and model."""
    found = await limits.get_limits(visit.engine, id)
    whose = found.scope if found.key_id is None else f"key:{found.key_id}"
    if found.key_id is None and found.user_id is not None:
        whose = found.user_id
    async with visit.working() as desk:
        await limits.unset_limits(
            desk, whose, gateway=found.gateway, model=found.model, shadow=found.shadow
        )


@more.get("")
async def list_grants(
    visit: Reads, user: str | None = None, limit: Limit = USUAL, cursor: Cursor = None
) -> Listing[Grant]:
    """All, or those of one user, also those that are over."""
    here = page(cursor, limit, str, datetime, str)
    whose = user
    if visit.reach is not None:
        whose = await _own(visit, user)
    found = await grants.list_grants(visit.engine, whose, page=here)
    shown = listing(found, here, lambda grant: (grant.username, grant.expires_at, grant.id))
    return Listing(items=list(map(_grant, shown.items)), next_cursor=shown.next_cursor)


@more.post("", status_code=201)
async def create_grant(given: NewGrant, visit: Writes, response: Response) -> Grant:
    """So much more for a while, used up only by what the limits alone would refuse, and once."""
    unit = Unit(given.unit)
    if isinstance(given.amount, int) is (unit is Unit.COST):
        raise UsageError("the amount is text such as '12.50' for cost, else a whole number")
    async with visit.working() as desk:
        made = await grants.grant(
            desk,
            given.user,
            unit,
            given.amount,
            until=given.expires_at,
            gateway=given.gateway,
            model=given.model,
        )
    response.headers["location"] = f"{more.prefix}/{made.id}"
    response.headers["etag"] = etag(made)
    return _grant(made)


@more.get("/{id}")
async def get_grant(id: str, visit: Reads, response: Response) -> Grant:
    """What was granted, once."""
    found = await grants.get_grant(visit.engine, id)
    if not visit.reaches(found.user_id):
        raise NotFound(f"there is no grant {id!r}")
    response.headers["etag"] = etag(found)
    return _grant(found)


@more.delete("/{id}", status_code=204)
async def revoke_grant(id: str, visit: Writes) -> None:
    """What was used of it stays used."""
    async with visit.working() as desk:
        await grants.revoke_grant(desk, id)


async def _own(visit: Visit, scope: str | None) -> str | None:
    """A scope of the caller's: themselves, or a key of theirs by its id."""
    if scope is None:
        return visit.reach
    if scope.startswith("key:"):
        await keys.reached(visit, scope.removeprefix("key:"))
    else:
        await users.reached(visit, scope)
    return scope


def _shown(policy: Policy) -> Limits:
    amounts: dict[str, Any] = {name: policy.amounts.get(cell) for name, cell in CELLS.items()}
    return Limits(
        id=policy.id,
        scope=policy.scope,
        user_id=policy.user_id,
        key_id=policy.key_id,
        gateway=policy.gateway,
        model=policy.model,
        shadow=policy.shadow,
        updated_at=policy.updated_at,
        **amounts,
    )


def _grant(granted: Granted) -> Grant:
    return Grant(**asdict(granted))
