"""Roles, tokens, identities of other issuers, keys that rotate, and who changed what."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ID = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
TIME = sa.DateTime(timezone=True)
OF_USER = ["users.id"]


def upgrade() -> None:
    op.add_column("users", sa.Column("tokens_valid_from", TIME))
    op.create_table(
        "user_roles",
        sa.Column("user_id", ID, nullable=False),
        sa.Column("role", sa.String(50), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "role", name="pk_user_roles"),
        _of_user("user_roles"),
    )
    op.create_table(
        "roles",
        sa.Column("name", sa.String(50), nullable=False),
        sa.Column("permissions", sa.JSON, nullable=False),
        sa.Column("description", sa.String(255)),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_roles"),
    )
    op.create_table(
        "identities",
        sa.Column("id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("issuer", sa.String(255), nullable=False),
        sa.Column("subject", sa.String(255), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_identities"),
        sa.UniqueConstraint("issuer", "subject", name="uq_identities_issuer_subject"),
        _of_user("identities"),
    )
    op.create_index("ix_identities_user_id", "identities", ["user_id"])
    with op.batch_alter_table("api_keys") as table:
        table.add_column(sa.Column("kind", sa.String(10), server_default="secret", nullable=False))
        table.add_column(sa.Column("gateways", sa.JSON))
        table.add_column(sa.Column("scopes", sa.JSON))
        table.add_column(sa.Column("previous_public_id", sa.String(12)))
        table.add_column(sa.Column("previous_key_hash", sa.String(255)))
        table.add_column(sa.Column("previous_expires_at", TIME))
        table.create_unique_constraint("uq_api_keys_previous_public_id", ["previous_public_id"])
    op.drop_table("refresh_tokens")  # nothing made any until now
    op.create_table(
        "refresh_tokens",
        sa.Column("id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("family_id", ID, nullable=False),
        sa.Column("public_id", sa.String(12), nullable=False),
        sa.Column("token_hash", sa.String(255), nullable=False),
        sa.Column("issued_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("revoked_at", TIME),
        sa.Column("replaced_at", TIME),
        sa.Column("replaced_by", ID),
        sa.PrimaryKeyConstraint("id", name="pk_refresh_tokens"),
        sa.UniqueConstraint("public_id", name="uq_refresh_tokens_public_id"),
        _of_user("refresh_tokens"),
        sa.ForeignKeyConstraint(
            ["replaced_by"],
            ["refresh_tokens.id"],
            name="fk_refresh_tokens_replaced_by",
            ondelete="SET NULL",
        ),
    )
    for column in ("user_id", "family_id", "expires_at", "replaced_by"):
        op.create_index(f"ix_refresh_tokens_{column}", "refresh_tokens", [column])
    op.create_table(
        "revoked_tokens",
        sa.Column("jti", sa.String(255), nullable=False),
        sa.Column("issuer", sa.String(255), nullable=False),
        sa.Column("user_id", ID),
        sa.Column("revoked_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("jti", "issuer", name="pk_revoked_tokens"),
        _of_user("revoked_tokens"),
    )
    for column in ("user_id", "expires_at"):
        op.create_index(f"ix_revoked_tokens_{column}", "revoked_tokens", [column])
    op.add_column("gateway_usage_logs", sa.Column("decision", sa.Text))
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("actor_id", sa.String(36)),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("via", sa.String(20), nullable=False),
        sa.Column("address", sa.String(64)),
        sa.Column("request_id", sa.String(255)),
        sa.Column("action", sa.String(100), nullable=False),
        sa.Column("subject_id", sa.String(255)),
        sa.Column("subject", sa.String(255), nullable=False),
        sa.Column("before", sa.JSON),
        sa.Column("after", sa.JSON),
        sa.PrimaryKeyConstraint("id", name="pk_audit_log"),
    )
    op.create_index("ix_audit_log_at", "audit_log", ["at"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION parallama_audit_log_stays() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'audit_log is append-only'; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_log_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log "
            "FOR EACH STATEMENT EXECUTE FUNCTION parallama_audit_log_stays()"
        )
    else:
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_log_stays_{event.lower()} BEFORE {event} ON audit_log "
                "BEGIN SELECT RAISE(ABORT, 'audit_log is append-only'); END"
            )


def _of_user(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["user_id"], OF_USER, name=f"fk_{table}_user_id", ondelete="CASCADE"
    )
