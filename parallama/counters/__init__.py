"""What every user has spent and holds, in Redis: taken, settled, closed, expired, rebuilt."""

import json
import zlib
from asyncio import Future, gather
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha1
from importlib.resources import files
from operator import attrgetter
from urllib.parse import quote

from redis.asyncio import Redis

from parallama.limits import Unit
from parallama.pipeline import Pipeline, Script

SHARDS = 64
"""Hash tags: all keys of one user are in one of them, and with them the list of open calls."""

KINDS = {
    Unit.REQUESTS: "n",
    Unit.TOKENS: "t",
    Unit.COMPUTE_SECONDS: "c",
    Unit.COST: "m",
    Unit.CONCURRENT: "l",
}

# How long an id stays known once nothing is left to do for it: a repeat comes at once or never.
_REPEAT_SECONDS = 120
# Longer than any window, so that windows that begin later are known to begin empty.
_KNOWN_SECONDS = 40 * 86400
# Of the records whose lease is over, so many in one go.
_MOST_AT_ONCE = 200


def _script(name: str) -> Script:
    folder = files("parallama.counters")
    text = folder.joinpath("common.lua").read_text() + folder.joinpath(name).read_text()
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


_RESERVE, _SETTLE, _CLOSE = map(_script, ("reserve.lua", "settle.lua", "close.lua"))
_EXPIRE, _DROP, _OVERDUE = map(_script, ("expire.lua", "drop.lua", "overdue.lua"))
_SEED, _CHARGE = map(_script, ("seed.lua", "charge.lua"))
_SCRIPTS = (_RESERVE, _SETTLE, _CLOSE, _EXPIRE, _DROP, _OVERDUE, _SEED, _CHARGE)


@dataclass(frozen=True, slots=True)
class Hold:
    """
    A place in one bucket: `amount` parts of `unit`, of which `limit` may be used from `start` to
    before `end` (seconds since the epoch).
    """

    name: str
    unit: Unit
    limit: int
    amount: int
    start: int
    end: int
    shadow: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """What is to be known of a call if nobody tells its end. `at` is its beginning."""

    request_id: str
    user: str
    key: str
    gateway: str
    dialect: str
    endpoint: str
    model: str
    at: float


@dataclass(frozen=True, slots=True)
class Level:
    """What a bucket holds after a decision. `full`: it had no room for the call."""

    used: int
    reserved: int
    full: bool


@dataclass(frozen=True, slots=True)
class Taken:
    """
    Whether there was room; the tokens held; a level for each hold.

    `known` is False where what the user spent before must be told by `seed` first.
    """

    taken: bool
    tokens: int
    levels: tuple[Level, ...]
    known: bool = True


@dataclass(frozen=True, slots=True)
class Lost:
    """A call without a row. `tokens` is what it used, None where nobody said that either."""

    call: Call
    tokens: int | None


_facts = attrgetter(*Call.__slots__)
_JSON = json.JSONEncoder(separators=(",", ":"))


class Counters:
    """
    Of all users. Everything raises `Unavailable` where Redis cannot be reached in time.

    A call that nobody settles within `lease` seconds is lost, and so is one that was settled and
    has no row after as long again.
    """

    def __init__(self, redis: Redis, *, lease: int, timeout: float) -> None:
        self._scripts = Pipeline(redis, *_SCRIPTS, timeout=timeout)
        self._lease = lease

    async def reserve(
        self, call: Call, holds: Sequence[Hold], *, tokens: int, least: int, now: float
    ) -> Taken:
        """
        Take every hold, or change nothing; the same call again is the same place.

        `tokens` are held where a hold counts tokens; with `least` above 0 it may be fewer, down to
        that, where no more is left.
        """
        at, names = int(now), _names(call.user)
        keys = [names.open, names.record(call.request_id), names.known]
        told: list[str | int] = []
        keep = self._lease
        for hold in holds:
            keys.append(names.buckets + hold.name)
            stays = self._lease if hold.unit is Unit.CONCURRENT else hold.end - at + self._lease
            told += (KINDS[hold.unit], hold.limit, hold.amount, hold.start, stays, int(hold.shadow))
            keep = max(keep, stays)
        facts = _JSON.encode(_facts(call))
        # Twice the lease after its row is due, so that it can be named again until that is stored.
        args = [at, self._lease, keep + 3 * self._lease, tokens, least, facts, *told]
        taken, held, *levels = await self._scripts.run(_RESERVE, keys, args)
        return Taken(
            taken == 1,
            held,
            tuple(
                Level(levels[i], levels[i + 1], levels[i + 2] == 1)
                for i in range(0, len(levels), 3)
            ),
            known=taken >= 0,
        )

    def settle(self, user: str, request_id: str, tokens: int, now: float) -> "Future[int]":
        """
        Charge the tokens that were used, in the windows in which they were held. Never refuses:
        they are spent, so a bucket may end above its limit.

        1 if charged, 0 if that was done before, -1 if nothing is known of the call, -2 if nothing
        is known of the user. It is on its way when this returns, whether or not anybody awaits it.
        """
        names = _names(user)
        keys = [names.open, names.record(request_id), names.known]
        return self._scripts.run(_SETTLE, keys, [int(now), tokens, self._lease], patient=True)

    def close(
        self, user: str, request_id: str, *, tokens: int, compute: int, cost: int, now: float
    ) -> "Future[int]":
        """
        The call's usage row is stored, with these amounts in parts of their units.

        1 if closed, 0 if that was done before, -1 if nothing is known of the call.
        """
        names = _names(user)
        keys = [names.open, names.record(request_id)]
        args = [int(now), tokens, compute, cost, _REPEAT_SECONDS]
        return self._scripts.run(_CLOSE, keys, args, patient=True)

    async def expire(self, now: float) -> list[Lost]:
        """
        End the leases that are over, and name their calls.

        Each is named again after a while until `drop`, so that a row is written even if who was
        told of it dies. No two processes are told of one at the same time.
        """
        args = [int(now), _MOST_AT_ONCE, max(1, self._lease // 2)]
        shards = [self._scripts.run(_EXPIRE, [_open(shard)], args) for shard in range(SHARDS)]
        lost = []
        for found in await gather(*shards):
            for facts, tokens in zip(found[::2], found[1::2], strict=True):
                lost.append(Lost(Call(*json.loads(facts)), None if tokens < 0 else tokens))
        return lost

    async def drop(self, lost: Iterable[Lost]) -> None:
        """Their rows are stored. Whoever tells their end after all is still heard."""
        drops = []
        for at in lost:
            names = _names(at.call.user)
            keys = [names.open, names.record(at.call.request_id)]
            drops.append(self._scripts.run(_DROP, keys, []))
        await gather(*drops)

    async def overdue(self, before: float) -> int:
        """How many calls are open whose lease ended before this."""
        args = [int(before)]
        shards = [self._scripts.run(_OVERDUE, [_open(shard)], args) for shard in range(SHARDS)]
        return sum(await gather(*shards))

    async def seed(
        self, user: str, spent: Iterable[tuple[Hold, int]], stored: Iterable[str], now: float
    ) -> None:
        """
        Tell buckets that do not exist yet what was spent before, by the usage rows.

        `stored` are the ids of calls that may still be settled and are in those sums.
        """
        names, at = _names(user), int(now)
        keys, told = [names.known], []
        for hold, used in spent:
            keys.append(names.buckets + hold.name)
            told += [used, hold.end - at + self._lease]
        buckets = len(keys) - 1
        keys += map(names.record, stored)
        args = [at, _KNOWN_SECONDS, _REPEAT_SECONDS, buckets, *told]
        await self._scripts.run(_SEED, keys, args)

    def charge(
        self, user: str, request_id: str, spent: Iterable[tuple[Hold, int]], now: float
    ) -> "Future[int]":
        """
        Charge a call whose record was lost. 1 if charged, 0 if the call is known after all, -2 if
        nothing is known of the user.
        """
        names, at = _names(user), int(now)
        keys, told = [names.record(request_id), names.known], []
        for hold, used in spent:
            keys.append(names.buckets + hold.name)
            told += [used, hold.end - at + self._lease]
        return self._scripts.run(_CHARGE, keys, [_REPEAT_SECONDS, *told])

    async def aclose(self) -> None:
        """Wait for everything under way, then hang up."""
        await self._scripts.aclose()


@dataclass(frozen=True, slots=True)
class _Names:
    """The keys of one user. All begin with the hash tag of the user's shard."""

    open: str
    known: str
    records: str
    buckets: str

    def record(self, request_id: str) -> str:
        return self.records + quote(request_id, safe="")


@lru_cache(maxsize=4096)
def _names(user: str) -> _Names:
    shard, who = zlib.crc32(user.encode()) % SHARDS, quote(user, safe="")
    tag = f"rl:{{{shard}}}:"
    return _Names(_open(shard), f"{tag}known:{who}", f"{tag}r:{who}:", f"{tag}b:{who}:")


def _open(shard: int) -> str:
    return f"rl:{{{shard}}}:open"
