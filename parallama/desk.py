"""Where changes are made: who makes them, the record of them, and what the services must hear."""

import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from parallama.errors import Stale
from parallama.roles import BUILT_IN, Permissions

# Loaded late: a command that only prints its help needs none of them.
if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from parallama.changes import Change, Kind

_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True)
class Actor:
    """
    Who changes something.

    `via` is `cli`, `api`, or `gateway` for what a service does by itself. `id` is that of a user.
    """

    name: str
    via: str
    id: str | None = None
    address: str | None = None
    request_id: str | None = None


@dataclass(kw_only=True)
class Desk:
    """
    One piece of work of one actor at one time.

    `roles` are those that are there without the database. `changes` is what the services have to be
    told once it is done: see `parallama.changes`.

    `expected` says whether something is still as the actor saw it; else changing it raises Stale.
    Where `keeps_an_admin`, taking the last one away raises Conflict.
    """

    engine: "AsyncEngine"
    now: datetime
    by: Actor
    roles: Mapping[str, Permissions] = field(default_factory=lambda: BUILT_IN)
    changes: list["Change"] = field(default_factory=list)
    expected: Callable[[Any], bool] | None = None
    keeps_an_admin: bool = False

    @asynccontextmanager
    async def writing(self) -> AsyncIterator["Work"]:
        """A transaction with its audit records: both are committed, or neither is."""
        from parallama.db.manage.engine import writing

        async with writing(self.engine, alone=self.expected is not None) as connection:
            work = Work(connection, self)
            yield work
        self.changes += work.changes


class Work:
    """An open transaction."""

    def __init__(self, connection: "AsyncConnection", desk: Desk) -> None:
        self.connection = connection
        self.now = desk.now
        self.changes: list[Change] = []
        self._desk = desk

    def changed(self, kind: "Kind", id: str = "") -> None:
        """The services shall forget what they know of it."""
        from parallama.changes import Change

        self.changes.append(Change(kind, id))

    async def record(
        self,
        action: str,
        subject: str,
        *,
        id: str | None = None,
        before: object = None,
        after: object = None,
    ) -> None:
        """
        Note for ever that this was done, such as `users.disable`, to whom or what.

        `before` and `after` are what is shown of it to people (dataclasses or mappings): never a
        secret, nor a hash of one.
        """
        from sqlalchemy import insert

        from parallama.db.manage.tables import audit_log

        expected = self._desk.expected
        if expected is not None and (before is None or not expected(before)):
            raise Stale("it is not what it was when you looked: look again")
        by = self._desk.by
        query = insert(audit_log).values(
            at=self.now,
            actor_id=by.id,
            actor=by.name[:_LONGEST_NAME],
            via=by.via,
            address=by.address,
            request_id=by.request_id,
            action=action,
            subject_id=id,
            subject=subject[:_LONGEST_NAME],
            before=None if before is None else plain(before),
            after=None if after is None else plain(after),
        )
        await self.connection.execute(query)


def plain(value: Any) -> Any:
    """As JSON says it: times in ISO 8601, money in digits."""
    if dataclasses.is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_name(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal) else value


def _name(key: Any) -> str:
    """Of a limit, which is known by a unit and a window."""
    return "_per_".join(key) if isinstance(key, tuple) else str(key)
