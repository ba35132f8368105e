"""`/admin/v1/usage` and `/admin/v1/audit`: what was, and what nobody changes."""

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query

from parallama.admin.cursors import USUAL, Cursor, Limit, Listing, listing, page
from parallama.admin.routes import users
from parallama.admin.shapes import Time, UsageRow, UsageSum, UsageSums
from parallama.admin.visit import Visit, needs
from parallama.db.manage import audit, usage
from parallama.db.manage.audit import Entry

router = APIRouter(prefix="/admin/v1", tags=["records"])

Reads = Annotated[Visit, needs("usage:read", own=True)]
User = Annotated[str | None, Query(description="Name or id, also of one who was deleted.")]
Since = Annotated[Time | None, Query(description="From then on.")]
Until = Annotated[Time | None, Query(description="Before then.")]


@router.get("/usage")
async def list_usage(
    visit: Reads,
    user: User = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = USUAL,
    cursor: Cursor = None,
) -> Listing[UsageRow]:
    """Finished requests, newest first."""
    here = page(cursor, limit, datetime, str)
    which = usage.Which(await _whose(visit, user), since, until)
    after = None if here.after is None else (here.after[0], here.after[1])
    rows = usage.rows(visit.engine, which, newest_first=True, after=after, limit=here.size)
    found = [row async for row in rows]
    shown = listing(found, here, lambda row: (row.timestamp, row.request_id))
    items = [UsageRow(**asdict(row)) for row in shown.items]
    return Listing(items=items, next_cursor=shown.next_cursor)


@router.get("/usage/summary")
async def sum_usage(
    visit: Reads,
    by: Annotated[
        list[Literal["user", "key", "gateway", "model", "day"]],
        Query(max_length=5, description="Several times for several. Days are UTC."),
    ] = ["user"],  # noqa: B006 - read only
    user: User = None,
    since: Since = None,
    until: Until = None,
) -> UsageSums:
    """Requests, tokens and cost added up."""
    which = usage.Which(await _whose(visit, user), since, until)
    sums = await usage.summary(visit.engine, which, list(dict.fromkeys(by)))
    return UsageSums(items=[UsageSum(**each) for each in sums])


@router.get("/audit")
async def list_audit(
    visit: Annotated[Visit, needs("audit:read")],
    actor: Annotated[str | None, Query(description="Name or id of who changed something.")] = None,
    subject: Annotated[str | None, Query(description="Name or id of what was changed.")] = None,
    action: Annotated[str | None, Query(description="`users.disable`, or all of `users`.")] = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = USUAL,
    cursor: Cursor = None,
) -> Listing[Entry]:
    """Who changed what, when, from where, before and after; newest first."""
    here = page(cursor, limit, int)
    which = audit.Which(actor, subject, action, since, until)
    after = here.after[0] if here.after else None
    entries = audit.entries(visit.engine, which, newest_first=True, after=after, limit=here.size)
    found = [entry async for entry in entries]
    return listing(found, here, lambda entry: (entry.id,))


async def _whose(visit: Visit, user: str | None) -> str | None:
    """Of who reaches only their own: themselves, by whatever name."""
    if visit.reach is None or user is None:
        return user if visit.reach is None else visit.reach
    return (await users.reached(visit, user)).id
