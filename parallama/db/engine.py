"""Connections to the database, and its errors in words that say what to do."""

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import cast
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, Table, event, exc
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from parallama.config import Database
from parallama.errors import ParallamaError, SchemaError, Unavailable

# Each connection is a thread. SQLite has one writer at a time, and reads take well under 1 ms.
_CONNECTIONS = 2


def open_database(settings: Database, *, create: bool = False) -> AsyncEngine:
    """
    An engine for the configured database; connects on first use. Dispose of it when done.

    With `create`, a SQLite file that is not there is made. Without, that is an error: a service
    with a wrong path would otherwise start on a database that knows nobody.
    """
    if not settings.sqlite:
        raise ParallamaError("PostgreSQL is served by a later version; set database.path")
    with _explained(str(settings.path)):
        _check_place(settings.path, create=create)
    url = URL.create(
        "sqlite+aiosqlite",
        database=f"file:{quote(str(settings.path))}",
        query={"mode": "rw", "uri": "true"},
    )
    engine = create_async_engine(
        url,
        connect_args={"timeout": settings.timeout_seconds, "isolation_level": None},
        pool_size=_CONNECTIONS,
        max_overflow=0,
        pool_timeout=settings.timeout_seconds,
        hide_parameters=True,
    )
    _prepare_sqlite(engine.sync_engine, wal=create)
    return engine


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection to read from; each query sees one state of the database."""
    with _explained(place(engine)):
        async with engine.connect() as connection:
            yield connection


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A transaction, committed at the end of the block, rolled back if the block raises."""
    with _explained(place(engine)):
        async with engine.execution_options(writes=True).begin() as connection:
            yield connection


def insert_or(engine: AsyncEngine, table: Table) -> sqlite.Insert:
    """An INSERT that can say what to do on conflict. PostgreSQL's says it in the same words."""
    if engine.dialect.name == "sqlite":
        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql

    return cast(sqlite.Insert, postgresql.insert(table))


def place(engine: AsyncEngine) -> str:
    """Where the database is, for messages."""
    return (engine.url.database or "").removeprefix("file:")


def _check_place(path: Path, *, create: bool) -> None:
    if not path.parent.is_dir():
        raise ParallamaError(
            f"{path.parent}, where the database belongs, is not a folder: "
            "create it or set database.path"
        )
    if path.is_dir():
        raise ParallamaError(f"{path} is a folder: set database.path to a file")
    if create:
        path.touch(0o600)  # SQLite gives its side files the same mode
    elif not path.exists():
        raise SchemaError(f"there is no database at {path} yet: run `parallama db upgrade`")


def _prepare_sqlite(engine: Engine, *, wal: bool) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        if wal:  # readers and the writer never wait for each other; remembered in the file
            cursor.execute("PRAGMA journal_mode=WAL")
        # What was committed outlives kill -9 either way. FULL keeps it through a power cut, too:
        # no revoked key may come back. It costs one fsync for each batch.
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    # The driver's own way begins too late for a migration to be all or nothing, and as a reader,
    # which fails at once, instead of waiting, when another writer was faster.
    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        if connection.get_execution_options().get("writes"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn errors of the database into ours. What is wrong with the data passes as it is."""
    try:
        yield
    except (exc.IntegrityError, exc.DataError):
        raise
    except exc.TimeoutError as error:
        raise Unavailable(f"all connections to the database {where} are in use") from error
    except exc.DBAPIError as error:
        raise _explain(error.orig, where) from error
    except OSError as error:
        raise Unavailable(f"the database {where} cannot be used: {error.strerror}") from error


def _explain(error: BaseException | None, where: str) -> ParallamaError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bits say more than is needed
    match code:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return Unavailable(
                f"the database {where} is busy: another process has been writing to it for longer "
                "than database.timeout_seconds"
            )
        case sqlite3.SQLITE_FULL:
            return Unavailable(f"no space is left for the database {where}: make room on its disk")
        case sqlite3.SQLITE_READONLY:
            return Unavailable(
                f"the database {where} is read-only: let this user write to the file and its folder"
            )
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            return Unavailable(
                f"the database {where} cannot be opened: "
                "let this user read and write the file and its folder"
            )
        case sqlite3.SQLITE_NOTADB:
            return Unavailable(
                f"{where} is not a SQLite database: set database.path to another file"
            )
        case sqlite3.SQLITE_CORRUPT:
            return Unavailable(f"the database {where} is damaged: restore it from a backup")
        case sqlite3.SQLITE_ERROR if "no such " in str(error):
            return SchemaError(
                f"the database {where} lacks something ({error}): run `parallama db upgrade`"
            )
        case _:
            return Unavailable(f"the database {where} failed: {error}")
