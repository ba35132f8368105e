"""How PostgreSQL is reached, and its errors in words that say what to do."""

import asyncio
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.types.array import ListBinaryDumper
from psycopg.types.string import TextLoader

from parallama.config import Database
from parallama.errors import ParallamaError, SchemaError, Unavailable

_Row = tuple[Any, ...]


class Connection(psycopg.AsyncConnection[_Row]):
    """
    Hangs up on a server that owes an answer for longer than `patience` seconds.

    PostgreSQL's own time-outs are of no help where the server itself hangs or is out of reach.
    """

    patience: float

    async def wait(self, *args: Any, **options: Any) -> Any:
        alarm = asyncio.get_running_loop().call_later(self.patience, self._hang_up)
        try:
            return await super().wait(*args, **options)
        finally:
            alarm.cancel()

    def _hang_up(self) -> None:
        # The driver sees an end of file, and says so to whoever waits.
        if self.closed:
            return
        with socket.socket(fileno=os.dup(self.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)


async def connect(settings: Database, *, answer_seconds: float, autocommit: bool) -> Connection:
    """A connection on which no answer takes longer. Raises Unavailable."""
    milliseconds = {
        "statement_timeout": answer_seconds,
        "idle_in_transaction_session_timeout": answer_seconds,
        "lock_timeout": settings.timeout_seconds,
    }
    server_side = [f"-c {name}={math.ceil(at * 1000)}" for name, at in milliseconds.items()]
    with explained(place(settings)):
        async with asyncio.timeout(settings.timeout_seconds):
            connection = await Connection.connect(
                host=settings.host,
                port=settings.port,
                dbname=settings.name,
                user=settings.user,
                password=settings.password.get_secret_value() if settings.password else None,
                sslmode=settings.ssl_mode,
                sslrootcert=None
                if settings.ssl_root_cert_file is None
                else str(settings.ssl_root_cert_file),
                application_name="parallama",
                client_encoding="utf-8",
                options=" ".join(["-c timezone=UTC", *server_side]),
                tcp_user_timeout=math.ceil(answer_seconds * 1000),
                autocommit=autocommit,
                # A line that goes dead while nobody talks is found before somebody waits for it.
                keepalives_idle=30,
                keepalives_interval=10,
                keepalives_count=3,
            )
    # The server has a limit of its own, and says more about it.
    connection.patience = answer_seconds + 1
    connection.adapters.register_loader("uuid", TextLoader)
    connection.adapters.register_dumper(list, ListBinaryDumper)  # a third of the time of text
    return connection


def place(settings: Database) -> str:
    """The database in words, for messages."""
    return f"{settings.name} at {settings.host}:{settings.port}"


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn errors of the server, and of the way there, into ours."""
    try:
        yield
    except TimeoutError as error:
        raise Unavailable(
            f"the database {where} did not take the connection within database.timeout_seconds"
        ) from error
    except psycopg.Error as error:
        raise explain(error, where) from error


def explain(error: BaseException | None, where: str) -> ParallamaError:
    return _by_code(error, where) or _by_words(error, where)


def _by_code(error: BaseException | None, where: str) -> ParallamaError | None:
    match getattr(error, "sqlstate", None):
        case "42P01" | "42703" | "42P10" as code:
            lacking = _primary(error) or code
            return SchemaError(
                f"the database {where} lacks something ({lacking}): run `parallama db upgrade`"
            )
        case "42501":
            return Unavailable(
                f"the database {where} does not let this user do that ({_primary(error)}): let "
                "services and `parallama db upgrade` use one user, who owns the tables"
            )
        case "25006":
            return Unavailable(
                f"the database {where} is read-only: set database.host to the primary server"
            )
        case "53100":
            return Unavailable(f"no space is left for the database {where}: make room on its disk")
        case "53300":
            return _no_connection_left(where)
        case "40001" | "40P01":
            return Unavailable(f"the database {where} had two writers collide: try again")
        case "55P03":
            return Unavailable(
                f"the database {where} is busy: another process has been holding a lock for longer "
                "than database.timeout_seconds"
            )
        case "57014":
            return _no_answer(where)
        case "57P01" | "57P02" | "57P03":
            return Unavailable(f"the database {where} is starting or stopping")
    return None


def _by_words(error: BaseException | None, where: str) -> ParallamaError:
    """Errors without a code: of the connection, which were not the server's to answer."""
    words = str(error)

    def among(*known: str) -> bool:
        return any(each in words for each in known)

    if among("password authentication failed", "no password supplied", "authentication failed"):
        return Unavailable(
            f"the database {where} refused the user or the password: check database.user and what "
            "is in database.password_file"
        )
    if among("pg_hba.conf"):
        return Unavailable(
            f"the database {where} does not let this machine in: add it to the server's pg_hba.conf"
        )
    if "database " in words and among("does not exist"):
        return Unavailable(
            f"there is no database {where}: create it, and run `parallama db upgrade`"
        )
    if among("too many clients", "too many connections", "remaining connection slots"):
        return _no_connection_left(where)
    if among("resolve host", "translate host name"):
        return Unavailable(f"the database {where} is not found: check database.host")
    if among("Connection refused", "No route to host", "Network is unreachable", "timeout expired"):
        return Unavailable(
            f"the database {where} does not answer: is the server running, and are database.host "
            "and database.port right?"
        )
    if among("SSL", "certificate"):
        return Unavailable(
            f"no TLS with the database {where} ({_last_line(words)}): check database.ssl_mode and "
            "database.ssl_root_cert_file"
        )
    if among("starting up", "shutting down", "recovery mode"):
        return Unavailable(f"the database {where} is starting or stopping")
    if among("server closed the connection", "EOF detected", "connection is lost"):
        return Unavailable(f"the database {where} went away, or did not answer in time")
    return Unavailable(f"the database {where} failed: {_primary(error) or _last_line(words)}")


def _no_connection_left(where: str) -> Unavailable:
    return Unavailable(
        f"the database {where} has no connection left: raise its max_connections or lower "
        "database.pool_size"
    )


def _no_answer(where: str) -> Unavailable:
    return Unavailable(
        f"the database {where} did not answer in time: it is overloaded, or "
        "database.timeout_seconds is too short for it"
    )


def _primary(error: BaseException | None) -> str | None:
    """The server's own words without the details: those hold values."""
    return error.diag.message_primary if isinstance(error, psycopg.Error) else None


def _last_line(words: str) -> str:
    return (words.strip().splitlines() or ["no reason was given"])[-1].strip()
