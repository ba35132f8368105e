"""One call: who makes it, what it needs, and the desk at which it changes things."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from fastapi import Depends, Request
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from sqlalchemy.ext.asyncio import AsyncEngine

from parallama import identity
from parallama.admin.etags import matches
from parallama.admin.problems import Refused, forbidden
from parallama.changes import Change, publish
from parallama.config import Config
from parallama.counters import Counters
from parallama.db import Store
from parallama.db.manage.sessions import Sessions
from parallama.desk import Actor, Desk
from parallama.errors import ParallamaError, Unavailable
from parallama.resp import Redis, RedisError
from parallama.roles import OWN, Permissions, permissions, permits
from parallama.signing import KeyFolder

log = logging.getLogger(__name__)

_LONGEST_ADDRESS = 64
_LONGEST_ID = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Office:
    """What all calls work with. `now` has its zone."""

    config: Config
    engine: AsyncEngine
    store: Store
    redis: Redis
    counters: Counters
    sessions: Sessions
    signing: KeyFolder
    now: Callable[[], datetime]
    random_bytes: Callable[[int], bytes]

    async def tell(self, changes: Sequence[Change]) -> None:
        """The services. Where they cannot be told they know that, and trust no memory of theirs."""
        try:
            for change in changes:
                await publish(self.redis, change)
        except (RedisError, OSError, ParallamaError) as error:
            log.warning("stored, services not told", extra={"cause": str(error)})

    @asynccontextmanager
    async def working(self, desk: Desk) -> AsyncIterator[Desk]:
        """Tells the services what was changed at the desk, before anybody else hears of it."""
        try:
            yield desk
        except (asyncio.CancelledError, Unavailable):
            desk.changes.append(Change("everything"))  # it may have been committed all the same
            raise
        finally:
            if desk.changes:
                await self.tell(desk.changes)

    @asynccontextmanager
    async def desk_for_strangers(self, request: Request) -> AsyncIterator[Desk]:
        """For those who have yet to prove who they are."""
        by = Actor("nobody", "api", None, address_of(request), request_id_of(request))
        roles = self.config.known_roles
        desk = Desk(engine=self.engine, now=self.now(), by=by, roles=roles)
        async with self.working(desk):
            yield desk


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """
    A call of somebody known. `permissions` are what account and credential both permit.

    `reach` is None where everybody's things are meant, else the id of the caller, whose own alone
    are.
    """

    office: Office
    user_id: str
    username: str
    permissions: Permissions
    credential: str
    address: str | None
    request_id: str | None
    if_match: str | None
    reach: str | None = None

    @property
    def engine(self) -> AsyncEngine:
        return self.office.engine

    @property
    def key_id(self) -> str | None:
        """That of the API key that the caller came with."""
        return self._id_of(identity.KEY)

    @property
    def token_id(self) -> str | None:
        """That (`jti`) of the access token of ours that the caller came with."""
        return self._id_of(identity.TOKEN)

    @property
    def outside_token(self) -> bool:
        """Whether the caller came with a token of another issuer."""
        return self._id_of(identity.OUTSIDE) is not None

    def _id_of(self, kind: str) -> str | None:
        came_with, _, id = self.credential.partition(":")
        return id if came_with == kind else None

    def reaches(self, user_id: str | None) -> bool:
        """Whether things of this user are meant."""
        return self.reach is None or self.reach == user_id

    @asynccontextmanager
    async def working(self) -> AsyncIterator[Desk]:
        """A desk; the services are told what was changed at it before the caller is."""
        if_match = self.if_match
        desk = Desk(
            engine=self.engine,
            now=self.office.now(),
            by=Actor(self.username, "api", self.user_id, self.address, self.request_id),
            roles=self.office.config.known_roles,
            expected=None if if_match is None else lambda before: matches(if_match, before),
            keeps_an_admin=True,
        )
        async with self.office.working(desk):
            yield desk


class Open:
    """Marks an endpoint that anybody may call, whoever they are; headers about them say nothing."""

    async def __call__(self, request: Request) -> None:
        _check_query(request)


class Known:
    """For an endpoint about the caller alone, which needs no permission: whoever is let in."""

    async def __call__(self, request: Request) -> Visit:
        _check_query(request)
        visit = _visit(request)
        return replace(visit, reach=visit.user_id)


class Needs:
    """
    What an endpoint asks of its caller; gives the visit.

    With `own` it is enough to have the permission for what belongs to oneself: `reach` says so.
    """

    def __init__(self, permission: str, *, own: bool) -> None:
        (self.permission,) = permissions([permission])
        self.own = own
        self._resource, _, self._action = permission.partition(":")

    async def __call__(self, request: Request) -> Visit:
        visit = _visit(request)
        _check_query(request)
        if permits(visit.permissions, self._resource, self._action):
            return visit
        if self.own and permits(visit.permissions, self._resource, self._action, OWN):
            return replace(visit, reach=visit.user_id)
        raise forbidden(f"You may not do this: it needs the permission {self.permission}.")


def needs(permission: str, *, own: bool = False) -> Any:
    return Depends(Needs(permission, own=own))


def _check_query(request: Request) -> None:
    """What nobody reads is a mistake: a misspelt filter would show everything."""
    known = _query_names(request.scope["route"].dependant)
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        raise RequestValidationError(
            [{"type": "extra_forbidden", "loc": ("query", name)} for name in unknown]
        )


def _query_names(dependant: Dependant) -> set[str]:
    names = {field.alias for field in dependant.query_params}
    return names.union(*(_query_names(each) for each in dependant.dependencies))


def office_of(request: Request) -> Office:
    office: Office = request.app.state.office
    return office


def address_of(request: Request) -> str | None:
    """The client's, as Envoy says it."""
    return (request.headers.get(identity.ADDRESS) or "")[:_LONGEST_ADDRESS] or None


def request_id_of(request: Request) -> str | None:
    """Envoy's own."""
    return (request.headers.get("x-request-id") or "")[:_LONGEST_ID] or None


def _visit(request: Request) -> Visit:
    told = request.headers
    user = told.get(identity.USER)
    if not user:  # Envoy lets nobody come so far without
        raise Refused(401, "invalid_api_key", "Nobody said who you are: call through the gateway.")
    return Visit(
        office=office_of(request),
        user_id=user,
        username=identity.username(told.get(identity.USERNAME, "")),
        permissions=frozenset(told.get(identity.PERMISSIONS, "").split()),
        credential=told.get(identity.CREDENTIAL, ""),
        address=address_of(request),
        request_id=request_id_of(request),
        if_match=told.get("if-match"),
    )
