"""The services' connection to the database: plain SQL, one thread, as little as possible."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from parallama.config import Database
from parallama.db import revisions
from parallama.db.place import PRAGMAS, explained, sqlite_file, sqlite_name

Values = Sequence[Any]


@asynccontextmanager
async def database(settings: Database) -> AsyncIterator["Store"]:
    """The configured database, with the schema that this version works with; else SchemaError."""
    store = Store(settings)
    try:
        revisions.check(await store.revision(), store.where)
        yield store
    finally:
        store.close()


class Store:
    """
    Queries run one after another; the first one connects. Parameters are `?`.

    What this class promises, and the SQL that is given to it, hold for PostgreSQL as well.
    """

    def __init__(self, settings: Database) -> None:
        self._path = sqlite_file(settings)
        self._timeout = settings.timeout_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._connection: sqlite3.Connection | None = None

    @property
    def where(self) -> str:
        return str(self._path)

    async def read(self, query: str, values: Values = ()) -> list[tuple[Any, ...]]:
        """All rows. Raises Unavailable or SchemaError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._read, query, values)

    async def write(self, *work: tuple[str, Sequence[Values]]) -> list[int]:
        """
        Run each statement with each of its rows, all in one transaction or not at all.

        Returns how many rows each changed. Raises Unavailable or SchemaError, and OverflowError or
        UnicodeEncodeError for a value that no column holds.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._write, work)

    async def revision(self) -> str | None:
        if not await self.read("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"):
            return None
        rows = await self.read("SELECT version_num FROM alembic_version")
        return str(rows[0][0]) if rows else None

    def close(self) -> None:
        """Ends what is running first."""
        self._thread.submit(self._disconnect)
        self._thread.shutdown()

    def _read(self, query: str, values: Values) -> list[tuple[Any, ...]]:
        with explained(self.where):
            return self._connected().execute(query, values).fetchall()

    def _write(self, work: Sequence[tuple[str, Sequence[Values]]]) -> list[int]:
        with explained(self.where):
            connection = self._connected()
            # A writer that begins as a reader would fail at once where another one was faster.
            connection.execute("BEGIN IMMEDIATE")
            try:
                counts = [connection.executemany(query, rows).rowcount for query, rows in work]
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            return counts

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(
                f"{sqlite_name(self._path)}?mode=rw",
                uri=True,
                timeout=self._timeout,
                isolation_level=None,
                check_same_thread=False,
            )
            self._connection = connection
            for pragma in PRAGMAS:
                connection.execute(pragma)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()


def to_sqlite(at: datetime) -> str:
    """Text that sorts by time and that SQLite's own date functions understand; UTC by agreement."""
    if at.tzinfo is not UTC:
        if at.tzinfo is None:
            raise ValueError("a time without its zone")
        at = at.astimezone(UTC)
    return at.isoformat(" ", "microseconds")[:26]


def from_sqlite(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)
