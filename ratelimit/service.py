"""Envoy's question over gRPC: may this call spend, and what did it spend in the end?"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from functools import partial
from math import ceil
from typing import Any

from parallama import rpc
from parallama.clock import Clock
from parallama.counters import NOT_KNOWN, Call, Counters
from parallama.db.policies import Policy
from parallama.errors import Unavailable
from parallama.limits import Unit
from parallama.prices import Prices, cost_of
from parallama.usage import Spent
from ratelimit import rules, wire
from ratelimit.charging import Charging, Policies
from ratelimit.estimate import Estimate
from ratelimit.outage import Outage
from ratelimit.rebuild import Rebuild

log = logging.getLogger(__name__)

SHOULD_RATE_LIMIT = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"

# How many calls are timed at once, to learn how long they take.
_TIMED = 10_000


@dataclass(frozen=True, slots=True)
class Decided:
    """
    The answer is None where it cannot be decided, and is to be denied. `levels` are those of the
    limits themselves, before grants; there are none, and no need, where nobody could be asked.
    """

    answer: rules.Admitted | rules.Refused | None
    levels: Sequence[rules.Level] = ()
    need: rules.Need | None = None


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
        self._begun: OrderedDict[str, Call] = OrderedDict()
        self._under_way: set[asyncio.Future[Any]] = set()

    def should_rate_limit(self, request: bytes) -> bytes | Awaitable[bytes]:
        """RateLimitRequest in, RateLimitResponse out; at once for a call that has ended."""
        try:
            asked = wire.parse(request)
        except wire.BadCall as error:
            log.warning("rate limit call not understood", extra={"cause": str(error)})
            raise rpc.RpcError(rpc.Status.INVALID_ARGUMENT, str(error)) from error
        if isinstance(asked, rules.Settle):
            self._learn(asked)
            self.settle(asked)
            return wire.SETTLED
        return self._answer(asked)

    def untaken(self, request: bytes) -> None:
        """The client left while our yes was on its way: Envoy will settle nothing, so we do."""
        asked = wire.parse(request)
        if isinstance(asked, rules.Reserve):
            self.settle(rules.Settle(asked.user, asked.request_id, 0))

    async def aclose(self) -> None:
        """Wait for what is under way."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    async def _answer(self, ask: rules.Reserve) -> bytes:
        try:
            answer = (await self.decide(ask)).answer
        except asyncio.CancelledError:
            # The client left while we asked. Envoy settles nothing then, so we do.
            self.settle(rules.Settle(ask.user, ask.request_id, 0))
            raise
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
            met = rules.buckets(policy.limits, ask.gateway, ask.model, ask.key, now, self._zone)
            need = await self._need(ask, met)
        except Unavailable as error:
            return Decided(self._outage.without_limits(ask, error))
        if self._outage.lasts():
            return Decided(self._outage.reserve(ask, met, need, now))
        try:
            levels, held = await self._take(ask, policy, met, need, now, take)
            first = levels
            for others in rules.instead(levels, policy.grants, ask.gateway, ask.model, now):
                levels, held = await self._take(ask, policy, others, need, now, take)
                if not any(level.refuses for level in levels):
                    break
        except Unavailable as error:
            self._outage.begins(error)
            return Decided(self._outage.reserve(ask, met, need, now))
        self._outage.ends(ask.user, levels)
        if any(level.refuses for level in levels):
            why = rules.decision(rules.in_the_way(first), need, policy.read_at)
            return Decided(rules.refuse(first, now, f'"rule":"limit",{why}'), first, need)
        cap = self._cap(ask, held) if need.answer else None
        why = rules.decision(rules.tightest(levels), need, policy.read_at)
        admitted = rules.admit(levels, ask.request_id, held, now, cap, why)
        return Decided(admitted, first, need)

    async def _take(
        self,
        ask: rules.Reserve,
        policy: Policy,
        met: list[rules.Bucket],
        need: rules.Need,
        now: float,
        take: bool,
    ) -> tuple[list[rules.Level], int]:
        """What the buckets hold then, and how many tokens the call holds."""
        call = _call(ask, now, rules.paid_by(met))
        holds = [bucket.hold(need.of(bucket.limit.unit)) for bucket in met]
        least = self._estimate.most_prompt(ask) + 1 if self._hard else 0
        tokens = max(need.tokens, least)
        reserve = partial(
            self._counters.reserve, call, holds, tokens=tokens, least=least, now=now, take=take
        )
        taken = await reserve()
        if not taken.known:
            running = rules.running(policy.limits, policy.grants, now, self._zone)
            await self._rebuild(ask.user, running, now)
            taken = await reserve()
        if not taken.known:
            raise Unavailable("the counters cannot be used: they were lost once more")
        levels = [
            rules.Level(bucket, level.used, level.reserved, level.full)
            for bucket, level in zip(met, taken.levels, strict=True)
        ]
        return levels, taken.tokens

    async def _need(self, ask: rules.Reserve, met: list[rules.Bucket]) -> rules.Need:
        need = self._estimate.need(ask)
        if self._hard:
            need = rules.Need(self._estimate.most_prompt(ask), need.answer, need.compute)
        if any(bucket.limit.unit is Unit.COST for bucket in met):
            cost = await self._cost(ask.model, need)
            need = rules.Need(need.prompt, need.answer, need.compute, cost)
        return need

    async def _cost(self, model: str, need: rules.Need) -> int:
        """What the call may cost, in billionths; 0 where the model has no price."""
        prices = self._prices.peek() or await self._prices.current()
        price = prices.of(model)
        if price is None:
            return 0
        cost = cost_of(price, need.prompt, need.answer, compute_ms=need.compute)
        return ceil(cost * Unit.COST.parts)

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
