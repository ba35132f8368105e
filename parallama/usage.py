"""What one finished request used."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal

TokenSource = Literal["reported", "counted", "estimated", "unknown"]
"""`unknown`: the request was admitted, and nobody told how it ended."""


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
