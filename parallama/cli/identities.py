"""`parallama identities`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from parallama.cli.desk import Desk, run
from parallama.cli.options import ConfigPath, Output, OutputFormat
from parallama.cli.show import show, show_rows

if TYPE_CHECKING:
    from parallama.db.manage.identities import Identity

app = typer.Typer(
    name="identities",
    help="Who users are in the tokens of other issuers (authentication.issuers).",
    no_args_is_help=True,
)

_COLUMNS = ("username", "issuer", "subject", "created_at")

Issuer = Annotated[str, typer.Option(help="Who issues the tokens: their `iss`.")]
Subject = Annotated[str, typer.Option(help="Who the user is in them: their `sub`.")]


@app.command("list")
def list_(
    user: Annotated[str | None, typer.Option(help="Of this user alone.")] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """List them by user."""

    async def work(desk: Desk) -> list["Identity"]:
        from parallama.db.manage import identities

        return await identities.list_identities(desk.engine, user)

    show_rows(map(asdict, run(config, work)), output, _COLUMNS)


@app.command()
def add(
    user: Annotated[str, typer.Argument(metavar="USER", help="A user's name or id.")],
    issuer: Issuer,
    subject: Subject,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Take tokens of an issuer for USER's. They work within a second."""

    async def work(desk: Desk) -> "Identity":
        from parallama.db.manage import identities

        return await identities.link(desk, user, issuer=issuer, subject=subject)

    show(asdict(run(config, work)), output)


@app.command()
def remove(
    issuer: Issuer,
    subject: Subject,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Take them for nobody's. The user stays; the tokens are refused within a second."""

    async def work(desk: Desk) -> "Identity":
        from parallama.db.manage import identities

        return await identities.unlink(desk, issuer=issuer, subject=subject)

    show(asdict(run(config, work)), output)
