"""Sessions: from a log-in, over refresh tokens that are used once each, to their end."""

import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import uuid4

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from parallama import keys, passwords, tokens
from parallama.config import Authentication
from parallama.db import names
from parallama.db.manage import people
from parallama.db.manage.engine import insert_or, reading
from parallama.db.manage.tables import refresh_tokens as table
from parallama.db.manage.tables import revoked_tokens, users
from parallama.desk import Desk, Work
from parallama.errors import ParallamaError, Unavailable, UsageError
from parallama.lockout import Lockout
from parallama.signing import KeyFolder, Keys

log = logging.getLogger(__name__)

# For how long a token of another issuer stays revoked: we do not know when it expires.
_OTHERS_LIFE = timedelta(days=30)
_LONGEST_JTI = 255


class Refused(ParallamaError):
    """This password, or this refresh token, is not accepted. Nobody is told why."""


@dataclass(frozen=True, slots=True)
class Session:
    """What a client gets. The tokens are shown once; lives are in seconds."""

    user_id: str
    username: str
    access_token: str = field(repr=False)
    expires_in: int
    refresh_token: str = field(repr=False)
    refresh_expires_in: int


class Sessions:
    """Begins, continues and ends them. Raises Refused, Locked, Unavailable, ConfigError."""

    def __init__(
        self,
        settings: Authentication,
        *,
        signing: KeyFolder,
        lockout: Lockout,
        checker: passwords.Checker,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._settings = settings
        self._signing = signing
        self.lockout = lockout
        self._checker = checker
        self._random_bytes = random_bytes

    async def login(self, desk: Desk, username: str, password: str, *, address: str) -> Session:
        """`address` is the client's. Where the user does not exist it takes as long."""
        signing_keys = self._signing.keys()
        rounds = self._settings.password_hash_rounds
        async with self._checker.place():
            known = await self._recognise(desk.engine, username, password, address)
            stored, fresh = known.password_hash, None
            if passwords.cost_of(stored) != rounds:
                fresh = await self._checker.run(partial(passwords.hash, password, rounds=rounds))
        desk = replace(desk, by=replace(desk.by, name=known.username, id=known.id))
        async with desk.writing() as work:
            user = await _locked(work, known.id)
            if user is None or user.disabled_at is not None or user.password_hash != stored:
                raise _refused()  # since a moment ago
            if fresh is not None:
                query = update(users).where(users.c.id == user.id).values(password_hash=fresh)
                await work.connection.execute(query)
            family = str(uuid4())
            made = await self._add(work, user, family=family)
            await work.record(
                "sessions.create", user.username, id=user.id, after={"session": family}
            )
        return self._session(desk, signing_keys, user, made)

    async def refresh(self, desk: Desk, token: str) -> Session:
        """
        Another pair of tokens. This one is used up, but for `refresh_grace_seconds`; who uses it
        later is not the one who got its successor, or that one is not: the session ends.
        """
        signing_keys = self._signing.keys()
        found = await _find(desk.engine, token)
        if found is None:
            raise _refused()
        grace = timedelta(seconds=self._settings.refresh_grace_seconds)
        made = None
        async with desk.writing() as work:
            # All uses of one user's tokens wait for each other here.
            user = await _locked(work, found.user_id)
            at = await _row(work, found.id)
            if user is None or at is None or user.disabled_at is not None:
                raise _refused()
            if at.revoked_at is not None or desk.now >= at.expires_at:
                raise _refused()
            live = None if at.replaced_by is None else await _row(work, at.replaced_by)
            if at.replaced_at is None:
                made = await self._add(work, user, family=at.family_id)
                await _replace(work, at.id, made, at=desk.now)
            elif (
                live is not None and live.replaced_at is None and desk.now < at.replaced_at + grace
            ):
                # What the first use gave is good no longer than this one would have been.
                made = await self._add(work, user, family=at.family_id)
                await _replace(work, live.id, made, at=at.replaced_at)
                query = update(table).where(table.c.replaced_by == live.id)
                await work.connection.execute(query.values(replaced_by=made.id))
            else:
                await _end(desk, work, at.family_id, user.id, self._settings)
                await work.record(
                    "sessions.replay", user.username, id=user.id, before={"session": at.family_id}
                )
        if made is None:
            log.warning("refresh token used twice, session ended", extra={"user": user.username})
            raise _refused()
        return self._session(desk, signing_keys, user, made)

    async def logout(self, desk: Desk, token: str) -> None:
        """End the session of a refresh token, used or not. What is no token has none."""
        found = await _find(desk.engine, token)
        if found is not None:
            await end_session(desk, found.id, self._settings)

    async def change_password(
        self, desk: Desk, who: str, *, current: str, new: str, address: str
    ) -> people.User:
        """By the user, who knows the current one. It ends all of the user's sessions."""
        user = await people.get_user(desk.engine, who)
        async with self._checker.place():
            await self._recognise(desk.engine, user.username, current, address)
        return await people.set_password(desk, user.id, new, settings=self._settings)

    async def _recognise(
        self, engine: AsyncEngine, username: str, password: str, address: str
    ) -> Any:
        """The user's row. Only with a place at the checker."""
        attempt = await self.lockout.attempt(username, address)
        try:
            known = await _by_name(engine, username)
            stored = None if known is None else known.password_hash
            check = partial(
                passwords.verify, password, stored, rounds=self._settings.password_hash_rounds
            )
            good = await self._checker.run(check)
        except Unavailable:
            await self.lockout.void(attempt)
            raise
        if known is None or not good or known.disabled_at is not None:
            # Not the name that was typed: it may be a password.
            who = None if known is None else known.username
            log.info("log-in refused", extra={"user": who, "address": address})
            raise _refused()
        await self.lockout.succeeded(attempt)
        return known

    async def _add(self, work: Work, user: Any, *, family: str) -> "_Made":
        """A refresh token. Its id is also the `jti` of the access token that comes with it."""
        made = _Made(str(uuid4()), keys.mint_refresh(self._random_bytes))
        life = timedelta(days=self._settings.refresh_token_expire_days)
        query = insert(table).values(
            id=made.id,
            user_id=user.id,
            family_id=family,
            public_id=made.minted.public_id,
            token_hash=made.minted.secret_hash,
            issued_at=work.now,
            expires_at=work.now + life,
        )
        await work.connection.execute(query)
        return made

    def _session(self, desk: Desk, signing_keys: Keys, user: Any, made: "_Made") -> Session:
        since = user.tokens_valid_from
        access = tokens.issue(
            signing_keys,
            user_id=user.id,
            jti=made.id,
            now=desk.now.timestamp(),
            settings=self._settings,
            valid_from=None if since is None else since.timestamp(),
        )
        return Session(
            user_id=user.id,
            username=user.username,
            access_token=access,
            expires_in=self._settings.access_token_expire_minutes * 60,
            refresh_token=made.minted.token,
            refresh_expires_in=self._settings.refresh_token_expire_days * 86_400,
        )


@dataclass(frozen=True, slots=True)
class _Made:
    id: str
    minted: keys.Minted


async def end_session(desk: Desk, jti: str, settings: Authentication) -> None:
    """End the session to which an access token of ours belongs, for good."""
    if not names.looks_like_id(jti):
        return
    async with desk.writing() as work:
        query = select(table.c.user_id).where(table.c.id == jti.lower())
        user_id = (await work.connection.execute(query)).scalar_one_or_none()
        user = None if user_id is None else await _locked(work, user_id)
        at = await _row(work, jti.lower())
        if user is None or at is None:
            return
        await _end(desk, work, at.family_id, user.id, settings)
        await work.record(
            "sessions.end", user.username, id=user.id, before={"session": at.family_id}
        )


async def unlock(desk: Desk, who: str, lockout: Lockout) -> people.User:
    """
    Let a user try to log in again at once, who has to wait for wrong passwords. Addresses wait on.
    """
    async with desk.writing() as work:
        user = await people.find_user(work.connection, who)
        await work.record("users.unlock", user.username, id=user.id, before=user, after=user)
        await lockout.unlock(user.username)  # where that cannot be done nothing is recorded
    return user


async def revoke_token(
    desk: Desk, jti: str, settings: Authentication, *, issuer: str | None = None
) -> None:
    """Refuse this one access token, though it has not expired. `issuer` None: one of ours."""
    if not 1 <= len(jti) <= _LONGEST_JTI or not jti.isprintable():
        raise UsageError(f"an id of a token (jti) has 1 to {_LONGEST_JTI} visible characters")
    life = _OTHERS_LIFE if issuer is not None else _life(settings)
    async with desk.writing() as work:
        user_id = None
        if issuer is None and names.looks_like_id(jti):
            query = select(table.c.user_id).where(table.c.id == jti.lower())
            found = (await work.connection.execute(query)).scalar_one_or_none()
            user = None if found is None else await _locked(work, found)
            user_id = None if user is None else user.id
        await _refuse(desk, work, jti, issuer or settings.token_issuer, user_id, work.now + life)
        await work.record("tokens.revoke", jti, id=user_id, after={"issuer": issuer})
        work.changed("token", jti)


def _refused() -> Refused:
    return Refused("not accepted: log in with your name and password")


def _life(settings: Authentication) -> timedelta:
    """Of an access token, at most."""
    return timedelta(
        minutes=settings.access_token_expire_minutes, seconds=settings.clock_skew_seconds
    )


async def _by_name(engine: AsyncEngine, username: str) -> Any:
    try:
        name = names.check_username(username)
    except UsageError:
        return None  # nobody can be called that
    query = select(*users.c["id", "username", "password_hash", "disabled_at"])
    async with reading(engine) as connection:
        return (await connection.execute(query.where(users.c.username == name))).first()


async def _find(engine: AsyncEngine, token: str) -> Any:
    """Id and user of a refresh token; None where it is none of ours."""
    parsed = keys.parse(token, keys.REFRESH_PREFIX)
    if parsed is None:
        return None
    query = select(*table.c["id", "user_id", "token_hash"])
    async with reading(engine) as connection:
        query = query.where(table.c.public_id == parsed.public_id)
        found = (await connection.execute(query)).first()
    if found is None or not hmac.compare_digest(found.token_hash, keys.digest(token).hex()):
        return None
    return found


async def _locked(work: Work, user_id: str) -> Any:
    """The user's row, which nobody else changes until the end of this transaction."""
    query = select(
        *users.c["id", "username", "password_hash", "disabled_at", "tokens_valid_from"]
    ).where(users.c.id == user_id)
    return (await work.connection.execute(query.with_for_update(key_share=True))).first()


async def _row(work: Work, id: str) -> Any:
    return (await work.connection.execute(select(table).where(table.c.id == id))).first()


async def _replace(work: Work, id: str, by: _Made, *, at: datetime) -> None:
    query = update(table).where(table.c.id == id).values(replaced_by=by.id, replaced_at=at)
    await work.connection.execute(query)


async def _end(desk: Desk, work: Work, family: str, user_id: str, settings: Authentication) -> None:
    """All of its refresh tokens, and the access tokens that came with them."""
    of_family = table.c.family_id == family
    query = update(table).where(of_family, table.c.revoked_at.is_(None))
    await work.connection.execute(query.values(revoked_at=work.now))
    life = _life(settings)
    recent = select(table.c.id, table.c.issued_at).where(
        of_family, table.c.issued_at > work.now - life
    )
    for row in (await work.connection.execute(recent)).all():
        await _refuse(desk, work, row.id, settings.token_issuer, user_id, row.issued_at + life)
    work.changed("user", user_id)


async def _refuse(
    desk: Desk, work: Work, jti: str, issuer: str, user_id: str | None, until: datetime
) -> None:
    query = insert_or(desk.engine, revoked_tokens).values(
        jti=jti, issuer=issuer, user_id=user_id, revoked_at=work.now, expires_at=until
    )
    await work.connection.execute(query.on_conflict_do_nothing())
