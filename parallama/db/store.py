"""What services ask of a database: plain SQL, the same for SQLite and PostgreSQL."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, Protocol

from parallama.config import Database
from parallama.db import revisions

Values = Sequence[Any]


class Refused(Exception):
    """The database takes these rows at no time: a value, or a rule of a table, is in the way."""


class NoPartition(Refused):
    """PostgreSQL has no partition for the time of one of these rows yet."""


class Store(Protocol):
    """
    Parameters of queries are `?`.

    Ids are text, times are aware and in UTC, money is Decimal, JSON is what it means: going in and
    coming out. SQLite has no type for money, so a query says which of its columns are:
    `cost AS "cost [money]"`; PostgreSQL takes that for a name.
    """

    @property
    def dialect(self) -> Literal["sqlite", "postgresql"]: ...

    @property
    def where(self) -> str:
        """The database in words, for messages."""

    async def read(self, query: str, values: Values = ()) -> list[tuple[Any, ...]]:
        """All rows. Raises Unavailable or SchemaError."""

    async def write(self, *work: tuple[str, Sequence[Values]]) -> list[int]:
        """
        Run each statement with each of its rows, all in one transaction or not at all.

        Returns how many rows each changed. Raises Refused, Unavailable or SchemaError. After
        Unavailable it may have happened all the same, so write what can be written again.
        """

    async def revision(self) -> str | None:
        """None for a database without our tables."""

    async def close(self) -> None:
        """Ends what is running first."""


def open_store(settings: Database) -> Store:
    """Connects on first use. Close it when done."""
    # Each process loads the driver that it needs.
    if settings.sqlite:
        from parallama.db.sqlite import SqliteStore

        return SqliteStore(settings)
    from parallama.db.postgres import PostgresStore

    return PostgresStore(settings)


@asynccontextmanager
async def database(settings: Database) -> AsyncIterator[Store]:
    """The configured database, with the schema that this version works with; else SchemaError."""
    store = open_store(settings)
    try:
        revisions.check(await store.revision(), store.where)
        yield store
    finally:
        await store.close()
