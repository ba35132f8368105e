"""First tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", ID, nullable=False),
        sa.Column("username", sa.String(255), nullable=False),
        sa.Column("password_hash", sa.String(255)),
        sa.Column("role", sa.String(50), server_default="user", nullable=False),
        sa.Column("is_admin", sa.Boolean, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.Column("disabled_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("username", name="uq_users_username"),
        sa.CheckConstraint("is_admin = (role = 'admin')", name=op.f("ck_users_admin_by_role")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("public_id", sa.String(12), nullable=False),
        sa.Column("key_hash", sa.String(255), nullable=False),
        sa.Column("name", sa.String(255)),
        sa.Column("models", sa.JSON),
        sa.Column("networks", sa.JSON),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME),
        sa.Column("revoked_at", TIME),
        sa.Column("last_used_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name="fk_api_keys_user_id", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("public_id", name="uq_api_keys_public_id"),
    )
    op.create_index("ix_api_keys_user_id", "api_keys", ["user_id"])
    op.create_table(
        "refresh_tokens",
        sa.Column("id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("token_hash", sa.String(255), nullable=False),
        sa.Column("issued_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("revoked_at", TIME),
        sa.Column("replaced_by", ID),
        sa.PrimaryKeyConstraint("id", name="pk_refresh_tokens"),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name="fk_refresh_tokens_user_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["replaced_by"],
            ["refresh_tokens.id"],
            name="fk_refresh_tokens_replaced_by",
            ondelete="SET NULL",
        ),
    )
    op.create_index("ix_refresh_tokens_user_id", "refresh_tokens", ["user_id"])
    op.create_table(
        "gateway_rate_limits",
        sa.Column("id", ID, nullable=False),
        sa.Column("user_id", ID),
        sa.Column("role", sa.String(50)),
        sa.Column("gateway_type", sa.String(50), nullable=False),
        sa.Column("model", sa.String(255), server_default="*", nullable=False),
        sa.Column("token_limit_minute", sa.BigInteger),
        sa.Column("token_limit_hourly", sa.BigInteger),
        sa.Column("token_limit_daily", sa.BigInteger),
        sa.Column("request_limit_minute", sa.BigInteger),
        sa.Column("request_limit_hourly", sa.BigInteger),
        sa.Column("request_limit_daily", sa.BigInteger),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_gateway_rate_limits"),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name="fk_gateway_rate_limits_user_id", ondelete="CASCADE"
        ),
        sa.CheckConstraint(
            "(user_id IS NULL) <> (role IS NULL)",
            name=op.f("ck_gateway_rate_limits_user_or_role"),
        ),
        sa.UniqueConstraint(
            "user_id",
            "gateway_type",
            "model",
            name="uq_gateway_rate_limits_user_id_gateway_type_model",
        ),
        sa.UniqueConstraint(
            "role", "gateway_type", "model", name="uq_gateway_rate_limits_role_gateway_type_model"
        ),
    )
    op.create_table(
        "gateway_usage_logs",
        sa.Column("id", ID, nullable=False),
        sa.Column("request_id", sa.String(255), nullable=False),
        sa.Column("timestamp", TIME, nullable=False),
        sa.Column("user_id", sa.String(36), nullable=False),
        sa.Column("username", sa.String(255), nullable=False),
        sa.Column("key_id", sa.String(36)),
        sa.Column("gateway_type", sa.String(50), nullable=False),
        sa.Column("dialect", sa.String(50), nullable=False),
        sa.Column("endpoint", sa.String(255), nullable=False),
        sa.Column("model_name", sa.Text),
        sa.Column("served_model", sa.Text),
        sa.Column("prompt_tokens", sa.BigInteger),
        sa.Column("completion_tokens", sa.BigInteger),
        sa.Column("cached_tokens", sa.BigInteger),
        sa.Column("tokens_used", sa.BigInteger, nullable=False),
        sa.Column("token_source", sa.String(20), nullable=False),
        sa.Column("streamed", sa.Boolean, nullable=False),
        sa.Column("finished", sa.Boolean, nullable=False),
        sa.Column("aborted", sa.Boolean, nullable=False),
        sa.Column("status_code", sa.Integer, nullable=False),
        sa.Column("flags", sa.String(255), nullable=False),
        sa.Column("error_message", sa.Text),
        sa.Column("request_duration", sa.Float),
        sa.Column("time_to_first_token", sa.Float),
        sa.Column("compute_ms", sa.Float),
        sa.Column("upstream_host", sa.String(255)),
        sa.PrimaryKeyConstraint("id", name="pk_gateway_usage_logs"),
        sa.UniqueConstraint("request_id", name="uq_gateway_usage_logs_request_id"),
    )
    op.create_index("ix_gateway_usage_logs_timestamp", "gateway_usage_logs", ["timestamp"])
    op.create_index(
        "ix_gateway_usage_logs_user_id_timestamp", "gateway_usage_logs", ["user_id", "timestamp"]
    )
    op.create_table(
        "model_mappings",
        sa.Column("id", ID, nullable=False),
        sa.Column("gateway_type", sa.String(50), nullable=False),
        sa.Column("external_model", sa.String(255), nullable=False),
        sa.Column("internal_model", sa.String(255), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_model_mappings"),
        sa.UniqueConstraint(
            "gateway_type",
            "external_model",
            name="uq_model_mappings_gateway_type_external_model",
        ),
    )
