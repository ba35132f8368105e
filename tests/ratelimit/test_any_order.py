"""Whatever happens in whatever order, and whatever is lost: nothing is spent twice or forgotten."""

import asyncio
import inspect
from dataclasses import dataclass
from datetime import UTC
from decimal import Decimal

import pytest
import uvloop
from envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
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

from parallama.counters import ON_THE_WAY, Counters
from parallama.counters.closing import close_all
from parallama.db.policies import Policy
from parallama.limits import Grant, Limit, Unit, Window
from parallama.prices import Price, Prices
from ratelimit import rules
from ratelimit.charging import Charging
from ratelimit.estimate import Estimate
from ratelimit.lost import Finder
from ratelimit.outage import Outage
from ratelimit.rebuild import Rebuild
from ratelimit.service import RateLimit
from tests.examples import examples
from tests.ratelimit.books import Books, a_row
from tests.ratelimit.calls import reserve_call, settle_call

BEGIN = 1_700_049_600.0 + 3300  # 2023-11-15 12:55:00 UTC
LEASE = 600
LARGEST = 40  # tokens of one call
HOUR, DAY, GRANT = 300, 800, 150

LIMITS = (
    Limit("*", "*", Unit.TOKENS, Window.HOUR, HOUR),
    Limit("openai", "*", Unit.TOKENS, Window.DAY, DAY),
    Limit("*", "smol*", Unit.REQUESTS, Window.HOUR, 25),
    Limit("*", "*", Unit.REQUESTS, Window.DAY, 3, shadow=True),
    Limit("*", "*", Unit.COMPUTE_SECONDS, Window.DAY, 10**6),
    Limit("*", "*", Unit.COST, Window.MONTH, 10**6),
    Limit("*", "*", Unit.CONCURRENT, Window.MOMENT, 8),
)
GRANTS = (
    Grant("g1", "*", "*", Unit.TOKENS, GRANT, BEGIN - 100, BEGIN + 6000),
    Grant("g2", "*", "smollm2", Unit.REQUESTS, 4, BEGIN - 100, BEGIN + 90_000),
)
POLICY = Policy(LIMITS, GRANTS)


@dataclass
class Open:
    """A call that was let in, and has no row yet."""

    began: float
    held: int
    grants: str
    used: int | None = None
    """Once it has ended."""
    on_record: bool = True


class Gateway:
    """The service, the finder and the sink as they run, on one Valkey; rows are in memory."""

    def __init__(self, redis, *, hard: bool) -> None:
        self.now = BEGIN
        self.books = Books()
        self.counters = Counters(redis, lease=LEASE, timeout=5)
        rebuild = Rebuild(self.counters, self.books.spending)
        clock = lambda: self.now  # noqa: E731
        charging = Charging(self.counters, self, rebuild, clock=clock, zone=UTC)
        self.service = RateLimit(
            self.counters,
            self,
            clock=clock,
            zone=UTC,
            estimate=Estimate(bytes_per_token=1, default_max_tokens=LARGEST),
            prices=Prices(self.prices),
            rebuild=rebuild,
            charging=charging,
            outage=Outage({"openai": "deny"}, processes=1, monotonic=lambda: 0.0),
            hard=hard,
        )

        async def charge(call, spent) -> None:
            await charging.charge(call, spent, stored=True)

        books = self.books
        self.finder = Finder(
            self.counters, books.add_lost, books.spent_by, charge, books.name_of, clock=clock
        )

    def known(self, user: str) -> Policy:
        return POLICY

    async def policy_of(self, user: str) -> Policy:
        return POLICY

    async def prices(self) -> tuple[Price, ...]:
        each = Decimal("0.001")  # of a million tokens: one token costs one part
        return (Price("*", each, each),)

    async def reserve(self, id: str, amount: int) -> tuple[bool, int, str]:
        request = reserve_call(id, max_tokens=str(amount), body_bytes="")
        answer = self.service.should_rate_limit(request.SerializeToString())
        assert inspect.isawaitable(answer)
        told = RateLimitResponse.FromString(await answer)
        facts = dict(told.dynamic_metadata)
        admitted = told.overall_code == RateLimitResponse.OK
        return admitted, int(facts.get("granted", 0)), str(facts.get("grants", ""))

    async def settle(self, id: str, used: int, grants: str) -> None:
        request = settle_call(id, used, grants=grants)
        assert not inspect.isawaitable(self.service.should_rate_limit(request.SerializeToString()))
        await self.service.aclose()

    async def tell(self, *ids: str) -> None:
        """As usage_sink does, of rows that are stored."""
        await close_all(self.counters, [self.books.rows[id] for id in ids], self.now)


class AnyOrder(RuleBasedStateMachine):
    """
    A model beside the service knows what was let in, what ended and what was stored.

    Without an accident no window is overspent but for one lone call's crossing, and with hard
    limits not at all. What may be spent beyond is what was in flight when counters were lost or
    leases ended. When all is told in the end, each counter is what the rows say.
    """

    valkey = None

    @initialize(hard=st.booleans())
    def begin(self, hard):
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.valkey.flush()
        self.redis = self.valkey.client()
        self.hard = hard
        self.run(self.make())
        self.open: dict[str, Open] = {}
        self.calls: dict[str, Open] = {}
        self.untold: set[str] = set()
        self.latest = self.at.now
        self.beyond = 0
        self.admitted = 0

    async def make(self):
        self.at = Gateway(self.redis, hard=self.hard)

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def draw(self, data) -> str:
        return data.draw(st.sampled_from(sorted(self.open)))

    def row(self, id: str, share: float):
        call = self.open.pop(id)
        if call.used is None:
            call.used = int(call.held * share)
        self.at.books.store(a_row(id, call.began, call.used, call.used + 3, call.grants))

    @rule(amount=st.integers(1, LARGEST))
    def reserve(self, amount):
        id = f"r{self.admitted}"
        taken, held, grants = self.run(self.at.reserve(id, amount))
        if taken:
            self.admitted += 1
            self.calls[id] = self.open[id] = Open(self.at.now, held, grants)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=st.floats(0, 1), twice=st.booleans())
    def settle(self, data, share, twice):
        id = self.draw(data)
        call = self.open[id]
        if call.used is None:
            call.used = int(call.held * share)
        for _ in range(1 + twice):
            self.run(self.at.settle(id, call.used, call.grants))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=st.floats(0, 1))
    def store(self, data, share):
        """The row comes, perhaps before the service is told of the end."""
        id = self.draw(data)
        self.row(id, share)
        self.run(self.at.tell(id))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=st.floats(0, 1))
    def store_and_die(self, data, share):
        """usage_sink is killed before it tells the counters: what is on record is found there."""
        id = self.draw(data)
        on_record = self.open[id].on_record and id not in self.at.books.rows
        self.row(id, share)
        if not on_record:
            self.untold.add(id)  # then only the trail tells of it

    @precondition(lambda self: self.at.books.rows)
    @rule(data=st.data())
    def tell_again(self, data):
        """The trail is replayed, by one sink or another."""
        id = data.draw(st.sampled_from(sorted(self.at.books.rows)))
        if id not in self.open:
            self.run(self.at.tell(id))

    @rule()
    def forget_what_is_done(self):
        """Records live for two minutes after that."""

        async def forget():
            for key in await self.redis.keys("*:r:*"):
                if (await self.redis.get(key)).startswith(b"d"):
                    await self.redis.delete(key)

        self.run(forget())

    @rule(data=st.data(), how=st.sampled_from(["settled", "stored", "killed", "nothing"]))
    def lose(self, data, how):
        """Redis comes back empty, and this happens before, while and after rows are read."""
        if any(call.began <= self.at.now - ON_THE_WAY for call in self.open.values()):
            return  # a row that is so late is not waited for
        if any(call.began > self.at.now for call in self.calls.values()):
            return  # nor looked for where it is not yet by a clock that was set back
        if not self.open.keys().isdisjoint(self.at.books.rows):
            return  # nor the second row of a lost call
        hours = {call.began // 3600 for call in self.open.values()}
        if how == "killed" and not hours <= {self.at.now // 3600}:
            return  # nobody is left who knows in which window a call began
        for call in self.open.values():
            self.beyond += call.held
            call.on_record = False
        self.valkey.flush()
        if how == "killed":
            self.run(self.remake())
        if self.open and how in ("settled", "killed"):
            self.settle(data, 0.5, twice=False)
        if self.open and how == "stored":
            self.row(id := self.draw(data), 0.5)
            self.run(self.at.tell(id))
        told = []
        if self.open:
            late = self.draw(data)

            def meanwhile():
                self.row(late, 0.7)
                told.append(asyncio.ensure_future(self.at.tell(late)))

            self.at.books.meanwhile = meanwhile
        self.reserve(1)
        self.run(asyncio.sleep(0))
        assert len(told) <= 1
        self.at.books.meanwhile = None
        for task in told:
            self.run(_ended(task))

    async def remake(self):
        """ratelimit is killed and started again."""
        books, now = self.at.books, self.at.now
        await self.at.service.aclose()
        await self.at.counters.aclose()
        await self.make()
        self.at.now = now
        self.at.books.rows = books.rows

    @rule()
    def look_for_lost_calls(self):
        for call in self.open.values():
            if call.began + LEASE <= self.at.now:
                self.beyond += call.held
        self.run(self.at.finder.look())

    @rule(seconds=st.sampled_from([1, 60, LEASE, 1200]))
    def wait(self, seconds):
        self.at.now += seconds
        self.look_for_lost_calls()

    @rule(seconds=st.sampled_from([-3600, -1200, 1200, 3600]))
    def jump(self, seconds):
        """The clock is set, for all at once."""
        self.latest = max(self.latest, self.at.now)
        self.at.now += seconds

    @invariant()
    def no_more_is_spent_than_was_allowed(self):
        crossing = 0 if self.hard else LARGEST
        hours: dict[float, int] = {}
        days: dict[float, int] = {}
        granted = 0
        for call in self.calls.values():
            used = call.used or 0
            if "tokens:g1" in call.grants:
                granted += used
            else:
                hours[call.began // 3600] = hours.get(call.began // 3600, 0) + used
                days[call.began // 86400] = days.get(call.began // 86400, 0) + used
        assert all(spent <= HOUR + crossing + self.beyond for spent in hours.values())
        assert all(spent <= DAY + crossing + self.beyond for spent in days.values())
        assert granted <= GRANT + crossing + self.beyond

    @invariant()
    def no_counter_is_negative(self):
        if hasattr(self, "runner"):
            for _, count in self.run(self.counts()).items():
                assert min(count, default=0) >= 0

    async def counts(self) -> dict[str, tuple[int, int]]:
        found = {}
        for key in await self.redis.keys("*:b:*"):
            if await self.redis.type(key) == b"hash":
                count = await self.redis.hgetall(key)
                name = key.decode().partition(":b:u1:")[2]
                found[name] = (int(count.get(b"used", 0)), int(count.get(b"reserved", 0)))
        return found

    def teardown(self):
        if not hasattr(self, "runner"):
            return
        try:
            self.all_is_told()
            self.every_counter_is_what_the_rows_say()
        finally:
            self.run(self.at.counters.aclose())
            self.run(self.redis.aclose())
            self.runner.close()

    def all_is_told(self):
        for id in list(self.open):
            self.row(id, 0.3)
            self.run(self.at.tell(id))
        self.run(self.at.tell(*self.untold))
        self.at.now = max(self.latest, self.at.now)
        for _ in range(4):
            self.run(self.at.finder.look())
            self.at.now += 2 * LEASE
        keys = self.run(self.redis.keys("*:open"))
        assert sum(self.run(self.redis.zcard(key)) for key in keys) == 0

    def every_counter_is_what_the_rows_say(self):
        rows = self.at.books.rows.values()
        assert {row.token_source for row in rows} <= {"reported"}
        assert len(rows) == self.admitted
        counts = self.run(self.counts())
        moments = {call.began for call in self.calls.values()} | {self.at.now}
        seen = {at.name: at for now in moments for at in rules.running(LIMITS, GRANTS, now)}
        for bucket in seen.values():
            if bucket.name not in counts:
                continue
            counted = [
                row.spent
                for row in rows
                if bucket.counts("openai", "smollm2", "", row.grants or "")
                and bucket.start <= row.timestamp.timestamp() < bucket.end
            ]
            amounts = {
                Unit.REQUESTS: len(counted),
                Unit.TOKENS: sum(spent.tokens for spent in counted),
                Unit.COMPUTE_SECONDS: sum(spent.compute for spent in counted),
                Unit.COST: sum(spent.cost for spent in counted),
            }
            assert counts[bucket.name] == (amounts[bucket.limit.unit], 0), bucket.name


async def _ended(task) -> None:
    await task


@pytest.mark.hypothesis
def test_any_order_of_events(valkey):
    AnyOrder.valkey = valkey
    run_state_machine_as_test(
        AnyOrder,
        settings=examples(25, stateful_step_count=30, suppress_health_check=list(HealthCheck)),
    )
