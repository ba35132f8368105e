"""Who changed what: the records that `Work.record` leaves."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from parallama.db.manage.engine import reading
from parallama.db.manage.tables import audit_log as table

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """One change. `before` and `after` are what was shown of it; None where there was nothing."""

    id: int
    at: datetime
    actor_id: str | None
    actor: str
    via: str
    address: str | None
    request_id: str | None
    action: str
    subject_id: str | None
    subject: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Which:
    """
    Entries of these alone. `action` is one, or its first word: `users`. Names and ids are exact.
    """

    actor: str | None = None
    subject: str | None = None
    action: str | None = None
    since: datetime | None = None
    until: datetime | None = None


async def entries(
    engine: AsyncEngine,
    which: Which,
    *,
    newest_first: bool = False,
    after: int | None = None,
    limit: int | None = None,
) -> AsyncIterator[Entry]:
    """
    In the order in which they were made, beyond the id `after`. Reads a page at a time, so that a
    slow reader holds up nobody.
    """
    while limit is None or limit > 0:
        page = await _page(engine, which, newest_first, after, min(limit or _PAGE, _PAGE))
        for entry in page:
            yield entry
        if len(page) < min(limit or _PAGE, _PAGE):
            return
        after = page[-1].id
        limit = None if limit is None else limit - len(page)


async def _page(
    engine: AsyncEngine, which: Which, newest_first: bool, after: int | None, size: int
) -> list[Entry]:
    query = select(table).limit(size)
    query = query.order_by(table.c.id.desc() if newest_first else table.c.id)
    if after is not None:
        query = query.where(table.c.id < after if newest_first else table.c.id > after)
    if which.actor is not None:
        query = query.where((table.c.actor == which.actor) | (table.c.actor_id == which.actor))
    if which.subject is not None:
        query = query.where(
            (table.c.subject == which.subject) | (table.c.subject_id == which.subject)
        )
    if which.action is not None:
        query = query.where(
            (table.c.action == which.action)
            | table.c.action.startswith(f"{which.action}.", autoescape=True)
        )
    if which.since is not None:
        query = query.where(table.c.at >= which.since)
    if which.until is not None:
        query = query.where(table.c.at < which.until)
    async with reading(engine) as connection:
        return [Entry(**row._mapping) for row in await connection.execute(query)]
