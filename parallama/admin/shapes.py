"""What goes in and what comes out, as JSON."""

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from parallama import money
from parallama.errors import UsageError
from parallama.limits import ANY, Unit, Window
from parallama.mappings import LONGEST_NAME

_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d.*")

LONGEST_GRACE = 30 * 24 * 3600


class Given(BaseModel):
    """What a caller sends: unknown fields are mistakes, and text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _time(value: Any) -> Any:
    if isinstance(value, datetime):
        return value
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise ValueError("is a time with its zone, such as 2026-01-31T12:00:00Z")
    try:
        at = datetime.fromisoformat(value)
        return at if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("is a time with its zone, such as 2026-01-31T12:00:00Z") from None


def _amount(value: Any) -> Any:
    if isinstance(value, Decimal):
        return value
    if not isinstance(value, str):
        raise ValueError("is an amount in quotes, such as '12.50'")
    try:
        return money.parse(value)
    except UsageError as error:
        raise ValueError(str(error)) from None


Time = Annotated[
    AwareDatetime,
    BeforeValidator(_time, json_schema_input_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
"""RFC 3339, with its zone; UTC in answers."""

Money = Annotated[
    Decimal,
    BeforeValidator(_amount),
    PlainSerializer(money.plain, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$", "maxLength": 40}),
]
"""An exact amount, as text."""

Text = Annotated[str, Field(max_length=255)]
Names = Annotated[list[Text], Field(max_length=1000)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Gateway = Literal["ollama", "openai"]
EveryGateway = Literal["ollama", "openai", "*"]


# Users


class NewUser(Given):
    username: Text = Field(description="Up to 255 visible characters, without spaces and ':'.")
    role: Text = Field(default="user", description="Its default limits are the user's, too.")
    more_roles: Names = []


class UserChange(Given):
    """What is left out stays."""

    username: Text = Field(default="", description="Usage so far keeps the old one.")
    role: Text = ""
    more_roles: Names = Field(default=[], description="All of them: others are taken away.")


class NewPassword(Given):
    password: Annotated[str, Field(max_length=1000)] | None = Field(
        description="null: the user cannot log in. Either way all sessions end."
    )


class RevokedToken(Given):
    jti: Text = Field(description="The id of the access token.")
    issuer: Text | None = Field(default=None, description="null: one of ours.")


# Keys


class KeyBounds(Given):
    name: Text | None = Field(default=None, description="What it is for.")
    expires_at: Time | None = None
    models: Names | None = Field(default=None, description="Only these, `*` at the end; null: all.")
    networks: Names | None = Field(default=None, description="Only from these; null: from all.")
    gateways: list[Gateway] | None = Field(default=None, description="Only these; null: all.")
    scopes: Names | None = Field(
        default=None, description="Only these permissions; null: all that its user has."
    )


class NewKey(KeyBounds):
    user: Text | None = Field(default=None, description="Name or id; the caller's own without.")
    public_key: Annotated[str, Field(max_length=10_000)] | None = Field(
        default=None,
        description="Instead of a secret: a line of `~/.ollama/id_ed25519.pub`, whose owner signs.",
    )


class KeyChange(KeyBounds):
    """What is left out stays; null lifts a bound."""


class Rotation(Given):
    grace_seconds: Annotated[int, Field(ge=0, le=LONGEST_GRACE)] = Field(
        default=0, description="How long the old secret stays good."
    )

    @property
    def grace(self) -> timedelta:
        return timedelta(seconds=self.grace_seconds)


# Roles


class NewRole(Given):
    name: Text
    permissions: Names = Field(description="`resource:action[:scope]`; `*` for all of a kind.")
    description: Text | None = None


class RoleChange(Given):
    """What is left out stays."""

    permissions: Names = []
    description: Text = ""


# Limits

CELLS = {
    f"{unit}_per_{window}": (unit, window)
    for unit in (Unit.REQUESTS, Unit.TOKENS, Unit.COMPUTE_SECONDS, Unit.COST)
    for window in (Window.MINUTE, Window.HOUR, Window.DAY, Window.MONTH)
    if unit is not Unit.COST or window in (Window.DAY, Window.MONTH)
} | {"concurrent": (Unit.CONCURRENT, Window.MOMENT)}
"""What can be limited, by its name in JSON."""


class Amounts(Given):
    requests_per_minute: Count | None = None
    requests_per_hour: Count | None = None
    requests_per_day: Count | None = None
    requests_per_month: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_hour: Count | None = None
    tokens_per_day: Count | None = None
    tokens_per_month: Count | None = None
    compute_seconds_per_minute: Count | None = None
    compute_seconds_per_hour: Count | None = None
    compute_seconds_per_day: Count | None = None
    compute_seconds_per_month: Count | None = None
    cost_per_day: Money | None = None
    cost_per_month: Money | None = None
    concurrent: Count | None = None


class NewLimits(Amounts):
    """Amounts that are left out or null stay as they are; 0 refuses every call."""

    scope: Text = Field(description="Name or id of a user, `role:NAME`, or `key:NAME_OR_ID`.")
    gateway: EveryGateway
    model: Text = Field(default=ANY, description="A name, or the beginning of one with `*`.")
    shadow: bool = Field(default=False, description="Counts and reports, and never refuses.")


class Limits(Amounts):
    """An amount that is null is no limit."""

    id: str
    scope: str
    user_id: str | None
    key_id: str | None
    gateway: str
    model: str
    shadow: bool
    updated_at: datetime


class Removed(BaseModel):
    removed: int


class NewGrant(Given):
    user: Text = Field(description="Name or id.")
    unit: Literal["requests", "tokens", "compute_seconds", "cost"]
    amount: Annotated[int, Field(ge=1, le=10**15)] | Money = Field(
        description="A whole number; text such as '12.50' for cost."
    )
    expires_at: Time
    gateway: EveryGateway = "*"
    model: Text = ANY


class Grant(BaseModel):
    id: str
    user_id: str
    username: str
    gateway: str
    model: str
    unit: str
    amount: int | Money
    created_at: datetime
    expires_at: datetime


class Quota(BaseModel):
    """One limit, and how much of it is left until it starts again."""

    gateway: str
    model: str
    key_id: str | None = Field(description="For calls with this key alone.")
    unit: str
    window: str
    shadow: bool
    limit: int | Money
    used: int | Money
    reserved: int | Money = Field(description="Held by calls that still run.")
    left: int | Money
    resets_at: datetime | None = Field(description="null for what runs at once.")


class GrantLeft(BaseModel):
    """What may be used beyond the limits, and how much of it is left."""

    id: str
    gateway: str
    model: str
    unit: str
    amount: int | Money
    left: int | Money
    expires_at: datetime


class Quotas(BaseModel):
    """What is not listed is not limited."""

    user_id: str
    at: datetime
    limits: list[Quota]
    grants: list[GrantLeft]


# Prices


class NewPrice(Given):
    model: Text = Field(description="A name, or the beginning of one with `*`.")
    prompt_per_million: Money
    completion_per_million: Money
    cached_per_million: Money | None = Field(default=None, description="null: as the prompt.")
    compute_per_second: Money | None = Field(default=None, description="null: nothing.")


class ListedPrice(BaseModel):
    model: str
    prompt_per_million: Money
    completion_per_million: Money
    cached_per_million: Money | None
    compute_per_second: Money | None
    updated_at: datetime


# Model mappings


class NewMapping(Given):
    gateway: Gateway
    external_model: str = Field(max_length=LONGEST_NAME, description="The name that clients use.")
    internal_model: str = Field(max_length=LONGEST_NAME, description="The model that is meant.")


# Usage


class UsageRow(BaseModel):
    """One finished request."""

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
    token_source: str
    streamed: bool
    finished: bool
    aborted: bool
    status_code: int
    flags: str
    error_message: str | None
    request_duration: float | None
    time_to_first_token: float | None
    compute_ms: float | None
    upstream_host: str | None
    cost: Money | None
    decision: str | None = Field(description="Why it was let in or refused, as JSON.")
    requested_model: str | None = Field(
        description="The name that the client sent, where it is mapped to model_name."
    )
    attempts: int | None = Field(description="How many servers were asked, where any was.")
    reasoning_tokens: int | None = Field(description="Those of the completion, if reported.")


class UsageSum(BaseModel):
    """Sums of what they are grouped by; `without_cost`: requests of models that had no price."""

    user: str | None = None
    user_id: str | None = None
    key_id: str | None = None
    gateway: str | None = None
    model_name: str | None = None
    day: str | None = None
    requests: int
    errors: int
    aborted: int
    prompt_tokens: int
    completion_tokens: int
    tokens_used: int
    cost: Money | None
    without_cost: int


class UsageSums(BaseModel):
    items: list[UsageSum]
