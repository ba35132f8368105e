"""Which limits does this user have? The database knows; what it said is remembered."""

from collections.abc import Awaitable, Callable

from parallama.cache import Cache
from parallama.changes import Change
from parallama.limits import Limit


class Policies:
    """Limits by user id, remembered until a change signal names the user or means many."""

    def __init__(self, load: Callable[[str], Awaitable[tuple[Limit, ...]]], *, size: int) -> None:
        self._load = load
        self._cache: Cache[str, tuple[Limit, ...]] = Cache(size=size)

    def peek(self, user: str) -> tuple[Limit, ...] | None:
        """What is remembered of the user; None where the database has to be asked."""
        return self._cache.peek(user)

    async def limits_of(self, user: str) -> tuple[Limit, ...]:
        """Raises Unavailable."""
        return await self._cache.get(user, lambda: self._load(user)) or ()

    def on_change(self, change: Change) -> None:
        match change.kind:
            case "user" | "limits" if change.id:
                self._cache.forget(lambda user, _: user == change.id)
            case "key":
                pass
            case _:
                self._cache.forget_all()

    def pause(self) -> None:
        self._cache.pause()

    def resume(self) -> None:
        self._cache.resume()
