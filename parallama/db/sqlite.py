"""The services' connection to SQLite: one thread, as little as possible."""

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from parallama.config import Database
from parallama.db import forms, sums
from parallama.db.place import PRAGMAS, explained, sqlite_file, sqlite_name
from parallama.db.store import Refused, Values

# By the declared type of a column, or by what a query says in brackets.
sqlite3.register_converter("datetime", lambda raw: forms.from_text(raw.decode()))
sqlite3.register_converter("money", lambda raw: forms.from_trillionths(int(raw)))
sqlite3.register_converter("sum", lambda raw: sums.from_parts(raw.decode()))
sqlite3.register_converter("money_sum", lambda raw: sums.money_from_parts(raw.decode()))
sqlite3.register_converter("json", json.loads)
sqlite3.register_converter("boolean", lambda raw: raw != b"0")
sqlite3.register_adapter(datetime, forms.to_text)
sqlite3.register_adapter(Decimal, forms.to_trillionths)

_REFUSED = (
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    OverflowError,
    UnicodeEncodeError,
)


class SqliteStore:
    """A Store. Queries run one after another; the first one connects."""

    dialect: Literal["sqlite"] = "sqlite"

    def __init__(self, settings: Database) -> None:
        self._path = sqlite_file(settings)
        self._timeout = settings.timeout_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._connection: sqlite3.Connection | None = None

    @property
    def where(self) -> str:
        return str(self._path)

    async def read(self, query: str, values: Values = ()) -> list[tuple[Any, ...]]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._read, query, values)

    async def write(self, *work: tuple[str, Sequence[Values]]) -> list[int]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._write, work)

    async def revision(self) -> str | None:
        if not await self.read("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"):
            return None
        rows = await self.read("SELECT version_num FROM alembic_version")
        return str(rows[0][0]) if rows else None

    async def close(self) -> None:
        self._thread.submit(self._disconnect)
        await asyncio.to_thread(self._thread.shutdown)

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
            except _REFUSED as error:
                raise Refused(str(error)) from error
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
                detect_types=sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES,
            )
            self._connection = connection
            for pragma in PRAGMAS:
                connection.execute(pragma)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
