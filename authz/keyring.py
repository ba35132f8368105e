"""Which key is this token? The database knows; verified tokens are remembered by their digest."""

import asyncio
from collections.abc import Awaitable, Callable

from parallama import keys
from parallama.cache import Cache
from parallama.changes import Change
from parallama.db.accounts import KeyRecord

# Checked where there is no such key, so that an unknown id takes as long as a wrong secret.
_NOBODY = keys.hash_secret("nobody", 4)


class Keyring:
    """
    Finds the key behind a token and checks its secret.

    A token that was verified is remembered by the digest of all of it, until a change signal
    names its key or its user; without the signal nothing is remembered.
    """

    def __init__(self, find_key: Callable[[str], Awaitable[KeyRecord | None]], *, size: int):
        self._find_key = find_key
        self._cache: Cache[bytes, KeyRecord] = Cache(size=size)

    def peek(self, token: str) -> KeyRecord | None:
        """The key of a token that was verified before; needs no store."""
        return self._cache.peek(keys.digest(token))

    async def find(self, token: str) -> KeyRecord | None:
        """None for a token that is malformed, unknown or wrong. Raises Unavailable."""
        parsed = keys.parse(token)
        if parsed is None:
            return None

        async def check() -> KeyRecord | None:
            record = await self._find_key(parsed.public_id)
            known = record.secret_hash if record else _NOBODY
            right = await asyncio.to_thread(keys.verify, parsed.secret, known)
            return record if right else None

        return await self._cache.get(keys.digest(token), check)

    def on_change(self, change: Change) -> None:
        match change.kind:
            case "key":
                self._cache.forget(lambda _, record: record.id == change.id)
            case "user":
                self._cache.forget(lambda _, record: record.user_id == change.id)
            case "limits" | "prices":
                pass
            case "everything":
                self.forget_all()

    def forget_all(self) -> None:
        self._cache.forget_all()

    def pause(self) -> None:
        self._cache.pause()

    def resume(self) -> None:
        self._cache.resume()
