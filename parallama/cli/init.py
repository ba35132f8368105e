"""`parallama init`."""

import asyncio
import json
import os
import secrets
import shlex
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import urlsplit

import typer

from parallama.cli import passwords
from parallama.cli.desk import operator
from parallama.cli.show import note
from parallama.errors import Conflict, ParallamaError, UsageError
from parallama.roles import Role

if TYPE_CHECKING:
    from parallama.config import Config

_CONFIG = """\
# Parallama. What is left out has its default: config.example.yaml lists every setting.
# Relative paths start at the folder of this file.

# Where clients connect. 0.0.0.0 lets other machines in.
server:
  host: {host}
  port: {port}

# Sockets, counters, and the files that Envoy is given.
state_dir: state

# Users, keys, limits and usage.
database:
  path: parallama.db

# `parallama up` starts a Valkey of its own, with this password.
redis:
  password_file: secrets/redis_password

# The model server that requests go to.
api_gateways:
  ollama:
    host: {upstream_host}
    port: {upstream_port}
"""


def init(
    dir: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder to write to; made if it is not there.")
    ] = Path("."),
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where clients will connect.")
    ] = "127.0.0.1:8000",
    upstream: Annotated[
        str, typer.Option(metavar="URL", help="The Ollama, or the like, to stand before.")
    ] = "http://127.0.0.1:11434",
    admin: Annotated[
        str, typer.Option(metavar="NAME", help="The first admin, where a password is given.")
    ] = "admin",
    password_file: passwords.PasswordFile = None,
) -> None:
    """
    Write DIR/config.yaml and secrets, and create the database. Never overwrites a config.

    At a terminal it asks for the password of the first admin; there is none that comes with it.
    """
    host, port = _parse_listen(listen)
    upstream_host, upstream_port = _parse_upstream(upstream)
    text = _CONFIG.format(
        host=json.dumps(host),
        port=port,
        upstream_host=json.dumps(upstream_host),
        upstream_port=upstream_port,
    )
    path = dir / "config.yaml"
    if path.exists():
        raise _taken(path)
    password = _password(admin, password_file)
    try:
        _make_folder(dir)
        _make_folder(dir / "secrets")
        _write_secret(dir / "secrets" / "redis_password")
        _write_config(path, text, lambda config: _prepare(config, admin, password))
    except OSError as error:
        raise ParallamaError(f"cannot write {error.filename or dir}: {error.strerror}") from error
    print(f"wrote {path}")
    if password is None:
        note("No admin yet: parallama users create admin --role admin, then users set-password")
    else:
        note(f"The admin is called {admin}.")
    note(
        f"Next: export PARALLAMA_CONFIG={shlex.quote(str(path.absolute()))}\n"
        "      parallama up\n"
        "and beside it: parallama users create anna; parallama keys create anna"
    )


def _password(admin: str, file: Path | None) -> str | None:
    """That of the first admin, checked before anything is written; None where nobody gave one."""
    if file is None and not passwords.at_terminal():
        return None
    if file is None:
        password = passwords.ask(f"Password for {admin} (empty: no admin yet)")
    else:
        password = passwords.read(file)
    if not password:
        return None
    from parallama.config import Authentication
    from parallama.db import names
    from parallama.passwords import check

    name = names.check_username(admin)
    check(password, username=name, min_length=Authentication().password_min_length)
    return password


async def _prepare(config: "Config", admin: str, password: str | None) -> None:
    """The database, and in it the admin."""
    from parallama.db.manage import people
    from parallama.db.manage.schema import managed, upgrade
    from parallama.desk import Desk

    await upgrade(config.database)
    if password is None:
        return
    async with managed(config.database) as engine:
        desk = Desk(engine=engine, now=datetime.now(UTC), by=operator())
        try:
            await people.create_user(desk, admin, Role.ADMIN)
        except Conflict:  # left by an earlier attempt
            await people.update_user(desk, admin, role=Role.ADMIN)
        settings = config.authentication
        await people.set_password(desk, admin, password, settings=settings)


def _write_config(
    path: Path, text: str, prepare: Callable[["Config"], Coroutine[Any, Any, None]]
) -> None:
    """Under its own name it appears last: what is there is whole, and has its database."""
    from parallama.config import load

    fresh = path.with_name(f".config.yaml.{os.getpid()}")
    try:
        fresh.touch(0o600)
        fresh.write_text(text, encoding="utf-8")
        asyncio.run(prepare(load(fresh, os.environ)))
        os.link(fresh, path)  # unlike a rename, refuses to overwrite
    except FileExistsError:
        raise _taken(path) from None
    finally:
        fresh.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    folder.mkdir(parents=True, mode=0o700)


def _write_secret(path: Path) -> None:
    """A new secret, unless one is there: an earlier attempt may have left it."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with open(file, "w", encoding="utf-8") as secret:
        secret.write(secrets.token_urlsafe(32) + "\n")


def _taken(path: Path) -> Conflict:
    return Conflict(f"{path} is there already: edit it, or choose another --dir")


def _parse_listen(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        _refuse_listen(text)
    if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        _refuse_listen(text)
    return host, int(port)


def _refuse_listen(text: str) -> NoReturn:
    raise UsageError(f"--listen is HOST:PORT, such as 127.0.0.1:8000 or [::1]:8000, not {text!r}")


def _parse_upstream(text: str) -> tuple[str, int]:
    """`scheme://host` and the port, as the configuration has them."""
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        url, port = urlsplit(""), None
    if url.scheme not in ("http", "https") or not url.hostname or url.username is not None:
        raise UsageError("--upstream is a URL such as http://127.0.0.1:11434")
    if url.path.strip("/") or url.query or url.fragment:
        raise UsageError("--upstream ends after the port: paths are passed on as clients send them")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return f"{url.scheme}://{host}", port or (443 if url.scheme == "https" else 80)
