"""Charges calls of which nothing is on record: they began without, or their record was lost."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import tzinfo
from typing import Protocol

from parallama.clock import Clock
from parallama.counters import NOT_KNOWN, Call, Counters
from parallama.db.policies import Policy
from parallama.limits import Unit
from parallama.usage import Spent
from ratelimit import rules


class Policies(Protocol):
    def known(self, user: str) -> Policy | None:
        """What is remembered; None where somebody has to be asked."""
        ...

    async def policy_of(self, user: str) -> Policy:
        """Limits and grants of a user by id, defaults included. Raises Unavailable."""
        ...


class Charging:
    """In every bucket in which such a call would have been held when it began."""

    def __init__(
        self,
        counters: Counters,
        policies: Policies,
        rebuild: Callable[[str, Sequence[rules.Bucket], float], Awaitable[None]],
        *,
        clock: Clock,
        zone: tzinfo,
    ) -> None:
        self._counters = counters
        self._policies = policies
        self._rebuild = rebuild
        self._clock = clock
        self._zone = zone

    async def charge(self, call: Call, spent: Spent, *, stored: bool) -> None:
        """
        Once, whoever else tries. Until its row is `stored`, compute and cost wait for that.

        Raises Unavailable: then it may be tried again.
        """
        policy = await self._policies.policy_of(call.user)
        met = [
            at
            for at in rules.running(policy.limits, policy.grants, call.at, self._zone)
            if at.limit.unit is not Unit.CONCURRENT
            and at.counts(call.gateway, call.model, call.key, call.grants)
        ]
        if not met and not stored:
            return
        holds = [at.hold(0) for at in met]
        now = self._clock()
        if await self._counters.charge(call, holds, spent, stored=stored, now=now) == NOT_KNOWN:
            running = rules.running(policy.limits, policy.grants, now, self._zone)
            await self._rebuild(call.user, running, now)
            await self._counters.charge(call, holds, spent, stored=stored, now=now)
