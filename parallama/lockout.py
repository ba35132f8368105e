"""Who guesses passwords has to wait, longer each time: by user name, and by address."""

import hashlib
import ipaddress
import math
from contextlib import suppress
from dataclasses import dataclass

from parallama.config import Authentication
from parallama.db import names
from parallama.errors import ParallamaError, Unavailable
from parallama.pipeline import Pipeline, Script
from parallama.resp import Redis

_TRY, _UNDO = Script.load("parallama", "lockout.lua"), Script.load("parallama", "lockout_undo.lua")

_DAY = 86_400_000
_HOUR = 3_600_000
_IPV6_BITS = 64  # a household, or one server: all of it is one client's to choose from


class Locked(ParallamaError):
    """Too many attempts. The same for a user that exists and for one that does not."""

    def __init__(self, seconds: float) -> None:
        self.seconds = max(1, math.ceil(seconds))
        super().__init__(f"too many attempts: try again in {self.seconds} s")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One that was let through. It counts as a failure until something else is said of it."""

    account: "_Count"
    address: "_Count"


@dataclass(frozen=True, slots=True)
class _Count:
    keys: tuple[str, str]
    number: int


class Lockout:
    """
    Counts attempts in Redis before they are made: so many that come at once are as many as if they
    came one after the other. Redis' clock decides. Raises Unavailable where it is away.
    """

    def __init__(self, redis: Redis, settings: Authentication, *, timeout: float) -> None:
        self._scripts = Pipeline(redis, _TRY, _UNDO, timeout=timeout)
        self._account = _rule(settings, settings.login_attempts, _DAY)
        self._address = _rule(settings, settings.login_attempts_per_address, _HOUR)

    async def attempt(self, username: str, address: str) -> Attempt:
        """Raises Locked. What is refused so counts for nothing: it is no guess."""
        by_address = await self._count("address", _place(address), self._address)
        try:
            by_account = await self._count("account", names.normal(username), self._account)
        except (Locked, Unavailable):
            await self._undo(by_address, everything=False)
            raise
        return Attempt(by_account, by_address)

    async def succeeded(self, attempt: Attempt) -> None:
        """The account begins anew. The address does not: who has one account may try for others."""
        await self._undo(attempt.account, everything=True)
        await self._undo(attempt.address, everything=False)

    async def void(self, attempt: Attempt) -> None:
        """Nobody looked at the password after all."""
        await self._undo(attempt.account, everything=False)
        await self._undo(attempt.address, everything=False)

    async def unlock(self, username: str) -> None:
        """The account begins anew: who forgot a password need not wait until its turn is over."""
        await self._scripts.run(_UNDO, _keys("account", names.normal(username)), [0, 1])

    async def aclose(self) -> None:
        await self._scripts.aclose()

    async def _count(self, kind: str, whose: str, rule: list[int]) -> _Count:
        keys = _keys(kind, whose)
        wait, number = await self._scripts.run(_TRY, keys, rule)
        if wait:
            raise Locked(wait / 1000)
        return _Count(keys, number)

    async def _undo(self, count: _Count, *, everything: bool) -> None:
        # What is counted once too often does less harm than a log-in that fails for it.
        with suppress(Unavailable):
            await self._scripts.run(_UNDO, count.keys, [count.number, int(everything)])


def _rule(settings: Authentication, attempts: int, window: int) -> list[int]:
    first, most = settings.lockout_first_seconds, settings.lockout_max_seconds
    return [attempts, math.ceil(first * 1000), math.ceil(most * 1000), window]


def _keys(kind: str, whose: str) -> tuple[str, str]:
    """Any text is safe in them and of one length; in a cluster both are on one server."""
    tag = hashlib.sha256(whose.encode(errors="surrogatepass")).hexdigest()
    return f"login:{{{tag}}}:{kind}:n", f"login:{{{tag}}}:{kind}:wait"


def _place(address: str) -> str:
    try:
        at = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(at, ipaddress.IPv6Address):
        if at.ipv4_mapped is not None:
            return str(at.ipv4_mapped)
        return str(ipaddress.ip_network((int(at), _IPV6_BITS), strict=False))
    return str(at)
