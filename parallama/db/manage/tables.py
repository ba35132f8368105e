"""The tables. Migrations build them; a test holds the two together."""

from collections.abc import Callable
from datetime import datetime
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
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
)

from parallama.db.store import from_sqlite, to_sqlite

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
        if dialect.name != "sqlite":
            return super().bind_processor(dialect)
        return _to_sqlite

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        if dialect.name != "sqlite":
            return super().result_processor(dialect, coltype)
        return _from_sqlite


def _to_sqlite(at: datetime | None) -> str | None:
    return None if at is None else to_sqlite(at)


def _from_sqlite(text: str | None) -> datetime | None:
    return None if text is None else from_sqlite(text)


users = Table(
    "users",
    metadata,
    Column("id", Id, primary_key=True),
    Column("username", String(255), nullable=False, unique=True),
    Column("password_hash", String(255)),  # NULL: comes in by API key only
    Column("role", String(50), nullable=False, server_default="user"),
    Column("is_admin", Boolean, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    Column("disabled_at", UtcTime),
    CheckConstraint("is_admin = (role = 'admin')", name="admin_by_role"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Id, primary_key=True),
    Column("user_id", Id, ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("public_id", String(12), nullable=False, unique=True),
    Column("key_hash", String(255), nullable=False),
    Column("name", String(255)),
    Column("models", Names),  # NULL: every model
    Column("networks", Names),  # NULL: from everywhere
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
    Column("token_hash", String(255), nullable=False),
    Column("issued_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Column("revoked_at", UtcTime),
    Column("replaced_by", Id, ForeignKey("refresh_tokens.id", ondelete="SET NULL")),
)

gateway_rate_limits = Table(
    "gateway_rate_limits",
    metadata,
    Column("id", Id, primary_key=True),
    Column("user_id", Id, ForeignKey("users.id", ondelete="CASCADE")),
    Column("role", String(50)),  # the row is a role's default, and nobody's own
    Column("gateway_type", String(50), nullable=False),
    Column("model", String(255), nullable=False, server_default="*"),
    Column("token_limit_minute", BigInteger),
    Column("token_limit_hourly", BigInteger),
    Column("token_limit_daily", BigInteger),
    Column("request_limit_minute", BigInteger),
    Column("request_limit_hourly", BigInteger),
    Column("request_limit_daily", BigInteger),
    Column("updated_at", UtcTime, nullable=False),
    CheckConstraint("(user_id IS NULL) <> (role IS NULL)", name="user_or_role"),
    UniqueConstraint("user_id", "gateway_type", "model"),
    UniqueConstraint("role", "gateway_type", "model"),
)

# Without foreign keys: what was used stays known when its user or key is gone.
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
    Column("model_name", Text),  # as the client sent it: any length
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
    Index(None, "user_id", "timestamp"),
)

model_mappings = Table(
    "model_mappings",
    metadata,
    Column("id", Id, primary_key=True),
    Column("gateway_type", String(50), nullable=False),
    Column("external_model", String(255), nullable=False),
    Column("internal_model", String(255), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    UniqueConstraint("gateway_type", "external_model"),
)
