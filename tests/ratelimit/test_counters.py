"""The counters on a real Valkey: what is taken, what is given back, and that nothing is lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import uvloop
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from parallama.counters import Call, Counters, Lost
from parallama.limits import Limit, Unit, Window
from ratelimit import rules
from tests.examples import examples

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
        least=0, compute=0, cost=0,
    ) -> Answer:  # fmt: skip
        met = rules.buckets(limits, gateway, model, key, now)
        need = rules.Need(0, amount, compute, cost)
        call = Call(id, user, key, gateway, "openai", "/v1/chat/completions", model, now)
        holds = [at.hold(need.of(at.limit.unit)) for at in met]
        taken = await self.counters.reserve(call, holds, tokens=amount, least=least, now=now)
        levels = [
            rules.Level(at, level.used, level.reserved, level.full)
            for at, level in zip(met, taken.levels, strict=False)
        ]
        return Answer(taken.taken, taken.tokens, levels, taken.known)

    async def reserve(self, limits, id="r", amount=1, *, user="u", **about) -> Answer:
        """As `ask`, of a user who has spent nothing before."""
        answer = await self.ask(limits, id, amount, user=user, **about)
        if not answer.known:
            await self.counters.seed(user, [], [], 0)
            answer = await self.ask(limits, id, amount, user=user, **about)
        return answer

    async def settle(self, id="r", used=0, *, user="u", now=NOON) -> int:
        return await self.counters.settle(user, id, used, now)

    async def close(self, id="r", used=0, *, user="u", now=NOON, compute=0, cost=0) -> int:
        amounts = {"tokens": used, "compute": compute, "cost": cost}
        return await self.counters.close(user, id, **amounts, now=now)

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
    assert await counters.settle("never", 100) == -2
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
    # What it cost nobody knows: what was held is charged.
    assert await counters.look(limits) == [(50, 0), (500, 0)]


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
    spent = [(met[0].hold(0), 990), (met[1].hold(0), 7)]
    await counters.counters.seed("u", spent, ["old"], NOON)
    answer = await counters.ask(limits, "r1", 5)
    assert (answer.known, answer.taken) == (True, True)
    assert [(at.used, at.reserved) for at in answer.levels] == [(990, 5), (8, 0)]
    # That one is in those sums.
    assert await counters.settle("old", 100) == 0
    # A window that begins from now on begins empty; one that began before must be asked for.
    assert (await counters.ask(limits, "r2", now=NOON + 3600)).known
    assert not (await counters.ask([limit(amount=3, window=Window.MONTH)], "r3")).known


@story
async def test_telling_what_was_spent_changes_no_count_that_is_there(counters):
    limits = [tokens(1000)]
    await counters.reserve(limits, "r1", 30)
    met = rules.buckets(limits, "g", "m", "k", NOON)
    await counters.counters.seed("u", [(met[0].hold(0), 500)], ["r1"], NOON)
    assert await counters.settle("r1", 20) == 1
    assert await counters.look(limits) == [(20, 0)]


@story
async def test_a_call_that_was_lost_with_the_counters_is_charged_once(counters):
    limits = [tokens(1000)]
    met = rules.buckets(limits, "g", "m", "k", NOON)
    spent = [(met[0].hold(0), 40)]
    assert await counters.counters.charge("u", "r1", spent, NOON) == -2
    await counters.counters.seed("u", [(met[0].hold(0), 100)], ["in the rows"], NOON)
    charged = [await counters.counters.charge("u", "r1", spent, NOON) for _ in range(2)]
    assert charged == [1, 0]
    assert await counters.counters.charge("u", "in the rows", spent, NOON) == 0
    assert await counters.look(limits) == [(140, 0)]


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


QUOTA, LARGEST = 100, 40


class ReserveAndSettle(RuleBasedStateMachine):
    """
    Any order of reserving, settling, repeating and letting leases end.

    A model beside it knows what was really spent: in each window no more than the quota, and one
    lone call's crossing of it, as long as calls use no more than was held and end in their lease.
    """

    valkey = None

    @initialize()
    def begin(self):
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.valkey.flush()
        self.redis = self.valkey.client()
        self.counters = Desk(self.redis)
        self.now = NOON
        self.limits = [limit(amount=1000), tokens(QUOTA), tokens(3 * QUOTA, Window.DAY)]
        self.open = {}  # id: held, lease end, hour
        self.settled = {}  # id: used, lease end
        self.spent = {}  # hour: tokens
        self.admitted = 0

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def hour(self):
        return self.now // 3600

    @rule(amount=st.integers(1, LARGEST))
    def reserve(self, amount):
        id = f"r{self.admitted}"
        if self.run(self.counters.reserve(self.limits, id, amount, now=self.now)).taken:
            self.admitted += 1
            self.open[id] = (amount, self.now + LEASE, self.hour())

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=st.floats(0, 1), again=st.booleans())
    def settle(self, data, share, again):
        id = data.draw(st.sampled_from(sorted(self.open)))
        held, _, hour = self.open.pop(id)
        used = int(held * share)
        assert self.run(self.counters.settle(id, used, now=self.now)) == 1
        if again:
            assert self.run(self.counters.settle(id, used, now=self.now)) == 0
        self.settled[id] = (used, self.now + LEASE)
        self.spent[hour] = self.spent.get(hour, 0) + used

    @precondition(lambda self: self.settled)
    @rule(data=st.data(), again=st.booleans())
    def close(self, data, again):
        id = data.draw(st.sampled_from(sorted(self.settled)))
        used, _ = self.settled.pop(id)
        assert self.run(self.counters.close(id, used, now=self.now)) == 1
        if again:
            assert self.run(self.counters.close(id, used, now=self.now)) == 0
            assert self.run(self.counters.settle(id, used, now=self.now)) == 0

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=st.floats(0, 1))
    def close_what_nobody_settled(self, data, share):
        id = data.draw(st.sampled_from(sorted(self.open)))
        held, _, hour = self.open.pop(id)
        used = int(held * share)
        assert self.run(self.counters.close(id, used, now=self.now)) == 1
        self.spent[hour] = self.spent.get(hour, 0) + used

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def ask_again(self, data):
        id = data.draw(st.sampled_from(sorted(self.open)))
        again = self.run(self.counters.reserve(self.limits, id, 7, now=self.now))
        assert (again.taken, again.held) == (True, self.open[id][0])

    @rule(seconds=st.sampled_from([1, 60, LEASE, 3600]))
    def wait(self, seconds):
        self.now += seconds
        lost = self.run(self.counters.expire(self.now))
        self.run(self.counters.counters.drop(lost))
        over = {id: None for id, call in self.open.items() if call[1] <= self.now}
        over |= {id: used for id, (used, end) in self.settled.items() if end <= self.now}
        assert {at.call.request_id: at.tokens for at in lost} == over
        self.open = {id: call for id, call in self.open.items() if id not in over}
        self.settled = {id: call for id, call in self.settled.items() if id not in over}

    @invariant()
    def no_more_is_spent_than_the_quota_and_one_crossing(self):
        assert all(spent < QUOTA + LARGEST for spent in self.spent.values())

    @invariant()
    def the_counters_are_what_happened(self):
        (requests, _), hour, day = self.run(self.counters.look(self.limits, now=self.now))
        assert requests <= self.admitted
        held = sum(held for held, _, begun in self.open.values() if begun == self.hour())
        assert hour == (self.spent.get(self.hour(), 0), held)
        assert day[0] == sum(self.spent.values()) or self.now >= NOON + 12 * 3600
        assert min(*hour, *day) >= 0
        assert self.run(self.counters.open()) == len(self.open) + len(self.settled)

    def teardown(self):
        if not hasattr(self, "runner"):
            return
        for id in (*self.open, *self.settled):
            self.run(self.counters.close(id, 0, now=self.now))
        assert self.run(self.counters.open()) == 0
        self.run(self.counters.counters.aclose())
        self.run(self.redis.aclose())
        self.runner.close()


@pytest.mark.hypothesis
def test_any_order_of_events(valkey):
    ReserveAndSettle.valkey = valkey
    run_state_machine_as_test(
        ReserveAndSettle,
        settings=examples(
            25,
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
        ),
    )
