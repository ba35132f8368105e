"""Envoy's question over gRPC: may this call spend, and what did it spend in the end?"""

import asyncio
import logging
from collections.abc import Awaitable
from functools import partial
from typing import Literal, Protocol

from parallama import rpc
from parallama.clock import Clock
from parallama.errors import Unavailable
from parallama.limits import Limit
from ratelimit import rules, wire
from ratelimit.buckets import Buckets
from ratelimit.estimate import Estimate

log = logging.getLogger(__name__)

SHOULD_RATE_LIMIT = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"


class Limits(Protocol):
    """The limits of a user by id, defaults included."""

    def peek(self, user: str) -> tuple[Limit, ...] | None:
        """None where the store has to be asked."""
        ...

    async def limits_of(self, user: str) -> tuple[Limit, ...]:
        """Raises Unavailable."""
        ...


class RateLimit:
    """
    `when_down` says what happens to calls while limits or counters cannot be reached: `deny`
    answers UNAVAILABLE, which Envoy turns into 503 in the caller's dialect; `allow` lets them pass
    unlimited and uncharged.
    """

    def __init__(
        self,
        buckets: Buckets,
        limits: Limits,
        *,
        clock: Clock,
        estimate: Estimate,
        when_down: Literal["deny", "allow"],
    ) -> None:
        self._buckets = buckets
        self._limits = limits
        self._clock = clock
        self._estimate = estimate
        self._when_down = when_down
        self._down = False

    def should_rate_limit(self, request: bytes) -> bytes | Awaitable[bytes]:
        """RateLimitRequest in, RateLimitResponse out; at once where no counter has to be asked."""
        try:
            asked = wire.parse(request)
        except wire.BadCall as error:
            log.warning("rate limit call not understood", extra={"cause": str(error)})
            raise rpc.RpcError(rpc.Status.INVALID_ARGUMENT, str(error)) from error
        if isinstance(asked, rules.Settle):
            if asked.prompt_tokens is not None:
                self._estimate.learn(asked.model, asked.body_bytes, asked.prompt_tokens)
            self._settle(asked)
            return wire.SETTLED
        if self._limits.peek(asked.user) == ():
            return wire.UNLIMITED
        return self._answer(asked)

    def untaken(self, request: bytes) -> None:
        """The client left while our yes was on its way: Envoy will settle nothing, so we do."""
        asked = wire.parse(request)
        if isinstance(asked, rules.Reserve):
            self._settle(rules.Settle(asked.user, asked.request_id, 0))

    async def _answer(self, ask: rules.Reserve) -> bytes:
        try:
            answer = await self._reserve(ask)
        except Unavailable as error:
            self._note_outage(error)
            if self._when_down == "deny":
                raise rpc.RpcError(rpc.Status.UNAVAILABLE, "limits cannot be checked") from error
            return wire.UNLIMITED
        if isinstance(answer, rules.Refused):
            return wire.refused(answer, ask.dialect)
        return wire.admitted(answer)

    async def _reserve(self, ask: rules.Reserve) -> rules.Admitted | rules.Refused:
        limits = await self._limits.limits_of(ask.user)
        now = self._clock()
        met = rules.buckets(limits, ask.gateway, ask.model, now)
        if not met:
            return rules.UNLIMITED
        tokens = self._estimate.tokens(ask)
        try:
            taken = await self._buckets.reserve(ask.user, ask.request_id, tokens, met, now)
        except asyncio.CancelledError:
            # The client left while we asked. Envoy settles nothing then, so we do.
            self._settle(rules.Settle(ask.user, ask.request_id, 0))
            raise
        self._note_recovery()
        if not taken.taken:
            return rules.refuse(taken.levels, now)
        return rules.admit(taken.levels, ask.request_id, taken.held, now)

    def _settle(self, end: rules.Settle) -> None:
        """Envoy waits for nothing, so neither do we. `Buckets.aclose` waits for what runs."""
        charge = self._buckets.settle(end.user, end.reservation, end.used, self._clock())
        charge.add_done_callback(partial(_report, end))

    def _note_outage(self, error: Unavailable) -> None:
        if not self._down:
            self._down = True
            log.error("limits not checked", extra={"policy": self._when_down, "cause": str(error)})

    def _note_recovery(self) -> None:
        if self._down:
            self._down = False
            log.info("limits checked again")


def _report(end: rules.Settle, charge: "asyncio.Future[int]") -> None:
    """A lost charge is one the user does not pay: the usage row has it, the operator is told."""
    error = charge.exception()
    if end.used == 0 or (error is None and charge.result() >= 0):
        return
    log.warning(
        "charge lost",
        extra={
            "user": end.user,
            "reservation": end.reservation,
            "tokens": end.used,
            "cause": str(error or "nothing is known of the reservation"),
        },
    )
