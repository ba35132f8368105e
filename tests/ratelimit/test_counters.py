"""The counters on a real Valkey: what is taken, what is given back, and that nothing is lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from parallama.counters import NOT_COUNTED, NOT_KNOWN, ON_THE_WAY, Call, Counters, Lost
from parallama.limits import Limit, Unit, Window
from parallama.usage import Spent
from ratelimit import rules

NOON = 1_700_049_600.0  # 2023-11-15 12:00:00 UTC
LEASE = 600


def limit(unit=Unit.REQUESTS, window=Window.HOUR, amount=10, *, gateway="*", model="*") -> Limit:
    return Limit(gateway, model, unit, window, amount)


def tokens(amount, window=Window.HOUR) -> Limit:
    return limit(Unit.TOKENS, window, amount)


@dataclass
class Answer:
    taken: bool
    held: int
    levels: list[rules.Level]
    known: bool


class Desk:
    """`Counters` with limits and time as the tests like to say them."""

    def __init__(self, redis) -> None:
        self.redis = redis
        self.counters = Counters(redis, lease=LEASE, timeout=5)

    async def ask(
        self, limits, id="r", amount=1, *, user="u", key="k", gateway="g", model="m", now=NOON,
        least=0, compute=0, cost=0, take=True,
    ) -> Answer:  # fmt: skip
        met = rules.buckets(limits, gateway, model, key, now)
        need = rules.Need(0, amount, compute, cost)
        call = Call(id, user, key, gateway, "openai", "/v1/chat/completions", model, now)
        holds = [at.hold(need.of(at.limit.unit)) for at in met]
        reply = self.counters.reserve(call, holds, tokens=amount, least=least, now=now, take=take)
        taken = Counters.taken(await reply)
        levels = [
            rules.Level(at, level.used, level.reserved, level.full)
            for at, level in zip(met, taken.levels, strict=False)
        ]
        return Answer(taken.taken, taken.tokens, levels, taken.known)

    async def reserve(self, limits, id="r", amount=1, *, user="u", **about) -> Answer:
        """As `ask`, of a user who has spent nothing before."""
        answer = await self.ask(limits, id, amount, user=user, **about)
        if not answer.known:
            await self.counters.begin(user, 0)
            answer = await self.ask(limits, id, amount, user=user, **about)
        return answer

    async def settle(self, id="r", used=0, *, user="u", now=NOON) -> int:
        return await self.counters.settle(user, id, used, now)

    async def close(
        self, id="r", used=0, *, user="u", now=NOON, compute=0, cost=0, began=None, late=None
    ) -> int:
        return await self.counters.close(
            user, id, Spent(used, compute, cost), began=began or now, now=now, late=late
        )

    async def seed(self, spent, counted, *, user="u", now=NOON) -> None:
        since = await self.counters.begin(user, now)
        assert await self.counters.seed(user, since, spent, counted, now)

    async def charge(self, met, id, used, *, user="u", stored=False, now=NOON, cost=0) -> int:
        call = Call(id, user, "k", "g", "openai", "/v1/chat/completions", "m", now)
        holds = [at.hold(0) for at in met]
        spent = Spent(used, cost=cost)
        return await self.counters.charge(call, holds, spent, stored=stored, now=now)

    async def expire(self, now) -> list[Lost]:
        return await self.counters.expire(now)

    async def look(self, limits, **about) -> list[tuple[int, int]]:
        """What the buckets hold, seen through a request that finds no room."""
        none = [limit(amount=0, model="*", gateway="probe")]
        seen = await self.reserve([*none, *limits], "probe", 10**9, gateway="probe", **about)
        assert not seen.taken
        return [(at.used, at.reserved) for at in seen.levels if at.bucket.limit not in none]

    async def open(self, user="u") -> int:
        keys = await self.redis.keys("*:open")
        return sum([await self.redis.zcard(key) for key in keys])


@asynccontextmanager
async def counting(redis) -> AsyncIterator[Desk]:
    counters = Desk(redis)
    try:
        yield counters
    finally:
        await counters.counters.aclose()


def story(told):
    """A test that is given a `Desk` on an empty Valkey."""

    def test(valkey):
        async def run(redis):
            async with counting(redis) as counters:
                await told(counters)

        valkey.run(run)

    test.__doc__ = told.__doc__
    return test


@story
async def test_requests_are_counted_at_admission(counters):
    limits = [limit(amount=2)]
    answers = [await counters.reserve(limits, f"r{i}") for i in range(3)]
    assert [answer.taken for answer in answers] == [True, True, False]
    assert [answer.levels[0].used for answer in answers] == [1, 2, 2]
    assert [answer.levels[0].full for answer in answers] == [False, False, True]


@story
async def test_what_would_come_of_a_call_is_said_without_taking_anything(counters):
    limits = [limit(amount=2), tokens(1000), limit(Unit.CONCURRENT, Window.MOMENT, 1)]
    asked = await counters.reserve(limits, "asked", 400, take=False)
    assert (asked.taken, [(at.used, at.reserved) for at in asked.levels]) == (True, [(0, 0)] * 3)
    assert await counters.open() == 0
    await counters.reserve(limits, "r", 700)
    asked = await counters.reserve(limits, "asked", 400, take=False)
    assert (asked.taken, [at.full for at in asked.levels]) == (False, [False, True, True])
    assert await counters.look(limits) == [(1, 0), (0, 700), (1, 0)]
    assert await counters.open() == 1


@story
async def test_a_request_is_never_given_back(counters):
    limits = [limit(amount=2), tokens(100)]
    await counters.reserve(limits)
    await counters.settle(used=0)
    assert await counters.look(limits) == [(1, 0), (0, 0)]


@story
async def test_settling_replaces_what_was_held_by_what_was_used(counters):
    limits = [tokens(1000), tokens(5000, Window.DAY)]
    assert (await counters.reserve(limits, amount=300)).held == 300
    assert await counters.look(limits) == [(0, 300), (0, 300)]
    assert await counters.settle(used=120) == 1
    assert await counters.look(limits) == [(120, 0), (120, 0)]
    assert await counters.open() == 1  # its row is still to come
    assert [await counters.close(used=120) for _ in range(2)] == [1, 0]
    assert await counters.look(limits) == [(120, 0), (120, 0)]
    assert await counters.open() == 0


@story
async def test_all_or_none(counters):
    limits = [limit(amount=100, window=Window.DAY), limit(amount=1), tokens(1000)]
    assert (await counters.reserve(limits, "r1", 10)).taken
    refused = await counters.reserve(limits, "r2", 10)
    assert [level.full for level in refused.levels] == [False, True, False]
    assert [(level.used, level.reserved) for level in refused.levels] == [(1, 0), (1, 0), (0, 10)]


@story
async def test_zero_refuses_the_first_call(counters):
    assert not (await counters.reserve([limit(amount=0)])).taken
    assert not (await counters.reserve([tokens(0)])).taken
    assert await counters.open() == 0


@story
async def test_used_equal_to_the_limit_is_full(counters):
    limits = [tokens(100)]
    await counters.reserve(limits, amount=10)
    await counters.settle(used=100)
    assert not (await counters.reserve(limits, "r2")).taken


@story
async def test_the_call_that_crosses_the_limit_completes_and_the_next_is_refused(counters):
    limits = [tokens(100)]
    assert (await counters.reserve(limits, "r1", 5000)).taken
    assert await counters.settle("r1", 4000) == 1
    refused = await counters.reserve(limits, "r2", 1)
    assert (refused.taken, refused.levels[0].gone) == (False, True)


@story
async def test_beside_another_a_call_must_fit(counters):
    limits = [tokens(100)]
    assert (await counters.reserve(limits, "r1", 60)).taken
    refused = await counters.reserve(limits, "r2", 41)
    assert (refused.taken, refused.levels[0].gone) == (False, False)
    assert (await counters.reserve(limits, "r3", 40)).taken


@story
async def test_the_same_id_twice_is_one_place_and_one_answer(counters):
    limits = [limit(), tokens(100)]
    first = await counters.reserve(limits, "r1", 60)
    again = await counters.reserve(limits, "r1", 60)
    assert again == first
    await counters.settle("r1", 50)
    late = await counters.reserve(limits, "r1", 60)
    assert (late.taken, late.held) == (True, 60)
    assert await counters.look(limits) == [(1, 0), (50, 0)]


@story
async def test_an_admitted_call_stays_admitted_when_its_bucket_is_full_by_now(counters):
    limits = [limit(amount=1)]
    assert (await counters.reserve(limits, "r1")).taken
    assert (await counters.reserve(limits, "r1")).taken
    assert not (await counters.reserve(limits, "r2")).taken


@story
async def test_settling_twice_charges_once(counters):
    limits = [tokens(1000)]
    await counters.reserve(limits, amount=300)
    assert [await counters.settle(used=120) for _ in range(3)] == [1, 0, 0]
    assert await counters.look(limits) == [(120, 0)]


@story
async def test_settling_what_nobody_reserved_charges_nobody(counters):
    assert await counters.settle("never", 100) == -1
    assert await counters.close("never", 100) == -1
    assert await counters.redis.keys() == []
    await counters.reserve([tokens(100)])
    assert await counters.settle("never", 100) == -1


@story
async def test_what_nobody_settles_is_given_back_when_its_lease_ends(counters):
    limits = [tokens(100)]
    await counters.reserve(limits, "r1", 100)
    assert await counters.expire(NOON + LEASE - 1) == []
    assert not (await counters.reserve(limits, "r2", now=NOON + LEASE - 1)).taken
    (lost,) = await counters.expire(NOON + LEASE)
    assert (lost.call.request_id, lost.call.at, lost.tokens) == ("r1", NOON, None)
    assert (await counters.reserve(limits, "r2", now=NOON + LEASE)).taken
    assert await counters.look(limits, now=NOON + LEASE) == [(0, 1)]


@story
async def test_a_late_settle_charges_once_and_gives_nothing_back_twice(counters):
    limits = [tokens(100)]
    await counters.reserve(limits, "r1", 60)
    after = NOON + LEASE
    assert len(await counters.expire(after)) == 1
    await counters.reserve(limits, "r2", 40, now=after)
    assert [await counters.settle("r1", 50, now=after) for _ in range(2)] == [1, 0]
    assert await counters.look(limits, now=after) == [(50, 40)]
    assert [await counters.close("r1", 50, now=after) for _ in range(2)] == [1, 0]
    assert await counters.look(limits, now=after) == [(50, 40)]


@story
async def test_a_lost_call_is_named_again_until_its_row_is_stored(counters):
    """Two who look at once are not told of the same one; one who dies is followed by another."""
    for i in range(30):
        await counters.reserve([tokens(1000)], f"r{i}", 1)
    after = NOON + LEASE
    first, second = await asyncio.gather(counters.expire(after), counters.expire(after))
    assert len(first) + len(second) == 30
    assert await counters.expire(after + 1) == []
    assert await counters.counters.overdue(after) == 0
    assert await counters.counters.overdue(after + LEASE) == 30
    later = after + LEASE
    again = await counters.expire(later)
    assert {at.call.request_id for at in again} == {f"r{i}" for i in range(30)}
    await counters.counters.drop(again)
    assert await counters.open() == 0
    assert await counters.expire(later + 10 * LEASE) == []
    assert await counters.look([tokens(1000)], now=later) == [(0, 0)]


@story
async def test_a_settled_call_whose_row_never_comes_is_lost_with_its_tokens(counters):
    limits = [tokens(1000), limit(Unit.COST, Window.DAY, 10**9)]
    await counters.reserve(limits, "r1", 60, cost=500)
    await counters.settle("r1", 50, now=NOON + 10)
    assert await counters.look(limits) == [(50, 0), (0, 500)]
    assert await counters.expire(NOON + LEASE) == []  # its row has as long again
    (lost,) = await counters.expire(NOON + 10 + LEASE)
    assert lost.tokens == 50
    # What it cost nobody knows: what was held is charged, until its row comes after all.
    assert await counters.look(limits) == [(50, 0), (500, 0)]
    assert [await counters.close("r1", 50, cost=7) for _ in range(2)] == [1, 0]
    assert await counters.look(limits) == [(50, 0), (7, 0)]


@story
async def test_more_leases_end_than_one_look_takes(counters):
    limits = [tokens(1000)]
    for i in range(230):
        await counters.reserve(limits, f"r{i}", 1)
    assert len(await counters.expire(NOON + LEASE)) == 200
    assert len(await counters.expire(NOON + LEASE)) == 30
    assert await counters.look(limits, now=NOON + LEASE) == [(0, 0)]


@story
async def test_compute_and_money_are_held_until_the_row_says_what_they_were(counters):
    limits = [limit(Unit.COMPUTE_SECONDS, Window.HOUR, 5000), limit(Unit.COST, Window.DAY, 1000)]
    await counters.reserve(limits, "r1", 10, compute=3000, cost=600)
    assert await counters.settle("r1", 7) == 1
    assert await counters.look(limits) == [(0, 3000), (0, 600)]
    refused = await counters.reserve(limits, "r2", 10, compute=3000, cost=100)
    assert [level.full for level in refused.levels] == [True, False]
    assert await counters.close("r1", 7, compute=1234, cost=42) == 1
    assert await counters.look(limits) == [(1234, 0), (42, 0)]


@story
async def test_a_row_settles_what_nobody_settled(counters):
    limits = [tokens(1000), limit(Unit.CONCURRENT, Window.MOMENT, 1)]
    await counters.reserve(limits, "r1", 100)
    assert await counters.close("r1", 70) == 1
    assert await counters.settle("r1", 70) == 0
    assert await counters.look(limits) == [(70, 0), (0, 0)]


@story
async def test_the_row_has_the_last_word_about_tokens(counters):
    limits = [tokens(1000), tokens(5000, Window.DAY), limit(Unit.COST, Window.DAY, 10**9)]
    for id, used, row in (("r1", 50, 70), ("r2", 50, 20), ("r3", 50, 0), ("r4", 0, 9)):
        await counters.reserve(limits, id, 100, cost=500)
        assert await counters.settle(id, used) == 1
        assert [await counters.close(id, row, cost=1) for _ in range(2)] == [1, 0]
        assert await counters.settle(id, used) == 0
    assert await counters.look(limits) == [(99, 0), (99, 0), (4, 0)]


@story
async def test_the_row_has_it_after_the_lease_as_well(counters):
    limits = [tokens(1000, Window.DAY)]
    for id in ("r1", "r2"):
        await counters.reserve(limits, id, 100)
    await counters.settle("r1", 50, now=NOON + 10)
    assert {at.tokens for at in await counters.expire(NOON + 10 + LEASE)} == {50, None}
    await counters.settle("r2", 50, now=NOON + 20 + LEASE)
    assert await counters.look(limits) == [(100, 0)]
    for id in ("r1", "r2"):
        assert await counters.close(id, 70, now=NOON + 30 + LEASE) == 1
    assert await counters.look(limits) == [(140, 0)]


@story
async def test_a_count_that_is_lost_is_not_corrected(counters):
    limits = [tokens(1000)]
    await counters.reserve(limits, "r1", 100)
    await counters.settle("r1", 50)
    await counters.redis.delete(*await counters.redis.keys("*:b:*"))
    assert await counters.close("r1", 70) == 1
    assert await counters.redis.keys("*:b:*") == []


@story
async def test_so_many_at_once_and_no_more(counters):
    limits = [limit(Unit.CONCURRENT, Window.MOMENT, 3)]
    answers = await asyncio.gather(*(counters.reserve(limits, f"r{i}") for i in range(20)))
    assert sum(answer.taken for answer in answers) == 3
    taken = [f"r{i}" for i, answer in enumerate(answers) if answer.taken]
    await counters.settle(taken[0], 5)
    assert (await counters.reserve(limits, "next")).taken
    assert not (await counters.reserve(limits, "after")).taken
    # One whose end nobody tells holds its place for as long as its lease.
    assert (await counters.reserve(limits, "late", now=NOON + LEASE)).taken


@story
async def test_of_a_key_and_of_a_model_are_counted_apart(counters):
    of_key = [Limit("*", "*", Unit.REQUESTS, Window.HOUR, 1, key="k1")]
    assert (await counters.reserve(of_key, "r1", key="k1")).taken
    assert not (await counters.reserve(of_key, "r2", key="k1")).taken
    assert (await counters.reserve(of_key, "r3", key="k2")).taken


@story
async def test_a_shadow_counts_and_refuses_nothing(counters):
    limits = [Limit("*", "*", Unit.TOKENS, Window.HOUR, 10, shadow=True), tokens(1000)]
    answers = [await counters.reserve(limits, f"r{i}", 8) for i in range(3)]
    assert [answer.taken for answer in answers] == [True, True, True]
    assert [answer.levels[0].full for answer in answers] == [False, True, True]
    assert [answer.levels[0].refuses for answer in answers] == [False, False, False]
    assert answers[2].levels[0].reserved == 24


@story
async def test_hard_gives_what_is_left_and_never_more(counters):
    limits = [tokens(100), tokens(1000, Window.DAY)]
    answers = [await counters.reserve(limits, f"r{i}", 60, least=10) for i in range(3)]
    assert [(answer.taken, answer.held) for answer in answers[:2]] == [(True, 60), (True, 40)]
    assert not answers[2].taken
    await counters.settle("r0", 45)
    # 15 are left, and fewer than 16 are of no use.
    assert not (await counters.reserve(limits, "r3", 60, least=16)).taken
    assert (await counters.reserve(limits, "r4", 60, least=15)).held == 15


@story
async def test_what_was_spent_before_is_asked_for(counters):
    limits = [tokens(1000), limit(amount=10, window=Window.DAY)]
    assert not (await counters.ask(limits)).known
    assert await counters.open() == 0
    met = rules.buckets(limits, "g", "m", "k", NOON)
    await counters.seed([(met[0].hold(0), 990), (met[1].hold(0), 7)], ["old"])
    answer = await counters.ask(limits, "r1", 5)
    assert (answer.known, answer.taken) == (True, True)
    assert [(at.used, at.reserved) for at in answer.levels] == [(990, 5), (8, 0)]
    # That one is in those sums.
    assert await counters.settle("old", 100) == -1
    assert await counters.charge(met, "old", 100) == 0
    # A window that begins from now on begins empty; one that began before must be asked for.
    assert (await counters.ask(limits, "r2", now=NOON + 3600)).known
    assert not (await counters.ask([limit(amount=3, window=Window.MONTH)], "r3")).known


@story
async def test_telling_what_was_spent_changes_no_count_that_is_there(counters):
    limits = [tokens(1000)]
    await counters.reserve(limits, "r1", 30)
    met = rules.buckets(limits, "g", "m", "k", NOON)
    await counters.seed([(met[0].hold(0), 500)], ["r1"])
    assert await counters.settle("r1", 20) == 1
    assert await counters.look(limits) == [(20, 0)]


@story
async def test_what_is_seeded_into_other_counters_than_were_begun_is_refused(counters):
    met = rules.buckets([tokens(1000)], "g", "m", "k", NOON)
    since = await counters.counters.begin("u", NOON)
    assert await counters.counters.begin("u", NOON + 5) == since
    spent = [(met[0].hold(0), 500)]
    await counters.redis.flushall()
    assert not await counters.counters.seed("u", since, spent, [], NOON)
    later = await counters.counters.begin("u", NOON + 5)
    assert not await counters.counters.seed("u", since, spent, [], NOON)
    assert await counters.counters.seed("u", later, spent, [], NOON)


@story
async def test_a_call_that_was_lost_with_the_counters_is_charged_once(counters):
    limits = [tokens(1000), limit(amount=10), limit(Unit.COST, Window.DAY, 1000)]
    met = rules.buckets(limits, "g", "m", "k", NOON)
    assert await counters.charge(met, "r1", 40) == -1
    await counters.seed([(at.hold(0), 100) for at in met], ["in the rows"])
    assert [await counters.charge(met, "r1", 40) for _ in range(2)] == [1, 0]
    assert await counters.charge(met, "in the rows", 40) == 0
    assert await counters.look(limits) == [(140, 0), (101, 0), (100, 0)]
    # It is on record now, and its row tells what it cost.
    assert await counters.open() == 1
    assert [await counters.close("r1", 40, cost=7) for _ in range(2)] == [1, 0]
    assert await counters.look(limits) == [(140, 0), (101, 0), (107, 0)]
    assert await counters.open() == 0


@story
async def test_a_row_that_was_on_its_way_when_counters_were_built_is_charged_once(counters):
    limits = [tokens(1000), limit(amount=10), limit(Unit.COST, Window.DAY, 1000)]
    met = rules.buckets(limits, "g", "m", "k", NOON)
    await counters.seed([(at.hold(0), 100) for at in met], ["in the rows"])
    late = Call("r1", "u", "k", "g", "openai", "/v1/chat/completions", "m", NOON - 9)
    about = {"began": NOON - 9, "now": NOON + 1}
    assert await counters.close("in the rows", 40, **about) == NOT_KNOWN
    assert await counters.close("r1", 40, cost=7, **about) == NOT_COUNTED
    assert [await counters.close("r1", 40, late=late, **about) for _ in range(2)] == [1, 0]
    assert await counters.settle("r1", 40, now=NOON + 2) == 0
    (lost,) = await counters.expire(NOON + 2)
    assert (lost.call, lost.uncounted) == (late, True)
    # Named again until it is charged, as a lost one is.
    assert await counters.expire(NOON + 3) == []
    assert await counters.expire(NOON + 2 + LEASE // 2) == [lost]
    assert [await counters.charge(met, "r1", 40, stored=True, cost=7) for _ in range(2)] == [1, 0]
    assert await counters.look(limits) == [(140, 0), (101, 0), (107, 0)]
    assert await counters.open() == 0
    # And so also if it is told of again long after it was forgotten for the time being.
    await counters.redis.delete(*await counters.redis.keys("*:r:*"))
    assert await counters.close("r1", 40, began=NOON - 9, now=NOON + 86000) == NOT_KNOWN


@story
async def test_what_began_long_before_counters_were_built_was_in_the_rows(counters):
    met = rules.buckets([tokens(1000)], "g", "m", "k", NOON)
    await counters.seed([(met[0].hold(0), 100)], [])
    for began, now, told in [
        (NOON - ON_THE_WAY, NOON + 1, NOT_COUNTED),
        (NOON - ON_THE_WAY - 1, NOON + 1, NOT_KNOWN),
        (NOON + 59, NOON + 99, NOT_COUNTED),  # clocks differ
        (NOON + 61, NOON + 99, NOT_KNOWN),
        (NOON, NOON + 86399, NOT_COUNTED),
        (NOON, NOON + 86401, NOT_KNOWN),  # the trail is read once more
    ]:
        assert await counters.close("r1", 40, began=began, now=now) == told


@story
async def test_a_call_of_that_time_that_was_on_record_is_never_taken_for_a_late_one(counters):
    """Its record is forgotten after a while, and its row is told of again after that."""
    limits = [tokens(1000)]
    await counters.seed([(rules.buckets(limits, "g", "m", "k", NOON)[0].hold(0), 0)], [])
    await counters.reserve(limits, "r1", 40)
    await counters.close("r1", 40, began=NOON - 1)
    await counters.redis.delete(*await counters.redis.keys("*:r:*"))
    assert await counters.close("r1", 40, began=NOON - 1, now=NOON + 500) == NOT_KNOWN


@story
async def test_what_waits_to_be_charged_and_is_in_the_rows_by_then_is_not(counters):
    """The row came while the rows were read."""
    limits = [tokens(1000)]
    met = rules.buckets(limits, "g", "m", "k", NOON)
    since = await counters.counters.begin("u", NOON + 9)
    late = Call("r1", "u", "k", "g", "openai", "/v1/chat/completions", "m", NOON)
    assert await counters.close("r1", 40, late=late) == 1
    assert await counters.charge(met, "r1", 40, stored=True) == -1
    assert await counters.counters.seed("u", since, [(met[0].hold(0), 40)], ["r1"], NOON)
    assert await counters.charge(met, "r1", 40, stored=True) == 0
    (bucket,) = await counters.redis.keys("*:b:*")
    assert await counters.redis.hgetall(bucket) == {b"used": b"40"}
    assert await counters.open() == 0


@story
async def test_of_two_who_tell_what_was_spent_the_first_counts(counters):
    """The second has seen a row that is not in what the first told."""
    limits = [tokens(1000)]
    met = rules.buckets(limits, "g", "m", "k", NOON)
    since = [await counters.counters.begin("u", NOON) for _ in range(2)]
    assert await counters.counters.seed("u", since[0], [(met[0].hold(0), 100)], [], NOON)
    assert await counters.counters.seed("u", since[1], [(met[0].hold(0), 140)], ["r1"], NOON)
    assert await counters.close("r1", 40) == NOT_COUNTED
    assert await counters.charge(met, "r1", 40, stored=True) == 1
    assert await counters.look(limits) == [(140, 0)]


@story
async def test_nothing_is_charged_to_a_window_that_is_over_and_forgotten(counters):
    limits = [tokens(1000), tokens(5000, Window.DAY)]
    before = rules.buckets(limits, "g", "m", "k", NOON - 1)
    now = rules.buckets(limits, "g", "m", "k", NOON)
    await counters.seed([(at.hold(0), 0) for at in now], [])
    assert await counters.charge(before, "r1", 40) == 1
    assert await counters.look(limits) == [(0, 0), (40, 0)]
    assert not [key for key in await counters.redis.keys() if before[0].name.encode() in key]


@story
async def test_absurd_amounts_are_counted_as_far_as_counters_go(counters):
    limits = [limit(Unit.COST, Window.DAY, 10**15), tokens(10**15)]
    met = rules.buckets(limits, "g", "m", "k", NOON)
    await counters.seed([(at.hold(0), 2**70) for at in met], [])
    for i in range(3):
        assert await counters.charge(met, f"r{i}", 2**62, stored=True, cost=2**62) == 1
    assert await counters.look(limits) == [(2**53, 0), (2**53, 0)]


@story
async def test_how_often_there_was_no_room_is_counted(counters):
    """In the shadow, where a call is let in; else, where it is not."""
    shadow = Limit("*", "*", Unit.TOKENS, Window.HOUR, 10, shadow=True)
    at_once = Limit("*", "*", Unit.CONCURRENT, Window.MOMENT, 1, shadow=True)
    limits = [shadow, at_once, limit(amount=3), limit(amount=100, window=Window.DAY)]
    for i in range(5):
        await counters.reserve(limits, f"r{i}", 8)
        await counters.reserve(limits, f"r{i}", 8)  # the same call again is the same call
    met = rules.buckets(limits, "g", "m", "k", NOON)
    names = [(at.name, at.limit.unit) for at in met]
    assert await counters.counters.without_room("u", names) == [2, 2, 4, 0]
    later = rules.buckets(limits, "g", "m", "k", NOON + 3600)
    names = [(at.name, at.limit.unit) for at in later]
    assert await counters.counters.without_room("u", names) == [0, 2, 0, 0]
    assert await counters.counters.without_room("u", []) == []
    lives = [await counters.redis.ttl(key) for key in await counters.redis.keys("*:no_room")]
    assert lives == [86400]


@story
async def test_what_is_only_asked_for_leaves_no_trace(counters):
    limits = [limit(amount=1), limit(Unit.CONCURRENT, Window.MOMENT, 1), tokens(10)]
    await counters.reserve(limits, "r1", 8)
    before = {key: await counters.redis.dump(key) for key in await counters.redis.keys()}
    refused = await counters.ask(limits, "r2", 8, take=False)
    assert not refused.taken
    assert [level.full for level in refused.levels] == [True, True, True]
    assert (await counters.ask([limit(amount=2)], "r3", take=False)).taken
    assert (await counters.ask(limits, "r1", 8, take=False)).taken  # it was, before
    assert {key: await counters.redis.dump(key) for key in await counters.redis.keys()} == before


@story
async def test_a_nudge_leaves_no_trace(counters):
    """Redis goes through the script once more, and nobody holds or spends more than before."""
    limits = [limit(amount=1), limit(Unit.CONCURRENT, Window.MOMENT, 1), tokens(10)]

    async def runs() -> int:
        return int((await counters.redis.info("commandstats"))["cmdstat_evalsha"]["calls"])

    counters.counters.nudge()  # of nothing yet
    for id in ("r1", "r2"):  # of a call that found room, and of one that did not
        await counters.reserve(limits, id, 8)
        counters.counters.make_ready()
        keys = await counters.redis.keys()
        before, ran = {key: await counters.redis.dump(key) for key in keys}, await runs()
        counters.counters.nudge()
        counters.counters.nudge()  # of which one is enough
        again = await counters.ask(limits, "r1", 8)
        assert (again.taken, again.held) == (True, 8)
        assert await runs() == ran + 2
        assert sorted(await counters.redis.keys()) == sorted(keys)
        assert {key: await counters.redis.dump(key) for key in keys} == before


@story
async def test_refusals_alone_leave_nothing_that_would_be_taken_for_a_count(counters):
    limits = [limit(amount=0), limit(amount=0, window=Window.DAY)]
    assert not (await counters.reserve(limits)).taken
    lives = sorted([await counters.redis.ttl(key) for key in await counters.redis.keys("*:b:*")])
    assert lives == [3600 + LEASE, 12 * 3600 + LEASE]
    await counters.redis.delete(*await counters.redis.keys("*:known:*"))
    assert not (await counters.ask(limits)).known


@story
async def test_a_clock_that_jumps_loses_no_charge(counters):
    """An hour ahead, a call of the hour before is settled, and then the clock is right again."""
    limits = [tokens(1000)]
    await counters.reserve(limits, "r1", 100)
    await counters.reserve(limits, "r2", 100)
    ahead = NOON + 2 * 3600
    assert await counters.settle("r1", 40, now=ahead) == 1
    assert await counters.close("r2", 50, now=ahead) == 1
    assert await counters.look(limits) == [(90, 0)]
    await counters.reserve(limits, "r3", 100, now=ahead)
    assert await counters.settle("r3", 30) == 1
    assert await counters.look(limits) == [(90, 0)]
    assert await counters.look(limits, now=ahead) == [(30, 0)]


@story
async def test_a_clock_that_jumps_ahead_ends_leases_and_what_was_used_still_counts(counters):
    limits = [tokens(1000), limit(Unit.CONCURRENT, Window.MOMENT, 2)]
    await counters.reserve(limits, "r1", 100)
    (lost,) = await counters.expire(NOON + 3600)
    assert lost.call.request_id == "r1"
    assert await counters.look(limits) == [(0, 0), (0, 0)]
    assert await counters.settle("r1", 40) == 1
    assert await counters.look(limits) == [(40, 0), (0, 0)]


@story
async def test_an_hour_ends_and_the_day_still_counts(counters):
    limits = [limit(amount=2), limit(amount=3, window=Window.DAY)]
    for i in range(2):
        assert (await counters.reserve(limits, f"r{i}")).taken
    assert not (await counters.reserve(limits, "r2", now=NOON + 3599)).taken
    assert (await counters.reserve(limits, "r3", now=NOON + 3600)).taken
    refused = await counters.reserve(limits, "r4", now=NOON + 3600)
    assert [(level.used, level.full) for level in refused.levels] == [(1, False), (3, True)]
    assert (await counters.reserve(limits, "r5", now=NOON + 12 * 3600)).taken


@story
async def test_a_call_is_charged_in_the_window_it_began_in(counters):
    limits = [tokens(1000)]
    await counters.reserve(limits, amount=300, now=NOON + 3590)
    assert await counters.settle(used=120, now=NOON + 3610) == 1
    assert await counters.look(limits, now=NOON + 3599) == [(120, 0)]
    assert await counters.look(limits, now=NOON + 3600) == [(0, 0)]


@story
async def test_a_changed_limit_keeps_its_count(counters):
    for i in range(3):
        await counters.reserve([limit(amount=5)], f"r{i}")
    assert not (await counters.reserve([limit(amount=3)], "r4")).taken
    assert (await counters.reserve([limit(amount=4)], "r5")).levels[0].used == 4


@story
async def test_who_and_what_is_counted_apart(counters):
    per_model = [limit(amount=1, model="a"), limit(amount=1, model="b")]
    assert (await counters.reserve(per_model, "r1", user="u1", model="a")).taken
    assert not (await counters.reserve(per_model, "r2", user="u1", model="a")).taken
    assert (await counters.reserve(per_model, "r3", user="u1", model="b")).taken
    assert (await counters.reserve(per_model, "r4", user="u2", model="a")).taken


@story
async def test_models_under_one_pattern_share_its_count(counters):
    limits = [limit(amount=1, model="smol*")]
    assert (await counters.reserve(limits, "r1", model="smollm2")).taken
    assert not (await counters.reserve(limits, "r2", model="smollm3")).taken
    assert (await counters.reserve(limits, "r3", model="llama3")).taken


@pytest.mark.parametrize(
    "name",
    ["a:b", "}{", "{", "}", "a}:open", "模型 🦙", "x" * 10_000, "a b c", "a\nb 1 2", "%", "*"],
    ids=range(11),
)
def test_hostile_names_are_only_names(valkey, name):
    async def told(redis):
        async with counting(redis) as counters:
            limits = [limit(model=name, gateway=name), tokens(100)]
            about = {"gateway": name, "model": name, "user": name}
            assert (await counters.reserve(limits, name, 60, **about)).taken
            assert await counters.settle(name, 50, user=name) == 1
            seen = await counters.reserve(limits, "r2", 50, **about)
            assert [(at.used, at.reserved) for at in seen.levels] == [(2, 0), (50, 50)]
            tags = {key[: key.index(b"}") + 1] for key in await redis.keys()}
            assert len(tags) == 1
            lost = await counters.expire(NOON + LEASE + 1)
            told = {(at.call.user, at.call.model, at.call.request_id) for at in lost}
            assert told == {(name, name, name), (name, name, "r2")}

    valkey.run(told)


@story
async def test_every_count_expires_after_its_window(counters):
    limits = [limit(window=Window.MINUTE), tokens(1000)]
    await counters.reserve(limits, "r1", 10)
    await counters.settle("r1", 5)
    await counters.reserve(limits, "r2", 10)
    lives = {key: await counters.redis.ttl(key) for key in await counters.redis.keys()}
    await counters.close("r1", 5)
    lives = {key: await counters.redis.ttl(key) for key in await counters.redis.keys()}
    hour, minute = 3600 + LEASE, 60 + LEASE
    assert [lives.pop(key) for key in list(lives) if key.endswith(b":open")] == [-1]
    known = 40 * 86400  # longer than any window
    assert sorted(round(seconds, -1) for seconds in lives.values()) == [
        120, minute, hour, hour + 3 * LEASE, known
    ]  # fmt: skip


@story
async def test_a_bucket_that_was_lost_is_charged_and_expires(counters):
    limits = [tokens(1000)]
    await counters.reserve(limits, amount=300)
    (bucket,) = [key for key in await counters.redis.keys() if b"tokens" in key]
    await counters.redis.delete(bucket)
    assert await counters.settle(used=120) == 1
    assert await counters.look(limits) == [(120, 0)]
    assert await counters.redis.ttl(bucket) > 0


@story
async def test_fifty_at_once_against_ten(counters):
    limits = [limit(amount=10), tokens(10**6)]
    answers = await asyncio.gather(*(counters.reserve(limits, f"r{i}") for i in range(50)))
    assert sum(answer.taken for answer in answers) == 10
    assert await counters.look(limits) == [(10, 0), (0, 10)]


@story
async def test_fifty_at_once_against_tokens_for_ten(counters):
    """Each names 90 to write, and 10 for its prompt; what is spent never passes the quota."""
    limits = [tokens(1000)]

    async def call(id):
        taken = (await counters.reserve(limits, id, 100)).taken
        if taken:
            await counters.settle(id, 100)
        return taken

    passed = sum(await asyncio.gather(*(call(f"r{i}") for i in range(50))))
    ((used, reserved),) = await counters.look(limits)
    assert passed >= 9
    assert (used, reserved) == (100 * passed, 0)
    assert used <= 1000


def test_two_processes_share_one_count(valkey):
    async def told(redis):
        async with valkey.client() as second, counting(redis) as one, counting(second) as other:
            limits = [limit(amount=10), tokens(10**6)]
            answers = await asyncio.gather(
                *(who.reserve(limits, f"{n}-{i}") for n, who in ((1, one), (2, other))
                  for i in range(25))
            )  # fmt: skip
            assert sum(answer.taken for answer in answers) == 10
            await one.reserve([tokens(100)], "mine", 60)
            assert await other.settle("mine", 50) == 1
            assert await one.look([tokens(100)]) == [(50, 10)]

    valkey.run(told)
