"""Run by Alembic, inside the transaction that parallama.db.manage.schema.upgrade began."""

from alembic import context

from parallama.db.manage.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
