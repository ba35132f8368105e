"""The tables. Migrations build them; a test holds the two together."""

from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Numeric,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
    false,
    text,
)

from parallama.db.forms import from_text, from_trillionths, to_text, to_trillionths

ONE_OWNER = (
    " + ".join(
        f"(CASE WHEN {owner} IS NULL THEN 0 ELSE 1 END)" for owner in ("user_id", "key_id", "role")
    )
    + " = 1"
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

# Ids are canonical text in Python, and on SQLite also in the file: nothing to convert on the way.
Id = Uuid(as_uuid=False).with_variant(String(36), "sqlite")
Names = JSON(none_as_null=True)


class UtcTime(TypeDecorator[datetime]):
    """A time with its zone. SQLite keeps none, so there it is UTC by agreement."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[datetime | None], Any] | None:
        return _to_text if dialect.name == "sqlite" else _with_zone

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        if dialect.name != "sqlite":
            return super().result_processor(dialect, coltype)
        return _from_text


class Money(TypeDecorator[Decimal]):
    """
    An exact amount with 12 decimals, which is what a token costs at a price with 6 per million.

    SQLite knows no decimals, so there it is a whole number of trillionths, up to 9.2 million.
    """

    impl = Numeric(24, 12)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name != "sqlite":
            return super().load_dialect_impl(dialect)
        return dialect.type_descriptor(BigInteger())

    def bind_processor(self, dialect: Dialect) -> Callable[[Decimal | None], Any] | None:
        if dialect.name != "sqlite":
            return super().bind_processor(dialect)
        return _to_trillionths

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        if dialect.name != "sqlite":
            return super().result_processor(dialect, coltype)
        return _from_trillionths


def _to_trillionths(amount: Decimal | None) -> int | None:
    return None if amount is None else to_trillionths(amount)


def _from_trillionths(count: int | None) -> Decimal | None:
    return None if count is None else from_trillionths(count)


def _to_text(at: datetime | None) -> str | None:
    return None if at is None else to_text(at)


def _with_zone(at: datetime | None) -> datetime | None:
    if at is not None and at.tzinfo is None:
        raise ValueError("a time without its zone")
    return at


def _from_text(text: str | None) -> datetime | None:
    return None if text is None else from_text(text)


users = Table(
    "users",
    metadata,
    Column("id", Id, primary_key=True),
    Column("username", String(255), nullable=False, unique=True),
    Column("password_hash", String(255)),  # NULL: cannot log in
    Column("role", String(50), nullable=False, server_default="user"),
    Column("is_admin", Boolean, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    Column("disabled_at", UtcTime),
    # Tokens that were issued before it are good no more.
    Column("tokens_valid_from", UtcTime),
    CheckConstraint("is_admin = (role = 'admin')", name="admin_by_role"),
)

# Beside the one in `users`, which also says whose default limits count.
user_roles = Table(
    "user_roles",
    metadata,
    Column("user_id", Id, ForeignKey("users.id", ondelete="CASCADE"), primary_key=True),
    Column("role", String(50), primary_key=True),
)

# Those that are neither built in nor in the configuration.
roles = Table(
    "roles",
    metadata,
    Column("name", String(50), primary_key=True),
    Column("permissions", JSON, nullable=False),
    Column("description", String(255)),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
)

# Who a user is for an issuer of tokens that is not us.
identities = Table(
    "identities",
    metadata,
    Column("id", Id, primary_key=True),
    Column("user_id", Id, ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("issuer", String(255), nullable=False),
    Column("subject", String(255), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    UniqueConstraint("issuer", "subject"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Id, primary_key=True),
    Column("user_id", Id, ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("public_id", String(12), nullable=False, unique=True),
    # `secret`: a bcrypt hash is kept. `ssh`: the public key is, as OpenSSH writes it.
    Column("kind", String(10), nullable=False, server_default="secret"),
    Column("key_hash", String(255), nullable=False),
    Column("name", String(255)),
    Column("models", Names),  # NULL: every model
    Column("networks", Names),  # NULL: from everywhere
    Column("gateways", Names),  # NULL: every gateway
    Column("scopes", Names),  # NULL: all that the user may do, else permissions
    # After a rotation the secret before this one is good for a while.
    Column("previous_public_id", String(12), unique=True),
    Column("previous_key_hash", String(255)),
    Column("previous_expires_at", UtcTime),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
    Column("last_used_at", UtcTime),
)

refresh_tokens = Table(
    "refresh_tokens",
    metadata,
    Column("id", Id, primary_key=True),
    Column("user_id", Id, ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    # All that came from one log-in.
    Column("family_id", Id, nullable=False, index=True),
    Column("public_id", String(12), nullable=False, unique=True),
    Column("token_hash", String(255), nullable=False),
    Column("issued_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False, index=True),
    Column("revoked_at", UtcTime),
    Column("replaced_at", UtcTime),
    Column("replaced_by", Id, ForeignKey("refresh_tokens.id", ondelete="SET NULL"), index=True),
)

# Access tokens that are refused though they have not expired.
revoked_tokens = Table(
    "revoked_tokens",
    metadata,
    Column("jti", String(255), primary_key=True),
    Column("issuer", String(255), primary_key=True),
    Column("user_id", Id, ForeignKey("users.id", ondelete="CASCADE"), index=True),
    Column("revoked_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False, index=True),
)

gateway_rate_limits = Table(
    "gateway_rate_limits",
    metadata,
    Column("id", Id, primary_key=True),
    # Whose: exactly one of these. A role's row is the default of its users, and nobody's own.
    Column("user_id", Id, ForeignKey("users.id", ondelete="CASCADE")),
    Column("key_id", Id, ForeignKey("api_keys.id", ondelete="CASCADE"), index=True),
    Column("role", String(50)),
    Column("gateway_type", String(50), nullable=False),
    Column("model", String(255), nullable=False, server_default="*"),
    Column("token_limit_minute", BigInteger),
    Column("token_limit_hourly", BigInteger),
    Column("token_limit_daily", BigInteger),
    Column("token_limit_monthly", BigInteger),
    Column("request_limit_minute", BigInteger),
    Column("request_limit_hourly", BigInteger),
    Column("request_limit_daily", BigInteger),
    Column("request_limit_monthly", BigInteger),
    Column("compute_limit_minute", BigInteger),  # seconds
    Column("compute_limit_hourly", BigInteger),
    Column("compute_limit_daily", BigInteger),
    Column("compute_limit_monthly", BigInteger),
    Column("cost_limit_daily", Money),
    Column("cost_limit_monthly", Money),
    Column("concurrent_limit", BigInteger),
    # Counts and reports, and never refuses.
    Column("shadow", Boolean, nullable=False, server_default=false()),
    Column("updated_at", UtcTime, nullable=False),
    CheckConstraint(ONE_OWNER, name="one_owner"),
    UniqueConstraint("user_id", "gateway_type", "model", "shadow"),
    UniqueConstraint("key_id", "gateway_type", "model", "shadow"),
    UniqueConstraint("role", "gateway_type", "model", "shadow"),
)

# What a user may use beyond the limits, until a time.
limit_grants = Table(
    "limit_grants",
    metadata,
    Column("id", Id, primary_key=True),
    Column("user_id", Id, ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("gateway_type", String(50), nullable=False, server_default="*"),
    Column("model", String(255), nullable=False, server_default="*"),
    Column("unit", String(50), nullable=False),
    Column("amount", BigInteger),  # requests, tokens, seconds
    Column("cost", Money),  # or money
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    CheckConstraint("(amount IS NULL) <> (cost IS NULL)", name="amount_or_cost"),
)

model_prices = Table(
    "model_prices",
    metadata,
    Column("id", Id, primary_key=True),
    Column("model", String(255), nullable=False, unique=True),  # a name, or its beginning with *
    Column("prompt_per_million", Money, nullable=False),
    Column("completion_per_million", Money, nullable=False),
    Column("cached_per_million", Money),  # NULL: as the prompt
    Column("compute_per_second", Money),  # NULL: nothing
    Column("updated_at", UtcTime, nullable=False),
)

# Without foreign keys: what was used stays known when its user or key is gone.
# On PostgreSQL each month is a partition (parallama.db.months), and has to be known from both keys:
# they are (id, timestamp) and (request_id, timestamp) there.
gateway_usage_logs = Table(
    "gateway_usage_logs",
    metadata,
    Column("id", Id, primary_key=True),
    Column("request_id", String(255), nullable=False, unique=True),
    Column("timestamp", UtcTime, nullable=False, index=True),
    Column("user_id", String(36), nullable=False),
    Column("username", String(255), nullable=False),
    Column("key_id", String(36)),
    Column("gateway_type", String(50), nullable=False),
    Column("dialect", String(50), nullable=False),
    Column("endpoint", String(255), nullable=False),
    Column("model_name", Text),  # any length
    Column("served_model", Text),
    Column("prompt_tokens", BigInteger),
    Column("completion_tokens", BigInteger),
    Column("cached_tokens", BigInteger),
    Column("tokens_used", BigInteger, nullable=False),
    Column("token_source", String(20), nullable=False),
    Column("streamed", Boolean, nullable=False),
    Column("finished", Boolean, nullable=False),
    Column("aborted", Boolean, nullable=False),
    Column("status_code", Integer, nullable=False),
    Column("flags", String(255), nullable=False),
    Column("error_message", Text),
    Column("request_duration", Float),
    Column("time_to_first_token", Float),
    Column("compute_ms", Float),
    Column("upstream_host", String(255)),
    Column("cost", Money),  # NULL: the model has no price
    Column("grants", Text),  # NULL: limits paid for everything
    Column("decision", Text),  # why it was let in or refused, as JSON
    Column("requested_model", Text),  # NULL: model_name is as the client sent it, or nobody did
    Column("attempts", Integer),  # NULL: no server was asked
    Column("reasoning_tokens", BigInteger),
    Index(None, "user_id", "timestamp"),
    # Rows that stand for lost ones: found without looking at the others.
    Index(
        "ix_gateway_usage_logs_unknown",
        "request_id",
        sqlite_where=text("token_source = 'unknown'"),
        postgresql_where=text("token_source = 'unknown'"),
    ),
)

model_mappings = Table(
    "model_mappings",
    metadata,
    Column("id", Id, primary_key=True),
    Column("gateway_type", String(50), nullable=False),
    Column("external_model", String(256), nullable=False),
    Column("internal_model", String(256), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    UniqueConstraint("gateway_type", "external_model"),
)

# Rows are added and never touched again: the database itself sees to it.
audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", UtcTime, nullable=False, index=True),
    Column("actor_id", String(36)),  # NULL: not a user of ours
    Column("actor", String(255), nullable=False),
    Column("via", String(20), nullable=False),
    Column("address", String(64)),
    Column("request_id", String(255)),
    Column("action", String(100), nullable=False),
    Column("subject_id", String(255)),
    Column("subject", String(255), nullable=False),
    Column("before", JSON(none_as_null=True)),
    Column("after", JSON(none_as_null=True)),
)
