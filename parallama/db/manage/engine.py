"""Connections to the database, and its errors in words that say what to do."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast
from urllib.parse import unquote

from sqlalchemy import URL, Connection, Engine, Table, event, exc
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from parallama.config import Database
from parallama.db.place import PRAGMAS, explain, sqlite_file, sqlite_name
from parallama.errors import Unavailable

# Each is a thread.
_SQLITE_CONNECTIONS = 2

# People ask for sums over years, too. PostgreSQL would otherwise go on for ever.
_LONGEST_ANSWER_SECONDS = 600.0


def open_database(settings: Database, *, create: bool = False) -> AsyncEngine:
    """
    An engine for the configured database; connects on first use. Dispose of it when done.

    With `create` a SQLite file is made where there is none. PostgreSQL's database has to be there.
    """
    return _open_sqlite(settings, create) if settings.sqlite else _open_postgresql(settings)


def _open_postgresql(settings: Database) -> AsyncEngine:
    from parallama.db import server

    async def connect() -> server.Connection:
        return await server.connect(
            settings, answer_seconds=_LONGEST_ANSWER_SECONDS, autocommit=False
        )

    # Nothing connects by this URL: it is for messages.
    url = URL.create(
        "postgresql+psycopg", host=settings.host, port=settings.port, database=settings.name
    )
    return create_async_engine(
        url,
        async_creator=connect,
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.timeout_seconds,
        pool_pre_ping=True,
        hide_parameters=True,
    )


def _open_sqlite(settings: Database, create: bool) -> AsyncEngine:
    path = sqlite_file(settings, create=create)
    query = {"mode": "rw", "uri": "true"}
    url = URL.create("sqlite+aiosqlite", database=sqlite_name(path), query=query)
    engine = create_async_engine(
        url,
        connect_args={"timeout": settings.timeout_seconds, "isolation_level": None},
        pool_size=_SQLITE_CONNECTIONS,
        max_overflow=0,
        pool_timeout=settings.timeout_seconds,
        hide_parameters=True,
    )
    _prepare_sqlite(engine.sync_engine, wal=create)
    return engine


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection to read from; each query sees one state of the database."""
    with _explained(engine):
        async with engine.connect() as connection:
            yield connection


@asynccontextmanager
async def writing(engine: AsyncEngine, *, alone: bool = False) -> AsyncIterator[AsyncConnection]:
    """
    A transaction, committed at the end of the block, rolled back if the block raises.

    With `alone`, nobody else changes what it reads and then changes; else it is Unavailable. SQLite
    has one writer at a time anyway.
    """
    options: dict[str, Any] = {"writes": True}
    if alone and engine.dialect.name == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    with _explained(engine):
        async with engine.execution_options(**options).begin() as connection:
            yield connection


def insert_or(engine: AsyncEngine, table: Table) -> sqlite.Insert:
    """An INSERT that can say what to do on conflict. PostgreSQL's says it in the same words."""
    if engine.dialect.name == "sqlite":
        return sqlite.insert(table)
    return cast(sqlite.Insert, postgresql.insert(table))


def place(engine: AsyncEngine) -> str:
    """Where the database is, for messages."""
    url = engine.url
    if url.host is not None:
        return f"{url.database} at {url.host}:{url.port}"
    return unquote((url.database or "").removeprefix("file:"))


def _prepare_sqlite(engine: Engine, *, wal: bool) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        if wal:  # readers and the writer never wait for each other; remembered in the file
            cursor.execute("PRAGMA journal_mode=WAL")
        for pragma in PRAGMAS:
            cursor.execute(pragma)
        cursor.close()

    # The driver's own way begins too late for a migration to be all or nothing, and as a reader,
    # which fails at once, instead of waiting, when another writer was faster.
    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        if connection.get_execution_options().get("writes"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def _explained(engine: AsyncEngine) -> Iterator[None]:
    where = place(engine)
    try:
        yield
    except (exc.IntegrityError, exc.DataError):
        raise
    except exc.TimeoutError as error:
        raise Unavailable(f"all connections to the database {where} are in use") from error
    except exc.DBAPIError as error:
        if engine.dialect.name == "sqlite":
            raise explain(error.orig, where) from error
        from parallama.db import server

        raise server.explain(error.orig, where) from error
