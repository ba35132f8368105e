"""Which limits and grants does this user have? The database knows; what it said is remembered."""

from collections.abc import Awaitable, Callable
from functools import lru_cache

from parallama.cache import Cache
from parallama.changes import Change
from parallama.db.policies import Policy

NOTHING = Policy((), ())


@lru_cache(maxsize=4096)
def _shared(policy: Policy) -> Policy:
    """One for all who have the same, as most do: what a user costs is then 180 bytes, not 460."""
    return policy


class Policies:
    """By user id, remembered until a change signal names the user or means many."""

    def __init__(self, load: Callable[[str], Awaitable[Policy]], *, size: int) -> None:
        self._load = load
        self._cache: Cache[str, Policy] = Cache(size=size)

    def known(self, user: str) -> Policy | None:
        """What is remembered; None where the database has to be asked."""
        return self._cache.peek(user)

    async def policy_of(self, user: str) -> Policy:
        """Raises Unavailable."""
        return await self._cache.get(user, lambda: self._read(user)) or NOTHING

    def on_change(self, change: Change) -> None:
        match change.kind:
            case "user" | "limits" if change.id:
                self._cache.forget_one(change.id)
            case "key" | "prices":
                pass
            case _:
                self._cache.forget_all()

    def pause(self) -> None:
        self._cache.pause()

    def resume(self) -> None:
        self._cache.resume()

    async def _read(self, user: str) -> Policy:
        return _shared(await self._load(user))
