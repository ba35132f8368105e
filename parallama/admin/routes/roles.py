"""`/admin/v1/roles`."""

from typing import Annotated

from fastapi import APIRouter, Response

from parallama.admin.bounds import beyond, check_gives
from parallama.admin.cursors import USUAL, Cursor, Limit, Listing, listing, page
from parallama.admin.etags import etag
from parallama.admin.shapes import NewRole, RoleChange
from parallama.admin.visit import Visit, needs
from parallama.db.manage import roles
from parallama.db.manage.roles import NamedRole
from parallama.roles import permissions

router = APIRouter(prefix="/admin/v1/roles", tags=["roles"])

Reads = Annotated[Visit, needs("roles:read")]
Writes = Annotated[Visit, needs("roles:write")]


@router.get("")
async def list_roles(
    visit: Reads, limit: Limit = USUAL, cursor: Cursor = None
) -> Listing[NamedRole]:
    """By name: those that are built in, those of the configuration, and those made here."""
    here = page(cursor, limit, str)
    every = await roles.list_roles(visit.engine, visit.office.config.known_roles)
    after = here.after[0] if here.after else ""
    found = sorted((role for role in every if role.name > after), key=lambda role: role.name)
    return listing(found[: here.size], here, lambda role: (role.name,))


@router.post("", status_code=201)
async def create_role(given: NewRole, visit: Writes, response: Response) -> NamedRole:
    """It permits nothing that the caller may not do."""
    check_gives(visit.permissions, permissions(given.permissions), "this role permits more")
    async with visit.working() as desk:
        role = await roles.create_role(
            desk, given.name, given.permissions, description=given.description
        )
    response.headers["location"] = f"{router.prefix}/{role.name}"
    response.headers["etag"] = etag(role)
    return role


@router.get("/{role}")
async def get_role(role: str, visit: Reads, response: Response) -> NamedRole:
    """By name."""
    found = await roles.get_role(visit.engine, visit.office.config.known_roles, role)
    response.headers["etag"] = etag(found)
    return found


@router.patch("/{role}")
async def update_role(role: str, given: RoleChange, visit: Writes, response: Response) -> NamedRole:
    """For all of its users, within a second. It gains nothing that the caller may not do."""
    found = await roles.get_role(visit.engine, visit.office.config.known_roles, role)
    changes = given.model_dump(exclude_unset=True)
    granted = changes.pop("permissions", None)
    gained = beyond(permissions(found.permissions), permissions(granted or ()))
    check_gives(visit.permissions, gained, "this role permits more")
    async with visit.working() as desk:
        changed = await roles.update_role(desk, role, granted=granted, **changes)
    response.headers["etag"] = etag(changed)
    return changed


@router.delete("/{role}", status_code=204)
async def delete_role(role: str, visit: Writes) -> None:
    """Only one that nobody has any more."""
    async with visit.working() as desk:
        await roles.delete_role(desk, role)
