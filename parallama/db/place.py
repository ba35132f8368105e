"""Where the SQLite file is, and its errors in words that say what to do."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from parallama.config import Database
from parallama.errors import ParallamaError, SchemaError, Unavailable

PRAGMAS = (
    # What was committed outlives kill -9 either way. FULL keeps it through a power cut, too: no
    # revoked key may come back. It costs one fsync for each batch.
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    # Pages, 16 MB: a page that many batches touch is copied back once. A row costs 15 % less.
    "PRAGMA wal_autocheckpoint=4000",
)


def sqlite_file(settings: Database, *, create: bool = False) -> Path:
    """
    The SQLite file, looked at before it is opened.

    With `create`, one that is not there is made. Without, that is an error: a service with a wrong
    path would otherwise start on a database that knows nobody.
    """
    path = settings.path
    with explained(str(path)):
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
    return path


def sqlite_name(path: Path) -> str:
    """`path` as the URI that SQLite takes; add `mode=rw`, which makes no file."""
    return f"file:{quote(str(path))}"


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn errors of the database into ours. What is wrong with the data passes as it is."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if (
            not isinstance(error, sqlite3.OperationalError)
            and type(error) is not sqlite3.DatabaseError
        ):
            raise
        raise explain(error, where) from error
    except OSError as error:
        raise Unavailable(f"the database {where} cannot be used: {error.strerror}") from error


def explain(error: BaseException | None, where: str) -> ParallamaError:
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
