"""Who users are for other issuers of tokens: linked, shown, unlinked."""

from dataclasses import dataclass
from datetime import datetime
from uuid import uuid4

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from parallama.db.manage.engine import reading
from parallama.db.manage.people import find_user
from parallama.db.manage.tables import identities, users
from parallama.desk import Desk
from parallama.errors import Conflict, NotFound, UsageError

_LONGEST = 255


@dataclass(frozen=True, slots=True)
class Identity:
    """`subject` is who the user is (`sub`) in the tokens of `issuer` (`iss`)."""

    issuer: str
    subject: str
    user_id: str
    username: str
    created_at: datetime


_IDENTITIES = select(
    *identities.c["issuer", "subject", "user_id", "created_at"], users.c.username
).join(users, users.c.id == identities.c.user_id)


async def link(desk: Desk, who: str, *, issuer: str, subject: str) -> Identity:
    """Raises Conflict where that is somebody already."""
    for value in (issuer, subject):
        if not 1 <= len(value) <= _LONGEST or not value.isprintable():
            raise UsageError(f"an issuer and a subject have 1 to {_LONGEST} visible characters")
    async with desk.writing() as work:
        user = await find_user(work.connection, who)
        found = Identity(issuer, subject, user.id, user.username, desk.now)
        query = insert(identities).values(
            id=str(uuid4()),
            user_id=user.id,
            issuer=issuer,
            subject=subject,
            created_at=desk.now,
        )
        try:
            await work.connection.execute(query)
        except IntegrityError as error:
            raise Conflict(f"{subject!r} at {issuer} is a user already: unlink it first") from error
        await work.record("users.link", user.username, id=user.id, after=found)
        work.changed("user", user.id)
    return found


async def unlink(desk: Desk, *, issuer: str, subject: str) -> Identity:
    """Tokens of it are refused from now on. Raises NotFound."""
    which = (identities.c.issuer == issuer) & (identities.c.subject == subject)
    async with desk.writing() as work:
        row = (await work.connection.execute(_IDENTITIES.where(which))).first()
        if row is None:
            raise NotFound(f"nobody here is {subject!r} at {issuer}")
        found = Identity(**row._mapping)
        await work.connection.execute(delete(identities).where(which))
        await work.record("users.unlink", found.username, id=found.user_id, before=found)
        work.changed("user", found.user_id)
    return found


async def list_identities(engine: AsyncEngine, who: str | None = None) -> list[Identity]:
    """All, or those of one user by name or id."""
    async with reading(engine) as connection:
        query = _IDENTITIES.order_by(users.c.username, identities.c.issuer, identities.c.subject)
        if who is not None:
            query = query.where(users.c.id == (await find_user(connection, who)).id)
        return [Identity(**row._mapping) for row in await connection.execute(query)]
