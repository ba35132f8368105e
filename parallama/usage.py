"""What one finished request used."""

import math
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_UP, Decimal
from typing import Literal

from parallama.limits import Unit

TokenSource = Literal["reported", "counted", "estimated", "unknown"]
"""`unknown`: the request was admitted, and nobody told how it ended."""


NOT_ADMITTED = ("RL", "UAEX", "RLSE")
"""Envoy's flags of what a limit or authz refused, or could not be asked about."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """
    One request. Durations are seconds, `compute_ms` milliseconds, `timestamp` is the start in UTC.

    Token counts are None where nobody knows them: zero is a number, missing is not zero.
    """

    request_id: str
    timestamp: datetime
    user_id: str
    username: str
    key_id: str | None
    gateway: str
    dialect: str
    endpoint: str
    model_name: str | None
    served_model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    tokens_used: int
    token_source: TokenSource
    streamed: bool
    finished: bool
    aborted: bool
    status_code: int
    flags: str
    """Envoy's response flags by their short names, comma-separated, such as `DC`."""
    error_message: str | None
    request_duration: float
    time_to_first_token: float | None
    compute_ms: float | None
    upstream_host: str | None
    cost: Decimal | None
    """None where the model has no price."""
    grants: str | None = None
    """What was paid for by grants, as `<unit>:<grant's id>`, comma-separated."""
    decision: str | None = None
    """Why it was let in or refused, as JSON: see `parallama.finished`."""
    requested_model: str | None = None
    """The name that the client sent, where it is mapped to `model_name`."""
    attempts: int | None = None
    """How many servers were asked until one answered, where any was."""
    reasoning_tokens: int | None = None
    """Those of the completion that were no answer yet, as the server reports them."""

    @property
    def admitted(self) -> bool:
        """
        Neither authz nor a limit refused it, and both could be asked. What was refused for its body
        has no flag, and no server was looked for.
        """
        if not self.flags:
            return self.upstream_host is not None or self.token_source == "unknown"  # noqa: S105
        return set(NOT_ADMITTED).isdisjoint(self.flags.split(","))

    @property
    def spent(self) -> "Spent":
        return spent_in(self.tokens_used, self.compute_ms, self.request_duration, self.cost)


@dataclass(frozen=True, slots=True)
class Spent:
    """What a call used, in the parts of the units that are counted (see `Unit.parts`)."""

    tokens: int
    compute: int = 0
    cost: int = 0


def spent_in(
    tokens: int, compute_ms: float | None, request_duration: float | None, cost: Decimal | None
) -> Spent:
    """What a row says, rounded up."""
    # What the upstream says that it worked, else how long the request took.
    worked = (request_duration or 0.0) * 1000 if compute_ms is None else compute_ms
    money = (cost or Decimal(0)) * Unit.COST.parts
    return Spent(tokens, max(0, math.ceil(worked)), int(money.to_integral_value(ROUND_UP)))
