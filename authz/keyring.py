"""Whose key or token is this? What was verified once is remembered by its digest."""

import asyncio
from collections.abc import Awaitable, Callable

from authz import jws
from authz.bearers import Bearers
from authz.decide import UNKNOWN_KEY, Deny
from parallama import keys
from parallama.cache import Cache
from parallama.changes import Change
from parallama.db.accounts import Credential, KeyRecord, TokenRecord

# Checked where there is no such key, so that an unknown id takes as long as a wrong secret.
_NOBODY = keys.hash_secret("nobody", 4)


class Keyring:
    """
    Finds what stands behind an API key or a signed token, and makes sure that it is genuine.

    What was verified is remembered by the digest of all of it, until a change signal names it or
    its user; without the signal nothing is remembered.
    """

    def __init__(
        self,
        find_key: Callable[[str], Awaitable[KeyRecord | None]],
        bearers: Bearers,
        *,
        size: int,
    ) -> None:
        self._find_key = find_key
        self._bearers = bearers
        self._cache: Cache[bytes, Credential] = Cache(size=size)

    def at_once(self, token: str) -> Credential | Deny | None:
        """None where somebody else has to be asked."""
        digest = keys.digest(token)
        known = self._cache.peek(digest)
        if known is not None:
            return known
        if not jws.looks_like_one(token):
            return None if keys.parse(token) else UNKNOWN_KEY
        found = self._bearers.at_once(token)
        if isinstance(found, Credential):
            self._cache.put(digest, found)
        return found

    async def find(self, token: str) -> Credential | Deny:
        """Raises Unavailable."""
        if jws.looks_like_one(token):
            return await self._bearers.find(token)
        parsed = keys.parse(token)
        if parsed is None:
            return UNKNOWN_KEY

        async def check() -> KeyRecord | None:
            record = await self._find_key(parsed.public_id)
            known = record.secret_hash if record else _NOBODY
            right = await asyncio.to_thread(keys.verify, parsed.secret, known)
            return record if right else None

        return await self._cache.get(keys.digest(token), check) or UNKNOWN_KEY

    def on_change(self, change: Change) -> None:
        self._bearers.on_change(change)
        match change.kind:
            case "key" | "token":
                self._cache.forget(lambda _, record: record.id == change.id)
            case "user":
                self._cache.forget(lambda _, record: record.account.id == change.id)
            case "everything":
                self.forget_all()

    def forget_all(self) -> None:
        self._cache.forget_all()

    def forget_tokens_of(self, issuer: str) -> None:
        """One of its keys is gone: what was verified with it has to be verified again."""
        self._cache.forget(
            lambda _, record: isinstance(record, TokenRecord) and record.issuer == issuer
        )

    def pause(self) -> None:
        self._bearers.pause()
        self._cache.pause()

    def resume(self) -> None:
        self._bearers.resume()
        self._cache.resume()
