"""The services' connections to PostgreSQL."""

import asyncio
import select
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any, Literal

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus

from parallama.config import Database
from parallama.db.server import Connection, connect, explained, place
from parallama.db.store import NoPartition, Refused, Values
from parallama.errors import Unavailable


class PostgresStore:
    """A Store. Connects when it has to, and again after the server was away."""

    dialect: Literal["postgresql"] = "postgresql"

    def __init__(self, settings: Database) -> None:
        self.where = place(settings)
        self._connections = Connections(settings, self.where)

    async def read(self, query: str, values: Values = ()) -> list[tuple[Any, ...]]:
        async with self._connections.one() as connection:
            with explained(self.where):
                try:
                    cursor = await connection.execute(_translated(query), values)
                    return await cursor.fetchall()
                except errors.InvalidTextRepresentation:
                    return []  # what is no id at all is nobody's

    async def write(self, *work: tuple[str, Sequence[Values]]) -> list[int]:
        async with self._connections.one() as connection:
            with explained(self.where):
                try:
                    async with connection.transaction():
                        return [await _run(connection, query, rows) for query, rows in work]
                except (psycopg.IntegrityError, psycopg.DataError) as error:
                    raise _refused(error) from error
                except psycopg.ProgrammingError as error:
                    if error.sqlstate is None:  # the driver cannot send such a value
                        raise Refused(str(error)) from error
                    raise
                except (OverflowError, UnicodeEncodeError) as error:
                    raise Refused(str(error)) from error

    async def revision(self) -> str | None:
        ((known,),) = await self.read("SELECT to_regclass('alembic_version') IS NOT NULL")
        rows = await self.read("SELECT version_num FROM alembic_version") if known else []
        return str(rows[0][0]) if rows else None

    async def close(self) -> None:
        await self._connections.close()


class Connections:
    """
    A few connections for many callers, who wait for one within bounds.

    Nothing connects in the background: whoever needs a connection that cannot be had is told at
    once, and why.
    """

    def __init__(self, settings: Database, where: str) -> None:
        self._settings = settings
        self._where = where
        self._free = asyncio.Semaphore(settings.pool_size)
        self._idle: list[Connection] = []

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Connection]:
        await self._take()
        try:
            connection = await self._connected()
            try:
                yield connection
            finally:
                await self._put_back(connection)
        finally:
            self._free.release()

    async def close(self) -> None:
        for _ in range(self._settings.pool_size):
            await self._free.acquire()
        while self._idle:
            await self._idle.pop().close()

    async def _take(self) -> None:
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                await self._free.acquire()
        except TimeoutError as error:
            raise Unavailable(
                f"all connections to the database {self._where} are in use: raise "
                "database.pool_size, or find out what keeps it busy"
            ) from error

    async def _connected(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if _is_alive(connection):
                return connection
            await connection.close()
        return await connect(
            self._settings, answer_seconds=self._settings.timeout_seconds, autocommit=True
        )

    async def _put_back(self, connection: Connection) -> None:
        if connection.info.transaction_status == TransactionStatus.IDLE:
            self._idle.append(connection)
        else:
            await connection.close()


def _is_alive(connection: Connection) -> bool:
    """Nobody asked anything, so whatever there is to read says that the server hung up."""
    if connection.closed:
        return False
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return not waiting.poll(0)


async def _run(connection: Connection, query: str, rows: Sequence[Values]) -> int:
    if not rows:
        return 0
    cursor = connection.cursor()
    if len(rows) == 1:
        await cursor.execute(_translated(query), rows[0])
    else:
        await cursor.executemany(_translated(query), rows)
    return cursor.rowcount


@lru_cache
def _translated(query: str) -> bytes:
    """With the driver's placeholders, in the form in which it takes any text."""
    return query.replace("%", "%%").replace("?", "%s").encode()


def _refused(error: psycopg.Error) -> Refused:
    # Details hold values. A check of ours has a name.
    reason = error.diag.message_primary or str(error)
    if isinstance(error, errors.CheckViolation) and error.diag.constraint_name is None:
        return NoPartition(reason)
    return Refused(reason)
