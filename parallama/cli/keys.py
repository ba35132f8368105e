"""`parallama keys`."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama.cli.desk import Desk, run
from parallama.cli.options import (
    ConfigPath,
    Output,
    OutputFormat,
    UserArgument,
    parse_age,
    parse_future,
    split,
)
from parallama.cli.show import note, show, show_rows
from parallama.errors import UsageError

if TYPE_CHECKING:
    from parallama.db.manage.credentials import ApiKey

app = typer.Typer(name="keys", help="What users come in with.", no_args_is_help=True)

_COLUMNS = (
    "key_prefix", "name", "user", "kind", "state", "models", "gateways", "scopes", "expires_at",
    "last_used_at", "id",
)  # fmt: skip
_LARGEST_FILE = 64 * 1024

KeyArgument = Annotated[
    str,
    typer.Argument(metavar="KEY", help="Id, public part (plm_ and 12 characters) or name of it."),
]
Name = Annotated[str | None, typer.Option(help="What it is for.")]
Expires = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="30d, 12h, or ISO 8601 (UTC without a zone)."),
]
Models = Annotated[
    str | None,
    typer.Option(metavar="A,B*", help="Only these models; a trailing * is a wildcard."),
]
Networks = Annotated[
    str | None,
    typer.Option(metavar="CIDR,...", help="Only from these networks or addresses."),
]
Gateways = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Only for these gateways: ollama, openai."),
]
Scopes = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Only with these permissions, such as models:infer; never more than its user has.",
    ),
]


@app.command()
def create(
    user: UserArgument,
    name: Name = None,
    expires: Expires = None,
    models: Models = None,
    networks: Networks = None,
    gateways: Gateways = None,
    scopes: Scopes = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Create a key for USER and print it. This is the only time: it is stored as a hash."""

    async def work(desk: Desk) -> tuple["ApiKey", str]:
        from parallama.db.manage import credentials
        from parallama.keys import mint

        minted = mint(os.urandom, rounds=desk.config.authentication.key_hash_rounds)
        key = await credentials.create_key(
            desk,
            user,
            minted,
            name=name,
            expires_at=parse_future(expires, desk.now),
            models=split(models),
            networks=split(networks),
            gateways=split(gateways),
            scopes=split(scopes),
        )
        return key, minted.token

    _show_once(*run(config, work), output)


@app.command("add-ssh")
def add_ssh(
    user: UserArgument,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Such as ~/.ollama/id_ed25519.pub; - for stdin.")
    ],
    name: Annotated[str | None, typer.Option(help="What it is for, else its comment.")] = None,
    expires: Expires = None,
    models: Models = None,
    networks: Networks = None,
    gateways: Gateways = None,
    scopes: Scopes = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Register the public key that USER's `ollama` command signs its requests with.

    The command signs where OLLAMA_AUTH=1 is set beside OLLAMA_HOST.
    """
    from parallama import sshkeys

    public_key = sshkeys.read(_text(file))

    async def work(desk: Desk) -> "ApiKey":
        from parallama.db.manage import credentials

        return await credentials.add_public_key(
            desk,
            user,
            public_key,
            name=name,
            expires_at=parse_future(expires, desk.now),
            models=split(models),
            networks=split(networks),
            gateways=split(gateways),
            scopes=split(scopes),
        )

    show(_row(run(config, work)), output)


@app.command("list")
def list_(
    user: Annotated[str | None, typer.Option(help="Only this user's, by name or id.")] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """List keys, oldest first, with those that expired or were revoked."""

    async def work(desk: Desk) -> list["ApiKey"]:
        from parallama.db.manage import credentials

        return await credentials.list_keys(desk.engine, user)

    show_rows(map(_row, run(config, work)), output, _COLUMNS)


@app.command()
def get(key: KeyArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """Show what is known about one key."""

    async def work(desk: Desk) -> "ApiKey":
        from parallama.db.manage import credentials

        return await credentials.get_key(desk.engine, key)

    show(_row(run(config, work)), output)


@app.command()
def update(
    key: KeyArgument,
    name: Name = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="30d, 12h, ISO 8601 (UTC without a zone), or never."),
    ] = None,
    models: Annotated[
        str | None, typer.Option(metavar="A,B*", help="Only these models; '*' for every one.")
    ] = None,
    networks: Annotated[
        str | None, typer.Option(metavar="CIDR,...", help="Only from these; '*' from everywhere.")
    ] = None,
    gateways: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only for these; '*' for every one.")
    ] = None,
    scopes: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Only with these; '*' for all that its user may do."),
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Change what a key may be used for. It counts within a second."""
    bounds = {"models": models, "networks": networks, "gateways": gateways, "scopes": scopes}
    changes: dict[str, Any] = {
        field: None if text == "*" else split(text)
        for field, text in bounds.items()
        if text is not None
    }
    if name is not None:
        changes["name"] = name
    if not changes and expires is None:
        raise UsageError("nothing to change: name --expires, --models or another of the options")

    async def work(desk: Desk) -> "ApiKey":
        from parallama.db.manage import credentials

        if expires is not None:
            changes["expires_at"] = None if expires == "never" else parse_future(expires, desk.now)
        return await credentials.update_key(desk, key, **changes)

    show(_row(run(config, work)), output)


@app.command()
def rotate(
    key: KeyArgument,
    grace: Annotated[
        str,
        typer.Option(metavar="TIME", help="How long the old one works beside it: 24h, 30m, 0s."),
    ] = "24h",
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Give a key another secret and print it once. Its id, limits and usage stay."""
    lasts = parse_age(grace)
    if lasts is None:
        raise UsageError(f"not a duration: {grace!r}; write 24h, 30m or 0s")

    async def work(desk: Desk) -> tuple["ApiKey", str]:
        from parallama.db.manage import credentials
        from parallama.keys import mint

        minted = mint(os.urandom, rounds=desk.config.authentication.key_hash_rounds)
        return await credentials.rotate_key(desk, key, minted, grace=lasts), minted.token

    _show_once(*run(config, work), output)


@app.command()
def revoke(
    key: KeyArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """Stop a key within a second, for good."""

    async def work(desk: Desk) -> "ApiKey":
        from parallama.db.manage import credentials

        return await credentials.revoke_key(desk, key)

    show(_row(run(config, work)), output)


def _show_once(key: "ApiKey", token: str, output: Output) -> None:
    show(_row(key) | {"key": token}, output)
    if output is Output.TABLE:
        note("Keep the key now: it cannot be shown again.")


def _text(file: Path) -> str:
    """Of a small file. What is no text becomes what no public key has in it."""
    try:
        if str(file) == "-":
            raw = sys.stdin.buffer.read(_LARGEST_FILE)
        else:
            with file.expanduser().open("rb") as opened:
                raw = opened.read(_LARGEST_FILE)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    return raw.decode(errors="replace")


def _row(key: "ApiKey") -> dict[str, Any]:
    from parallama.db.manage.credentials import shown_id

    return {
        "id": key.id,
        "key_prefix": shown_id(key),
        "kind": key.kind,
        "name": key.name,
        "user": key.username,
        "user_id": key.user_id,
        "state": _state(key, datetime.now(UTC)),
        "models": key.models,
        "networks": key.networks,
        "gateways": key.gateways,
        "scopes": key.scopes,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
        "previous_expires_at": key.previous_expires_at,
    }


def _state(key: "ApiKey", now: datetime) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= now else "active"
