"""`parallama keys`."""

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama.cli.desk import Desk, run
from parallama.cli.options import (
    ConfigPath,
    Output,
    OutputFormat,
    UserArgument,
    parse_future,
    split,
)
from parallama.cli.show import note, show, show_rows

if TYPE_CHECKING:
    from parallama.db.manage.people import ApiKey

app = typer.Typer(name="keys", help="What users come in with.", no_args_is_help=True)

_COLUMNS = ("key_prefix", "name", "user", "state", "models", "expires_at", "last_used_at", "id")

KeyArgument = Annotated[
    str,
    typer.Argument(metavar="KEY", help="Id, public part (plm_ and 12 characters) or name of it."),
]


@app.command()
def create(
    user: UserArgument,
    name: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="30d, 12h, or ISO 8601 (UTC without a zone)."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="A,B*", help="Only these models; a trailing * is a wildcard."),
    ] = None,
    networks: Annotated[
        str | None,
        typer.Option(metavar="CIDR,...", help="Only from these networks or addresses."),
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Create a key for USER and print it. This is the only time: it is stored as a hash."""

    async def work(desk: Desk) -> tuple["ApiKey", str]:
        from parallama.db.manage import people
        from parallama.keys import mint

        minted = mint(os.urandom, rounds=desk.config.authentication.key_hash_rounds)
        key = await people.create_key(
            desk.engine,
            user,
            minted,
            now=desk.now,
            name=name,
            expires_at=parse_future(expires, desk.now),
            models=split(models),
            networks=split(networks),
        )
        return key, minted.token

    key, token = run(config, work)
    show(_row(key) | {"key": token}, output)
    if output is Output.TABLE:
        note("Keep the key now: it cannot be shown again.")


@app.command("list")
def list_(
    user: Annotated[str | None, typer.Option(help="Only this user's, by name or id.")] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """List keys, oldest first, with those that expired or were revoked."""

    async def work(desk: Desk) -> list["ApiKey"]:
        from parallama.db.manage import people

        return await people.list_keys(desk.engine, user)

    show_rows(map(_row, run(config, work)), output, _COLUMNS)


@app.command()
def get(key: KeyArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """Show what is known about one key."""

    async def work(desk: Desk) -> "ApiKey":
        from parallama.db.manage import people

        return await people.get_key(desk.engine, key)

    show(_row(run(config, work)), output)


@app.command()
def revoke(
    key: KeyArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """Stop a key within a second, for good."""

    async def work(desk: Desk) -> "ApiKey":
        from parallama.db.manage import people

        revoked = await people.revoke_key(desk.engine, key, now=desk.now)
        desk.changed("key", revoked.id)
        return revoked

    show(_row(run(config, work)), output)


def _row(key: "ApiKey") -> dict[str, Any]:
    from parallama.keys import PREFIX

    return {
        "id": key.id,
        "key_prefix": PREFIX + key.public_id,
        "name": key.name,
        "user": key.username,
        "user_id": key.user_id,
        "state": _state(key, datetime.now(UTC)),
        "models": key.models,
        "networks": key.networks,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
    }


def _state(key: "ApiKey", now: datetime) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= now else "active"
