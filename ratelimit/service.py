"""Envoy's question over gRPC: may this call spend, and what did it spend in the end?"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from functools import partial
from math import ceil
from typing import Any, NamedTuple

from parallama import rpc
from parallama.clock import Clock
from parallama.counters import NOT_KNOWN, TAKEN, Call, Counters
from parallama.db.policies import Policy
from parallama.errors import Unavailable
from parallama.limits import Unit
from parallama.prices import PriceList, Prices, cost_of
from parallama.usage import Spent
from ratelimit import rules, wire
from ratelimit.charging import Charging, Policies
from ratelimit.estimate import Estimate
from ratelimit.outage import Outage
from ratelimit.rebuild import Rebuild

log = logging.getLogger(__name__)

SHOULD_RATE_LIMIT = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"

# A call after so many seconds without one finds nothing in the processor's caches: decision 0028.
_ALONE = 0.005
# How many calls are timed at once, to learn how long they take.
_TIMED = 10_000
# Of how many kinds of calls it is remembered where they have to find room.
_ALIKE = 4096


@dataclass(frozen=True, slots=True)
class Decided:
    """
    The answer is None where it cannot be decided, and is to be denied. `levels` are those of the
    limits themselves, before grants; there are none, and no need, where nobody could be asked.
    """

    answer: rules.Admitted | rules.Refused | None
    levels: Sequence[rules.Level] = ()
    need: rules.Need | None = None


class Met(NamedTuple):
    """
    Where calls that are alike have to find room, in one `minute`. `priced`: cost is among it, so
    prices have to be known.
    """

    policy: Policy
    minute: int
    buckets: list[rules.Bucket]
    priced: bool


class Case(NamedTuple):
    """A call that wants to spend, where it has to find room, what it needs, and when it asks."""

    ask: rules.Reserve
    met: Met
    need: rules.Need
    now: float


class RateLimit:
    """
    Answers Envoy. With `hard` an answer is capped at the tokens that were held for the call, and
    no call may cross a limit.
    """

    def __init__(
        self,
        counters: Counters,
        policies: Policies,
        *,
        clock: Clock,
        zone: tzinfo,
        estimate: Estimate,
        prices: Prices,
        rebuild: Rebuild,
        charging: Charging,
        outage: Outage,
        hard: bool,
    ) -> None:
        self._counters = counters
        self._policies = policies
        self._clock = clock
        self._zone = zone
        self._estimate = estimate
        self._prices = prices
        self._rebuild = rebuild
        self._charging = charging
        self._outage = outage
        self._hard = hard
        self._asked_at = 0.0
        self._begun: OrderedDict[str, Call] = OrderedDict()
        self._met: dict[tuple[str, str, str, str], Met] = {}
        self._under_way: set[asyncio.Future[Any]] = set()

    def should_rate_limit(self, request: bytes) -> bytes | Awaitable[bytes]:
        """RateLimitRequest in, RateLimitResponse out; at once for a call that has ended."""
        alone = wire.may_reserve(request) and self._comes_alone()
        if alone:
            self._counters.nudge()  # Redis takes as long to find its code again as we do
        try:
            asked = wire.parse(request)
        except wire.BadCall as error:
            log.warning("rate limit call not understood", extra={"cause": str(error)})
            raise rpc.RpcError(rpc.Status.INVALID_ARGUMENT, str(error)) from error
        if isinstance(asked, rules.Settle):
            self._learn(asked)
            self.settle(asked)
            return wire.SETTLED
        policy = self._policies.known(asked.user)
        if policy is not None and not self._outage.lasts():
            now = self._clock()
            met = self._meets(asked, policy, now)
            prices = self._prices.peek() if met.priced else None
            if prices is not None or not met.priced:
                case = Case(asked, met, self._need(asked, prices), now)
                reply = self._reserve(case, met.buckets)
                if alone:
                    self._rehearse(case)
                return rpc.Later(reply, partial(self._replied, case, reply))
        return self._answer(asked, partial(self.decide, asked))

    def untaken(self, request: bytes) -> None:
        """The client left while our yes was on its way: Envoy will settle nothing, so we do."""
        asked = wire.parse(request)
        if isinstance(asked, rules.Reserve):
            self.settle(rules.Settle(asked.user, asked.request_id, 0))

    async def aclose(self) -> None:
        """Wait for what is under way."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def _comes_alone(self) -> bool:
        now = self._clock()
        before, self._asked_at = self._asked_at, now
        return now - before > _ALONE

    def _rehearse(self, case: Case) -> None:
        """While Redis works, go through what its reply will go through: it is quicker then."""
        nothing_taken = [TAKEN, case.need.tokens, *([0, 0, 0] * len(case.met.buckets))]
        levels, held = _levels(case.met.buckets, nothing_taken)
        wire.admitted(self._admit(case, levels, held))
        self._counters.make_ready()

    def _replied(
        self, case: Case, reply: "asyncio.Future[Sequence[int]]"
    ) -> bytes | Awaitable[bytes]:
        """What most calls hear is said at once: that there is room."""
        if reply.exception() is None and reply.result()[0] == TAKEN:
            levels, held = _levels(case.met.buckets, reply.result())
            self._outage.ends(case.ask.user, levels)
            return self._told(case.ask, self._admit(case, levels, held))
        return self._answer(case.ask, partial(self._judge, case, reply))

    async def _answer(
        self, ask: rules.Reserve, decide: Callable[[], Coroutine[Any, Any, Decided]]
    ) -> bytes:
        try:
            answer = (await decide()).answer
        except asyncio.CancelledError:
            # The client left while we asked. Envoy settles nothing then, so we do.
            self.settle(rules.Settle(ask.user, ask.request_id, 0))
            raise
        return self._told(ask, answer)

    def _told(self, ask: rules.Reserve, answer: rules.Admitted | rules.Refused | None) -> bytes:
        if answer is None:
            raise rpc.RpcError(rpc.Status.UNAVAILABLE, "limits cannot be checked")
        if isinstance(answer, rules.Refused):
            return wire.refused(answer, ask.dialect, request_id=ask.request_id)
        self._begun[ask.request_id] = _call(ask, self._clock(), answer.grants)
        if len(self._begun) > _TIMED:
            self._begun.popitem(last=False)
        if answer.would_refuse:
            log.info(
                "would be refused", extra={"user": ask.user, "limits": list(answer.would_refuse)}
            )
        return wire.admitted(answer)

    async def decide(self, ask: rules.Reserve, *, take: bool = True) -> Decided:
        """Reserve what is asked; without `take`, only say what would come of it."""
        now = self._clock()
        try:
            policy = await self._policies.policy_of(ask.user)
            met = self._meets(ask, policy, now)
            need = self._need(ask, await self._prices.current() if met.priced else None)
        except Unavailable as error:
            return Decided(self._outage.without_limits(ask, error))
        if self._outage.lasts():
            return Decided(self._outage.reserve(ask, met.buckets, need, now))
        case = Case(ask, met, need, now)
        return await self._judge(case, self._reserve(case, met.buckets, take=take), take=take)

    async def _judge(
        self, case: Case, reply: "asyncio.Future[Sequence[int]]", *, take: bool = True
    ) -> Decided:
        """By what the counters reply; where they are full or do not know, more is asked of them."""
        ask, met, need, now = case
        try:
            levels, held = await self._sure(case, met.buckets, reply, take=take)
            first = levels
            for others in rules.instead(levels, met.policy.grants, ask.gateway, ask.model, now):
                reply = self._reserve(case, others, take=take)
                levels, held = await self._sure(case, others, reply, take=take)
                if not any(level.refuses for level in levels):
                    break
        except Unavailable as error:
            self._outage.begins(error)
            return Decided(self._outage.reserve(ask, met.buckets, need, now))
        self._outage.ends(ask.user, levels)
        if any(level.refuses for level in levels):
            why = rules.decision(rules.in_the_way(first), need, met.policy.read_at)
            return Decided(rules.refuse(first, now, f'"rule":"limit",{why}'), first, need)
        return Decided(self._admit(case, levels, held), first, need)

    def _admit(self, case: Case, levels: Sequence[rules.Level], held: int) -> rules.Admitted:
        ask, met, need, now = case
        cap = self._cap(ask, held) if need.answer else None
        why = rules.decision(rules.tightest(levels), need, met.policy.read_at)
        return rules.admit(levels, ask.request_id, held, now, cap, why)

    def _reserve(
        self, case: Case, buckets: list[rules.Bucket], *, take: bool = True
    ) -> "asyncio.Future[Sequence[int]]":
        ask, _, need, now = case
        least = self._estimate.most_prompt(ask) + 1 if self._hard else 0
        return self._counters.reserve(
            _call(ask, now, rules.paid_by(buckets)),
            [bucket.hold(need.of(bucket.limit.unit)) for bucket in buckets],
            tokens=max(need.tokens, least),
            least=least,
            now=now,
            take=take,
        )

    async def _sure(
        self,
        case: Case,
        buckets: list[rules.Bucket],
        reply: "asyncio.Future[Sequence[int]]",
        *,
        take: bool,
    ) -> tuple[list[rules.Level], int]:
        """What the buckets hold then, and how many tokens the call holds. Raises Unavailable."""
        if (await reply)[0] == NOT_KNOWN:
            policy = case.met.policy
            running = rules.running(policy.limits, policy.grants, case.now, self._zone)
            await self._rebuild(case.ask.user, running, case.now)
            reply = self._reserve(case, buckets, take=take)
            if (await reply)[0] == NOT_KNOWN:
                raise Unavailable("the counters cannot be used: they were lost once more")
        return _levels(buckets, reply.result())

    def _meets(self, ask: rules.Reserve, policy: Policy, now: float) -> Met:
        alike, minute = (ask.user, ask.gateway, ask.model, ask.key), int(now // 60)
        met = self._met.get(alike)
        if met is None or met.policy is not policy or met.minute != minute:
            found = rules.buckets(policy.limits, ask.gateway, ask.model, ask.key, now, self._zone)
            priced = any(bucket.limit.unit is Unit.COST for bucket in found)
            if len(self._met) >= _ALIKE:
                self._met.clear()
            met = self._met[alike] = Met(policy, minute, found, priced)
        return met

    def _need(self, ask: rules.Reserve, prices: PriceList | None) -> rules.Need:
        """With its cost where `prices` are given."""
        need = self._estimate.need(ask)
        if self._hard:
            need = need._replace(prompt=self._estimate.most_prompt(ask))
        price = prices.of(ask.model) if prices is not None else None
        if price is not None:
            cost = cost_of(price, need.prompt, need.answer, compute_ms=need.compute)
            need = need._replace(cost=ceil(cost * Unit.COST.parts))
        return need

    def _cap(self, ask: rules.Reserve, held: int) -> int | None:
        """How many tokens the answer may have."""
        if not self._hard:
            return None
        left = held - self._estimate.most_prompt(ask)
        return left if ask.max_tokens is None or left < ask.max_tokens else None

    def _learn(self, end: rules.Settle) -> None:
        begun = self._begun.get(end.reservation)
        if end.prompt_tokens is None:
            return
        self._estimate.learn(end.model, end.body_bytes, end.prompt_tokens)
        answer = end.used - end.prompt_tokens
        if answer > 0 and not end.bounded:
            self._estimate.learn_answer(end.model, answer)
        if begun is not None:
            self._estimate.learn_compute(end.model, (self._clock() - begun.at) * 1000)

    def settle(self, end: rules.Settle) -> None:
        """Envoy waits for nothing, so neither do we."""
        self._outage.settle(end)
        charge = self._counters.settle(end.user, end.reservation, end.used, self._clock())
        self._under_way.add(charge)
        charge.add_done_callback(lambda done: self._settled(end, done))

    def _settled(self, end: rules.Settle, charge: "asyncio.Future[int]") -> None:
        self._under_way.discard(charge)
        error = charge.exception()
        if error is not None:
            self._outage.owe(end, error)
        elif charge.result() == NOT_KNOWN and end.used > 0:
            work = asyncio.ensure_future(self._charge(end))
            self._under_way.add(work)
            work.add_done_callback(self._under_way.discard)
        else:
            self._begun.pop(end.reservation, None)

    async def _charge(self, end: rules.Settle) -> None:
        """Charge a call that the counters know nothing of: they were lost, or it began without."""
        call = self._begun.get(end.reservation) or Call(
            end.reservation,
            end.user,
            end.key,
            end.gateway,
            "",
            "",
            end.model,
            self._clock(),
            end.grants,
        )
        try:
            await self._charging.charge(call, Spent(end.used), stored=False)
            self._begun.pop(end.reservation, None)
        except Unavailable as error:
            self._outage.owe(end, error)


def _levels(met: Sequence[rules.Bucket], reply: Sequence[int]) -> tuple[list[rules.Level], int]:
    taken = Counters.taken(reply)
    return [
        rules.Level(bucket, *level) for bucket, level in zip(met, taken.levels, strict=True)
    ], taken.tokens


def _call(ask: rules.Reserve, at: float, grants: str) -> Call:
    return Call(
        ask.request_id,
        ask.user,
        ask.key,
        ask.gateway,
        ask.dialect,
        ask.endpoint,
        ask.model,
        at,
        grants,
    )
