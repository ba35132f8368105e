"""`/admin/v1/users`."""

from collections.abc import Iterable
from typing import Annotated

from fastapi import APIRouter, Response

from parallama.admin.bounds import beyond, check_gives
from parallama.admin.cursors import USUAL, Cursor, Limit, Listing, listing, page
from parallama.admin.etags import etag
from parallama.admin.quota import quotas
from parallama.admin.shapes import NewPassword, NewUser, Quotas, RevokedToken, UserChange
from parallama.admin.visit import Visit, needs
from parallama.db.accounts import find_account
from parallama.db.manage import people, roles, sessions
from parallama.db.manage.people import User
from parallama.errors import NotFound
from parallama.roles import Permissions, permissions

router = APIRouter(prefix="/admin/v1/users", tags=["users"])
tokens = APIRouter(prefix="/admin/v1/tokens", tags=["users"])

Reads = Annotated[Visit, needs("users:read", own=True)]
Updates = Annotated[Visit, needs("users:update")]


@router.get("")
async def list_users(visit: Reads, limit: Limit = USUAL, cursor: Cursor = None) -> Listing[User]:
    """By name."""
    if visit.reach is not None:
        return Listing(items=[await people.get_user(visit.engine, visit.reach)])
    here = page(cursor, limit, str)
    found = await people.list_users(visit.engine, here)
    return listing(found, here, lambda user: (user.username,))


@router.post("", status_code=201)
async def create_user(
    given: NewUser, visit: Annotated[Visit, needs("users:create")], response: Response
) -> User:
    """Nobody gives a role that permits more than they may themselves."""
    granted = await permissions_of(visit, [given.role, *given.more_roles])
    check_gives(visit.permissions, granted, "these roles permit more")
    async with visit.working() as desk:
        user = await people.create_user(
            desk, given.username, given.role, more_roles=given.more_roles
        )
    response.headers["location"] = f"{router.prefix}/{user.id}"
    response.headers["etag"] = etag(user)
    return user


@router.get("/{user}")
async def get_user(user: str, visit: Reads, response: Response) -> User:
    """By name or id."""
    found = await reached(visit, user)
    response.headers["etag"] = etag(found)
    return found


@router.patch("/{user}")
async def update_user(user: str, given: UserChange, visit: Updates, response: Response) -> User:
    """Another name, other roles: none that permits more than the caller may."""
    changes = given.model_dump(exclude_unset=True)
    found = await people.get_user(visit.engine, user)
    wanted = [changes.get("role", found.role), *changes.get("more_roles", found.more_roles)]
    before = await permissions_of(visit, [found.role, *found.more_roles], strict=False)
    gained = beyond(before, await permissions_of(visit, wanted, strict=False))
    check_gives(visit.permissions, gained, "these roles permit more")
    async with visit.working() as desk:
        changed = await people.update_user(desk, found.id, **changes)
    response.headers["etag"] = etag(changed)
    return changed


@router.delete("/{user}", status_code=204)
async def delete_user(user: str, visit: Annotated[Visit, needs("users:delete")]) -> None:
    """With all credentials and limits. What was used stays on record."""
    async with visit.working() as desk:
        await people.delete_user(desk, user)


@router.post("/{user}/disable")
async def disable_user(user: str, visit: Updates, response: Response) -> User:
    """None of the user's credentials works any more, within a second."""
    async with visit.working() as desk:
        changed = await people.disable_user(desk, user)
    response.headers["etag"] = etag(changed)
    return changed


@router.post("/{user}/enable")
async def enable_user(user: str, visit: Updates, response: Response) -> User:
    """Not one who may do more than the caller."""
    check_gives(visit.permissions, await account_of(visit, user), "this user may do more")
    async with visit.working() as desk:
        changed = await people.enable_user(desk, user)
    response.headers["etag"] = etag(changed)
    return changed


@router.put("/{user}/password")
async def set_password(user: str, given: NewPassword, visit: Updates, response: Response) -> User:
    """Not of one who may do more than the caller. All sessions of the user end."""
    check_gives(visit.permissions, await account_of(visit, user), "this user may do more")
    settings = visit.office.config.authentication
    async with visit.working() as desk:
        changed = await people.set_password(desk, user, given.password, settings=settings)
    response.headers["etag"] = etag(changed)
    return changed


@router.post("/{user}/unlock")
async def unlock(user: str, visit: Updates) -> User:
    """Let the user log in at once, who has to wait for wrong passwords; none who may do more."""
    check_gives(visit.permissions, await account_of(visit, user), "this user may do more")
    async with visit.working() as desk:
        return await sessions.unlock(desk, user, visit.office.sessions.lockout)


@router.post("/{user}/log-out")
async def log_out(
    user: str, visit: Annotated[Visit, needs("tokens:revoke", own=True)], response: Response
) -> User:
    """End all sessions of the user. Keys stay good."""
    found = await reached(visit, user)
    async with visit.working() as desk:
        changed = await people.log_out(desk, found.id)
    response.headers["etag"] = etag(changed)
    return changed


@router.get("/{user}/quota")
async def get_quota(user: str, visit: Annotated[Visit, needs("limits:read", own=True)]) -> Quotas:
    """What is left of the user's limits, and when each starts again."""
    found = await reached(visit, user)
    return await quotas(visit.office, found.id)


@tokens.post("/revoke", status_code=204)
async def revoke_token(
    given: RevokedToken, visit: Annotated[Visit, needs("tokens:revoke")]
) -> None:
    """Refuse one access token, though it has not expired."""
    settings = visit.office.config.authentication
    async with visit.working() as desk:
        await sessions.revoke_token(desk, given.jti, settings, issuer=given.issuer)


async def reached(visit: Visit, user: str) -> User:
    """Somebody else looks like nobody to who may only see themselves."""
    found = await people.get_user(visit.engine, user)
    if not visit.reaches(found.id):
        raise NotFound(f"there is no user {user!r}")
    return found


async def account_of(visit: Visit, user: str) -> Permissions:
    """What a user may do."""
    found = await people.get_user(visit.engine, user)
    known = visit.office.config.known_roles
    account = await find_account(visit.office.store, found.id, roles=known)
    return frozenset() if account is None else account.permissions


async def permissions_of(visit: Visit, names: Iterable[str], *, strict: bool = True) -> Permissions:
    """What these roles permit together. Raises NotFound for one that there is not, if `strict`."""
    known = visit.office.config.known_roles
    granted: set[str] = set()
    for name in names:
        try:
            role = await roles.get_role(visit.engine, known, name)
        except NotFound:
            if strict:
                raise
            continue  # whoever changes somebody's roles is told so there
        granted |= permissions(role.permissions)
    return frozenset(granted)
