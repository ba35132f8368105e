"""Limits of keys, of months, of money, of compute and of requests at once; grants and prices."""

import sqlalchemy as sa
from alembic import op

from parallama.db import months
from parallama.db.manage.tables import Money

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ID = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
TIME = sa.DateTime(timezone=True)
ONE_OWNER = (
    "(CASE WHEN user_id IS NULL THEN 0 ELSE 1 END)"
    " + (CASE WHEN key_id IS NULL THEN 0 ELSE 1 END)"
    " + (CASE WHEN role IS NULL THEN 0 ELSE 1 END) = 1"
)


def upgrade() -> None:
    with op.batch_alter_table("gateway_rate_limits") as table:
        table.add_column(sa.Column("key_id", ID))
        table.add_column(sa.Column("token_limit_monthly", sa.BigInteger))
        table.add_column(sa.Column("request_limit_monthly", sa.BigInteger))
        for window in ("minute", "hourly", "daily", "monthly"):
            table.add_column(sa.Column(f"compute_limit_{window}", sa.BigInteger))
        table.add_column(sa.Column("cost_limit_daily", Money))
        table.add_column(sa.Column("cost_limit_monthly", Money))
        table.add_column(sa.Column("concurrent_limit", sa.BigInteger))
        table.add_column(sa.Column("shadow", sa.Boolean, server_default=sa.false(), nullable=False))
        table.create_foreign_key(
            "fk_gateway_rate_limits_key_id", "api_keys", ["key_id"], ["id"], ondelete="CASCADE"
        )
        table.drop_constraint(op.f("ck_gateway_rate_limits_user_or_role"), type_="check")
        table.create_check_constraint(op.f("ck_gateway_rate_limits_one_owner"), ONE_OWNER)
        for owner in ("user_id", "role"):
            table.drop_constraint(
                f"uq_gateway_rate_limits_{owner}_gateway_type_model", type_="unique"
            )
        for owner in ("user_id", "key_id", "role"):
            table.create_unique_constraint(
                f"uq_gateway_rate_limits_{owner}_gateway_type_model_shadow",
                [owner, "gateway_type", "model", "shadow"],
            )
    op.create_index("ix_gateway_rate_limits_key_id", "gateway_rate_limits", ["key_id"])
    op.create_table(
        "limit_grants",
        sa.Column("id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("gateway_type", sa.String(50), server_default="*", nullable=False),
        sa.Column("model", sa.String(255), server_default="*", nullable=False),
        sa.Column("unit", sa.String(50), nullable=False),
        sa.Column("amount", sa.BigInteger),
        sa.Column("cost", Money),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_limit_grants"),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name="fk_limit_grants_user_id", ondelete="CASCADE"
        ),
        sa.CheckConstraint(
            "(amount IS NULL) <> (cost IS NULL)", name=op.f("ck_limit_grants_amount_or_cost")
        ),
    )
    op.create_index("ix_limit_grants_user_id", "limit_grants", ["user_id"])
    op.create_table(
        "model_prices",
        sa.Column("id", ID, nullable=False),
        sa.Column("model", sa.String(255), nullable=False),
        sa.Column("prompt_per_million", Money, nullable=False),
        sa.Column("completion_per_million", Money, nullable=False),
        sa.Column("cached_per_million", Money),
        sa.Column("compute_per_second", Money),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_model_prices"),
        sa.UniqueConstraint("model", name="uq_model_prices_model"),
    )
    if op.get_bind().dialect.name == "postgresql":
        _make_usage_anew()
    else:
        op.add_column("gateway_usage_logs", sa.Column("cost", Money))
        op.add_column("gateway_usage_logs", sa.Column("grants", sa.Text))
    op.create_index(
        "ix_gateway_usage_logs_unknown",
        "gateway_usage_logs",
        ["request_id"],
        sqlite_where=sa.text("token_source = 'unknown'"),
        postgresql_where=sa.text("token_source = 'unknown'"),
    )


def _make_usage_anew() -> None:
    """In partitions by month. No version served PostgreSQL before, so there is nothing in it."""
    op.drop_table("gateway_usage_logs")
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
        sa.Column("cost", Money),
        sa.Column("grants", sa.Text),
        sa.PrimaryKeyConstraint("id", "timestamp", name="pk_gateway_usage_logs"),
        sa.UniqueConstraint(
            "request_id", "timestamp", name="uq_gateway_usage_logs_request_id_timestamp"
        ),
        postgresql_partition_by="RANGE (timestamp)",
    )
    op.create_index("ix_gateway_usage_logs_timestamp", "gateway_usage_logs", ["timestamp"])
    op.create_index(
        "ix_gateway_usage_logs_user_id_timestamp", "gateway_usage_logs", ["user_id", "timestamp"]
    )
    for edge in months.EDGES:
        op.execute(edge)
