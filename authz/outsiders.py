"""Users whom another issuer of tokens knows: who they are here, and what their tokens permit."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from authz import jws
from parallama.clock import Clock
from parallama.config import Issuer
from parallama.db import accounts, names
from parallama.db.accounts import Holder
from parallama.db.store import Store
from parallama.errors import UsageError
from parallama.roles import Permissions

log = logging.getLogger(__name__)


def roles_of(settings: Issuer, claims: Mapping[str, Any]) -> tuple[str, ...]:
    """
    The roles that a token says, in the order of the configuration; none where it names none of them
    and there is no role for such tokens.
    """
    said = set(_values(claims, settings.role_claim)) if settings.role_claim else set()
    found = tuple(dict.fromkeys(role for value, role in settings.roles.items() if value in said))
    if not found and settings.default_role is not None:
        return (settings.default_role,)
    return found


class Outsiders:
    """Those of one issuer. Who is here for the first time becomes a user, if that is wanted."""

    def __init__(
        self, settings: Issuer, store: Store, *, roles: Mapping[str, Permissions], clock: Clock
    ) -> None:
        self._settings = settings
        self._store = store
        self._roles = roles
        self._clock = clock

    async def find(self, subject: str, claims: Mapping[str, Any]) -> Holder | None:
        """None for somebody whom nobody let in. Raises Unavailable."""
        given = roles_of(self._settings, claims)
        if not given:
            return None
        user_id = await self._find(subject)
        if user_id is None and self._settings.create_users:
            await self._create(subject, claims, given)
            user_id = await self._find(subject)
        if user_id is None:
            return None
        holder = await accounts.find_holder(
            self._store, user_id, self._settings.issuer, roles=self._roles
        )
        if holder is None or self._settings.role_claim is None:
            return holder
        return replace(
            holder, scopes=await accounts.granted_by(self._store, given, roles=self._roles)
        )

    async def _find(self, subject: str) -> str | None:
        return await accounts.find_identity(self._store, self._settings.issuer, subject)

    async def _create(
        self, subject: str, claims: Mapping[str, Any], given: tuple[str, ...]
    ) -> None:
        """A user of that name who is here already is somebody else, as far as we know."""
        issuer = self._settings.issuer
        try:
            username = names.check_username(jws.text_claim(claims, self._settings.user_claim) or "")
        except UsageError:
            log.warning("user not created", extra={"issuer": issuer, "cause": "no fitting name"})
            return
        now = datetime.fromtimestamp(self._clock(), UTC)
        made = await accounts.add_identity(self._store, issuer, subject, username, given, now)
        if made:
            log.info("user created", extra={"issuer": issuer, "user": username})
        elif await self._find(subject) is None:
            log.warning("user not created", extra={"issuer": issuer, "cause": "the name is taken"})


def _values(claims: Mapping[str, Any], name: str) -> list[str]:
    """Of a claim, by its name or by a path of names with dots between them."""
    found: Any = claims.get(name)
    if found is None:
        found = claims
        for step in name.split("."):
            found = found.get(step) if isinstance(found, Mapping) else None
    if isinstance(found, str):
        return found.split()
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []
