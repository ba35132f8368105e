"""The database of a gateway under test: how its books are read, and how it goes away."""

import signal
import sqlite3
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.postgres import Postgres

_ROWS = """
SELECT request_id, user_id, tokens_used, completion_tokens, token_source FROM gateway_usage_logs
"""
_AS_MADE = "database:\n  path: parallama.db\n"


@dataclass(frozen=True, slots=True)
class Row:
    request_id: str
    user_id: str
    tokens: int
    completion: int | None
    source: str


class Books(Protocol):
    """Of one gateway, in a database of its own."""

    name: str

    @abstractmethod
    def settle_in(self, config: Path) -> None:
        """Make the configuration name this database."""

    @abstractmethod
    def rows(self) -> list[Row]: ...

    @abstractmethod
    def away(self) -> AbstractContextManager[None]:
        """Nobody can store anything within the block."""


class Sqlite:
    """A file in the gateway's folder; a foreign writer takes it away."""

    name = "sqlite"

    def settle_in(self, config: Path) -> None:
        self._path = config.with_name("parallama.db")

    def rows(self) -> list[Row]:
        with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as db:
            return [Row(*found) for found in db.execute(_ROWS)]

    @contextmanager
    def away(self) -> Iterator[None]:
        with closing(sqlite3.connect(self._path, isolation_level=None, timeout=30)) as db:
            db.execute("BEGIN EXCLUSIVE")
            yield
            db.execute("ROLLBACK")


class Postgresql:
    """On a server that may be stopped, killed and held up."""

    name = "postgres"

    def __init__(self, server: Postgres) -> None:
        self.server = server
        self._at = server.migrated()

    def settle_in(self, config: Path) -> None:
        at = self._at
        assert at.password_file is not None
        text = config.read_text()
        assert _AS_MADE in text
        told = (
            f"database: {{host: {at.host}, port: {at.port}, name: {at.name}, user: {at.user}, "
            f"password_file: {at.password_file.path}}}\n"
        )
        config.write_text(text.replace(_AS_MADE, told))

    def rows(self) -> list[Row]:
        found: list[Any] = self.server.run(_ROWS, database=str(self._at.name))
        return [Row(str(id), str(user), *counts) for id, user, *counts in found]

    @contextmanager
    def away(self) -> Iterator[None]:
        self.server.stop()
        try:
            yield
        finally:
            self.server.start()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """It takes what it is asked, and answers nothing."""
        self.server.pause(signal.SIGSTOP)
        try:
            yield
        finally:
            self.server.pause(signal.SIGCONT)

    def die(self) -> None:
        self.server.kill()
        self.server.start()


DATABASES = ("sqlite", "postgres")


@contextmanager
def databases(*names: str) -> Iterator[dict[str, Callable[[], Books]]]:
    """What makes an empty database of each of these kinds; one server for all of them."""
    made: dict[str, Callable[[], Books]] = {"sqlite": Sqlite}
    if "postgres" not in names:
        yield made
        return
    server = Postgres()
    try:
        yield {**made, "postgres": lambda: Postgresql(server)}
    finally:
        server.remove()
