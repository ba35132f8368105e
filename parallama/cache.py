"""A bounded memory of what a store said, that never outlives a change signal."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Cache(Generic[K, V]):
    """
    Remembers the `size` values used last. Who asks for what is being loaded shares that load.

    What was being loaded while something was forgotten is used once and not remembered: it may
    have been read before the change. While `paused`, nothing is remembered at all.
    """

    def __init__(self, *, size: int) -> None:
        self._size = size
        self._known: OrderedDict[K, V] = OrderedDict()
        self._loading: dict[tuple[int, K], asyncio.Future[V | None]] = {}
        self._generation = 0
        self._paused = False

    def peek(self, key: K) -> V | None:
        """What is remembered for `key`, without asking the store."""
        value = self._known.get(key)
        if value is not None:
            self._known.move_to_end(key)
        return value

    async def get(self, key: K, load: Callable[[], Awaitable[V | None]]) -> V | None:
        """What is remembered for `key`, else what `load` says; None is not remembered."""
        known = self.peek(key)
        if known is not None:
            return known
        # Not a load from before a change: what that reads may be old.
        which = (self._generation, key)
        loading = self._loading.get(which)
        if loading is None:
            loading = asyncio.ensure_future(self._load(which, load))
            self._loading[which] = loading
        # One who leaves must not take the others' answer along.
        return await asyncio.shield(loading)

    async def _load(
        self, which: tuple[int, K], load: Callable[[], Awaitable[V | None]]
    ) -> V | None:
        generation, key = which
        try:
            value = await load()
        finally:
            del self._loading[which]
        if value is not None and generation == self._generation:
            self.put(key, value)
        return value

    def put(self, key: K, value: V) -> None:
        """Remember what follows from something that is remembered elsewhere, and forgotten with
        this."""
        if not self._paused:
            self._known[key] = value
            if len(self._known) > self._size:
                self._known.popitem(last=False)

    def forget(self, unwanted: Callable[[K, V], bool]) -> None:
        """Forget every entry for which `unwanted` is true."""
        self._generation += 1
        for key in [key for key, value in self._known.items() if unwanted(key, value)]:
            del self._known[key]

    def forget_one(self, key: K) -> None:
        self._generation += 1
        self._known.pop(key, None)

    def forget_all(self) -> None:
        self._generation += 1
        self._known.clear()

    def pause(self) -> None:
        """The change signal is lost: ask the store each time until `resume`."""
        self._paused = True
        self.forget_all()

    def resume(self) -> None:
        self.forget_all()
        self._paused = False

    def __len__(self) -> int:
        return len(self._known)
