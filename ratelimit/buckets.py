"""The counters of every user: taking places in them, all or none, and settling what was used."""

from asyncio import Future
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from redis.asyncio import Redis

from ratelimit.pipeline import Pipeline, Script
from ratelimit.rules import Bucket, Level, requests_among

_RESERVE = Script.load("reserve.lua")
_SETTLE = Script.load("settle.lua")

# How long an id stays known once nothing is left to settle: a repeat comes at once or never.
_REPEAT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Taken:
    """Whether there was room; the tokens held; every bucket as it is now."""

    taken: bool
    held: int
    levels: tuple[Level, ...]


class Buckets:
    """
    The only user of Redis. Everything raises `Unavailable` where it cannot be reached in time.

    A reservation that nobody settles is given back when its lease of `lease` seconds ends.
    """

    def __init__(self, redis: Redis, *, lease: int, timeout: float) -> None:
        self._scripts = Pipeline(redis, _RESERVE, _SETTLE, timeout=timeout)
        self._lease = lease

    async def reserve(
        self, user: str, reservation: str, tokens: int, met: Sequence[Bucket], now: float
    ) -> Taken:
        """
        Take one request and hold `tokens` in every bucket of `met`, or change nothing.

        `met` is in the order of `rules.buckets`. The same reservation again is the same place.
        """
        at, requests = int(now), requests_among(met)
        prefix = _prefix(user)
        keys = [prefix + "open", _record(prefix, reservation)]
        sizes: list[int] = []
        # A record lives as long as the longest of its buckets: it can be settled until then.
        keep = _REPEAT_SECONDS
        for i, bucket in enumerate(met):
            keys.append(prefix + bucket.name)
            stays = bucket.end - at + self._lease
            sizes += (bucket.limit.amount, stays)
            if i >= requests:
                keep = max(keep, stays)
        facts = await self._scripts.run(
            _RESERVE, keys, [at, tokens, self._lease, keep, requests, *sizes]
        )
        levels = tuple(
            Level(bucket, facts[i], facts[i + 1], facts[i + 2] == 1)
            for bucket, i in zip(met, range(2, len(facts), 3), strict=True)
        )
        return Taken(facts[0] == 1, facts[1], levels)

    def settle(self, user: str, reservation: str, used: int, now: float) -> "Future[int]":
        """
        Charge what was really used, in the windows it was reserved in. Never refuses: the tokens
        are spent, so a bucket may end above its limit.

        1 if charged, 0 if that was done before, -1 if nothing is known of the reservation.
        It is on its way when this returns, whether or not anybody awaits it.
        """
        prefix = _prefix(user)
        keys = [prefix + "open", _record(prefix, reservation)]
        return self._scripts.run(_SETTLE, keys, [int(now), used, _REPEAT_SECONDS], patient=True)

    async def aclose(self) -> None:
        """Wait for everything under way, then hang up."""
        await self._scripts.aclose()


def _prefix(user: str) -> str:
    """All keys of one user carry one hash tag, so that a script may touch them together."""
    return "rl:{" + quote(user, safe="") + "}:"


def _record(prefix: str, reservation: str) -> str:
    return f"{prefix}r:{quote(reservation, safe='')}"
