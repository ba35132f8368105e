"""Which schema a database has, which one this version works with, and the way between them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama.config import Database
from parallama.db import months, revisions
from parallama.db.manage.engine import open_database, place, reading, writing

if TYPE_CHECKING:
    from alembic.config import Config as AlembicConfig

# Any number that nobody else in this database takes for a lock of theirs.
_LOCK = 7_265_616_000


@asynccontextmanager
async def managed(settings: Database) -> AsyncIterator[AsyncEngine]:
    """The configured database, with the schema that this version works with; else SchemaError."""
    engine = open_database(settings)
    try:
        await check_schema(engine)
        yield engine
    finally:
        await engine.dispose()


async def current_revision(engine: AsyncEngine) -> str | None:
    """None for a database without our tables."""
    async with reading(engine) as connection:
        return await connection.run_sync(_revision)


async def check_schema(engine: AsyncEngine) -> None:
    """Raises SchemaError unless the tables are those of this version."""
    revisions.check(await current_revision(engine), place(engine))


async def upgrade(settings: Database) -> tuple[str | None, str]:
    """
    Create or migrate the database, all or nothing, and return its revisions before and after.

    Two at once are safe: the second one waits and finds nothing left to do.
    """
    engine = open_database(settings, create=True)
    try:
        async with writing(engine) as connection:
            partitioned = engine.dialect.name == "postgresql"
            if partitioned:  # SQLite has one writer at a time by itself
                await connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
            before = await connection.run_sync(_revision)
            revisions.refuse_unknown(before, place(engine))
            if before != revisions.HEAD:
                await connection.run_sync(_migrate)
            if partitioned:
                await _make_months(connection)
        return before, revisions.HEAD
    finally:
        await engine.dispose()


def _revision(connection: Connection) -> str | None:
    if not connection.dialect.has_table(connection, "alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


async def _make_months(connection: AsyncConnection) -> None:
    """This one and the next, so that no row has to wait for its month to be made."""
    month = months.start_of((await connection.execute(select(func.now()))).scalar_one())
    for each in (month, months.after(month)):
        await connection.exec_driver_sql(months.make(each))


def _migrate(connection: Connection) -> None:
    from alembic import command

    settings = alembic_settings()
    settings.attributes["connection"] = connection
    command.upgrade(settings, "head")


def alembic_settings() -> "AlembicConfig":
    """Alembic's configuration; there is no alembic.ini."""
    from alembic.config import Config as AlembicConfig

    settings = AlembicConfig()
    folder = Path(__file__).with_name("migrations")
    settings.set_main_option("script_location", str(folder).replace("%", "%%"))
    settings.set_main_option("path_separator", "os")
    return settings
