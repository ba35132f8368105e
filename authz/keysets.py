"""The keys of one issuer: kept fresh, fetched anew for a key that is not known, within bounds."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from authz.jws import Key
from parallama.errors import ParallamaError

log = logging.getLogger(__name__)

FRESH_SECONDS = 300.0
"""A key that the issuer withdrew is refused after this time."""
COOLDOWN_SECONDS = 10.0
"""Tokens with unknown keys make us ask the issuer once in this time, however many there are."""
KEEP_SECONDS = 86_400.0
"""How long its last keys are good while the issuer is away."""

Load = Callable[[], Awaitable[Mapping[str, Key]]]


class KeySet:
    """
    What `load` says, which raises OSError, ValueError or an error of ours where it cannot say.

    `run` does all the loading, one at a time: from now on, or unless `at_once` from when somebody
    first wants a key. `on_withdrawn` is called once a key is gone or another one bears its name:
    what was checked with it is not to be believed any more.
    """

    def __init__(
        self,
        load: Load,
        *,
        name: str,
        monotonic: Callable[[], float],
        on_withdrawn: Callable[[], None],
        fresh: float = FRESH_SECONDS,
        cooldown: float = COOLDOWN_SECONDS,
        keep: float = KEEP_SECONDS,
        at_once: bool = True,
    ) -> None:
        self._load = load
        self._name = name
        self._monotonic = monotonic
        self._on_withdrawn = on_withdrawn
        self._fresh = fresh
        self._cooldown = cooldown
        self._keep = keep
        self._at_once = at_once
        self._keys: Mapping[str, Key] = {}
        self._away = False
        self._loaded_at = 0.0
        self._tried_at: float | None = None
        self._wanted = asyncio.Event()
        self._looked = asyncio.Event()
        if not at_once:
            self._looked.set()  # no look is on its way

    def get(self, kid: str) -> Key | None:
        """A key that is known already."""
        return self._keys.get(kid)

    async def find(self, kid: str) -> Key | None:
        """A key that is known, or that a fresh look finds, where it is time for one."""
        known = self._keys.get(kid)
        if known is not None or not self._may_look():
            return known
        if self._looked.is_set():  # else a look is on its way, which will do
            self._looked.clear()
            self._wanted.set()
        await self._looked.wait()
        return self._keys.get(kid)

    async def run(self) -> None:
        """Keep the keys fresh, for ever."""
        if not self._at_once:
            await self._wanted.wait()
        while True:
            await self._look()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._cooldown if self._away else self._fresh):
                    await self._wanted.wait()

    def _may_look(self) -> bool:
        return self._tried_at is None or self._monotonic() - self._tried_at >= self._cooldown

    async def _look(self) -> None:
        self._looked.clear()
        self._wanted.clear()
        try:
            self._take(await self._load())
        except (OSError, ValueError, ParallamaError) as error:
            self._fail(error)
        finally:
            self._tried_at = self._monotonic()
            self._looked.set()

    def _take(self, keys: Mapping[str, Key]) -> None:
        before, self._keys = self._keys, keys
        self._loaded_at = self._monotonic()
        if self._away:
            log.info("keys of an issuer found", extra={"issuer": self._name})
        self._away = False
        if any(keys.get(kid) != key for kid, key in before.items()):
            self._on_withdrawn()

    def _fail(self, error: Exception) -> None:
        if not self._away:
            log.warning(
                "keys of an issuer not found", extra={"issuer": self._name, "cause": str(error)}
            )
        self._away = True
        if self._keys and self._monotonic() - self._loaded_at >= self._keep:
            log.warning("keys of an issuer too old", extra={"issuer": self._name})
            self._keys = {}
            self._on_withdrawn()
