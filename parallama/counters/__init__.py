"""What every user has spent and holds, in Redis: taken, settled, closed, expired, rebuilt."""

import json
import zlib
from asyncio import Future, gather
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import NamedTuple
from urllib.parse import quote

from parallama.lanes import Call as Waiting
from parallama.limits import Limit, Unit
from parallama.pipeline import Pipeline, Script
from parallama.resp import Redis
from parallama.usage import Spent

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
ON_THE_WAY = 3600
"""Counters that were lost are built anew from usage rows. The row of a call that began so many
seconds before may not be stored by then; when it comes, it is charged."""
# So far may the clocks be apart that say when a call began and when counters were built.
_SKEW_SECONDS = 60
# After so long a row is told of again, but is not new: it was on its way for no more than a day.
_STAYS_SECONDS = 86400
# Of calls at once, which have no window: how long is remembered that some had no room.
_NO_ROOM_SECONDS = 86400
# Of the records whose lease is over, so many in one go.
_MOST_AT_ONCE = 200


_TIMES = f"""\
local BEFORE, AFTER, STAYS = {ON_THE_WAY}, {_SKEW_SECONDS}, {_STAYS_SECONDS}
local NO_ROOM_KEPT = {_NO_ROOM_SECONDS}
"""


def _script(name: str) -> Script:
    return Script.load("parallama.counters", "common.lua", name, head=_TIMES)


_RESERVE, _SETTLE, _CLOSE = map(_script, ("reserve.lua", "settle.lua", "close.lua"))
_EXPIRE, _DROP, _OVERDUE = map(_script, ("expire.lua", "drop.lua", "overdue.lua"))
_BEGIN, _SEED, _CHARGE = map(_script, ("begin.lua", "seed.lua", "charge.lua"))
_LOOK, _NO_ROOM = map(_script, ("look.lua", "no_room.lua"))
_SCRIPTS = (
    *(_RESERVE, _SETTLE, _CLOSE, _EXPIRE, _DROP, _OVERDUE),
    *(_BEGIN, _SEED, _CHARGE, _LOOK, _NO_ROOM),
)

TAKEN = 1
NOT_KNOWN = -1
NOT_COUNTED = -2
"""What `close` says of a call that the counters know nothing of, and should."""


class Hold(NamedTuple):
    """
    A place in one bucket: `amount` parts of `unit`, of which `limit` may be used from `start` to
    before `end` (seconds since the epoch). With a `start` of 0 it may be new in its window.
    """

    name: str
    unit: Unit
    limit: int
    amount: int
    start: int
    end: int
    shadow: bool = False


class Call(NamedTuple):
    """
    What is to be known of a call if nobody tells its end. `at` is its beginning; `grants` is as in
    UsageRecord.
    """

    request_id: str
    user: str
    key: str
    gateway: str
    dialect: str
    endpoint: str
    model: str
    at: float
    grants: str = ""


class Level(NamedTuple):
    """What a bucket holds after a decision. `full`: it had no room for the call."""

    used: int
    reserved: int
    full: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """What a bucket holds. It is not `known` where that has to be looked up in the usage rows."""

    used: int
    reserved: int
    known: bool


class Taken(NamedTuple):
    """
    Whether there was room; the tokens held; a level for each hold.

    `known` is False where what the user spent before must be told by `begin` and `seed` first.
    """

    taken: bool
    tokens: int
    levels: Sequence[Level]
    known: bool = True


@dataclass(frozen=True, slots=True)
class Lost:
    """
    A call without a row. `tokens` is what it used, None where nobody said that either.

    With `uncounted` it has a row, and is in no bucket: its record was lost before that came.
    """

    call: Call
    tokens: int | None
    uncounted: bool = False


def _json(call: Call) -> str:
    """As a list. json.dumps makes an encoder for each, which costs more than all else here."""
    *texts, at, grants = call
    return (
        f"[{','.join(map(encode_basestring_ascii, texts))},{at},{encode_basestring_ascii(grants)}]"
    )


class Counters:
    """
    Of all users. Everything raises `Unavailable` where Redis cannot be reached in time.

    A call that nobody settles within `lease` seconds is lost, and so is one that was settled and
    has no row after as long again.
    """

    def __init__(self, redis: Redis, *, lease: int, timeout: float) -> None:
        self._scripts = Pipeline(redis, *_SCRIPTS, timeout=timeout)
        self._lease = lease
        self._reserved: tuple[list[str], list[str | int]] | None = None
        self._nudge: Waiting | None = None

    def reserve(
        self,
        call: Call,
        holds: Sequence[Hold],
        *,
        tokens: int,
        least: int,
        now: float,
        take: bool = True,
    ) -> "Future[Sequence[int]]":
        """
        Take every hold, or change nothing; the same call again is the same place. Without `take`,
        only say what would come of it. The reply is for `taken`.

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
        # Twice the lease after its row is due, so that it can be named again until that is stored.
        lease = self._lease if take else 0
        args = [at, lease, keep + 3 * self._lease, tokens, least, _json(call), *told]
        self._reserved = keys, args
        return self._scripts.run(_RESERVE, keys, args)

    def nudge(self) -> None:
        """
        Before a call that comes alone: let Redis go through the question that was made ready for
        it, which takes nothing and has no answer (docs/decisions/0028).
        """
        if self._nudge is not None:
            self._scripts.nudge(self._nudge)

    def make_ready(self) -> None:
        """`nudge` will ask what `reserve` asked last, for a call that there is not."""
        if self._reserved is not None:
            (open_, record, *keys), (now, _, *args) = self._reserved
            self._nudge = self._scripts.prepared(
                _RESERVE, [open_, f"{record}:nobody", *keys], [now, 0, *args]
            )

    @staticmethod
    def taken(reply: Sequence[int]) -> Taken:
        levels = [Level(reply[i], reply[i + 1], reply[i + 2] == 1) for i in range(2, len(reply), 3)]
        return Taken(reply[0] == TAKEN, reply[1], levels, reply[0] != NOT_KNOWN)

    def settle(self, user: str, request_id: str, tokens: int, now: float) -> "Future[int]":
        """
        Charge the tokens that were used, in the windows in which they were held. Never refuses:
        they are spent, so a bucket may end above its limit.

        1 if charged, 0 if that was done before, NOT_KNOWN if there is no record of the call. It is
        on its way when this returns, whether or not anybody awaits it.
        """
        names = _names(user)
        keys = [names.open, names.record(request_id)]
        return self._scripts.run(_SETTLE, keys, [int(now), tokens, self._lease], patient=True)

    def close(
        self,
        user: str,
        request_id: str,
        spent: Spent,
        *,
        began: float,
        now: float,
        late: Call | None = None,
    ) -> "Future[int]":
        """
        The call's usage row is stored.

        1 if closed, 0 if that was done before, NOT_KNOWN if there is no record of the call and none
        is missing. NOT_COUNTED if it is in no bucket, because its record was lost, and the row was
        not there when counters were built anew: with `late` it is named by `expire` then.
        """
        names = _names(user)
        keys = [names.open, names.record(request_id), names.known, names.counted]
        facts = "" if late is None else _json(late)
        used = (spent.tokens, spent.compute, spent.cost)
        args = (int(now), *used, _REPEAT_SECONDS, f"{began:.6f}", facts)
        return self._scripts.run(_CLOSE, keys, args, patient=True)

    async def look(self, user: str, holds: Sequence[Hold], now: float) -> list[Seen]:
        """What is in each of these buckets; nothing is taken."""
        names = _names(user)
        keys = [names.known]
        told: list[str | int] = []
        for hold in holds:
            keys.append(names.buckets + hold.name)
            told += [KINDS[hold.unit], hold.start]
        found = await self._scripts.run(_LOOK, keys, [int(now), *told])
        return [Seen(found[i], found[i + 1], found[i + 2] == 1) for i in range(0, len(found), 3)]

    async def expire(self, now: float) -> list[Lost]:
        """
        End the leases that are over, and name their calls.

        Each is named again after a while until `drop`, so that a row is written even if who was
        told of it dies. No two processes are told of one at the same time.
        """
        args = [int(now), _MOST_AT_ONCE, max(1, self._lease // 2)]
        shards = [
            self._scripts.run(_EXPIRE, [_open(shard)], args, patient=True)
            for shard in range(SHARDS)
        ]
        lost = []
        for found in await gather(*shards):
            for facts, tokens, row in zip(found[::3], found[1::3], found[2::3], strict=True):
                call = Call(*json.loads(facts))
                lost.append(Lost(call, None if tokens < 0 else tokens, uncounted=row == 1))
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
        shards = [
            self._scripts.run(_OVERDUE, [_open(shard)], args, patient=True)
            for shard in range(SHARDS)
        ]
        return sum(await gather(*shards))

    async def begin(self, user: str, now: float) -> str:
        """
        Before the rows of a user are read. Returns what `seed` is to be told.

        From here on no row is missed: it is in what is read, or is charged when it comes.
        """
        names = _names(user)
        since: bytes = await self._scripts.run(
            _BEGIN, [names.known], [f"{now:.6f}", _KNOWN_SECONDS]
        )
        return since.decode()

    async def seed(
        self,
        user: str,
        since: str,
        spent: Iterable[tuple[Hold, int]],
        counted: Iterable[str],
        now: float,
    ) -> bool:
        """
        Tell buckets that do not exist yet what was spent before, by the usage rows.

        `counted` are the ids of calls in those sums that began `on_the_way`.
        False where the counters were lost again since `begin`: then begin anew.
        """
        names, at = _names(user), int(now)
        keys = [names.open, names.known, names.counted]
        told: list[str | int] = []
        for hold, used in spent:
            keys.append(names.buckets + hold.name)
            told += [used, hold.end - at + self._lease]
        args = [at, since, _REPEAT_SECONDS, *told, *map(names.record, counted)]
        return bool(await self._scripts.run(_SEED, keys, args))

    def charge(
        self, call: Call, holds: Iterable[Hold], spent: Spent, *, stored: bool, now: float
    ) -> "Future[int]":
        """
        Charge a call of which there is no record, in these buckets. As long as its row is not
        `stored`, that is to come, and says what compute and cost were.

        1 if charged, 0 if the call is known after all, NOT_KNOWN if what the user spent before must
        be told first.
        """
        names, at = _names(call.user), int(now)
        keys = [names.open, names.record(call.request_id), names.known, names.counted]
        amounts = {"t": spent.tokens, "c": spent.compute, "m": spent.cost}
        told: list[str | int] = []
        for hold in holds:
            kind = KINDS[hold.unit]
            keys.append(names.buckets + hold.name)
            told += (kind, amounts.get(kind, 1), hold.start, hold.end - at + self._lease)
        facts = _json(call)
        args = [at, self._lease, _REPEAT_SECONDS, int(stored), spent.tokens, facts, *told]
        return self._scripts.run(_CHARGE, keys, args)

    async def without_room(self, user: str, buckets: Sequence[tuple[str, Unit]]) -> list[int]:
        """How many calls had no room in each of these, in its window or, without one, for a day."""
        names = _names(user)
        keys = [names.buckets + name for name, _ in buckets]
        if not keys:
            return []
        found: list[int] = await self._scripts.run(_NO_ROOM, keys, [KINDS[at] for _, at in buckets])
        return found

    async def aclose(self) -> None:
        """Wait for everything under way, then hang up."""
        await self._scripts.aclose()


def bucket_name(limit: Limit, start: int) -> str:
    """
    Of the count of a limit in the window from `start` on.

    It leaves the limit's amount out: a limit that is changed keeps its count.
    """
    parts = (limit.key, limit.gateway, limit.model, limit.unit, limit.window)
    name = ":".join([*(quote(part, safe="") for part in parts), str(start)])
    return "shadow:" + name if limit.shadow else name


def on_the_way(since: str) -> tuple[float, float]:
    """When calls began whose rows may have been on their way, by what `Counters.begin` said."""
    return float(since) - ON_THE_WAY, float(since) + _SKEW_SECONDS


@dataclass(frozen=True, slots=True)
class _Names:
    """The keys of one user. All begin with the hash tag of the user's shard."""

    open: str
    known: str
    counted: str
    records: str
    buckets: str

    def record(self, request_id: str) -> str:
        plain = request_id.isascii() and request_id.replace("-", "").isalnum()
        return self.records + (request_id if plain else quote(request_id, safe=""))


@lru_cache(maxsize=4096)
def _names(user: str) -> _Names:
    shard, who = zlib.crc32(user.encode()) % SHARDS, quote(user, safe="")
    tag = f"rl:{{{shard}}}:"
    return _Names(
        _open(shard),
        f"{tag}known:{who}",
        f"{tag}counted:{who}",
        f"{tag}r:{who}:",
        f"{tag}b:{who}:",
    )


def _open(shard: int) -> str:
    return f"rl:{{{shard}}}:open"
