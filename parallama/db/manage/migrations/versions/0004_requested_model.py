"""What else rows say: the name that a client sent, servers asked, tokens that were thought."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("gateway_usage_logs", sa.Column("requested_model", sa.Text))
    op.add_column("gateway_usage_logs", sa.Column("attempts", sa.Integer))
    op.add_column("gateway_usage_logs", sa.Column("reasoning_tokens", sa.BigInteger))
    with op.batch_alter_table("model_mappings") as table:
        for column in ("external_model", "internal_model"):
            table.alter_column(column, type_=sa.String(256), existing_nullable=False)
