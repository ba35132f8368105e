"""`parallama roles`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama.cli.desk import Desk, run
from parallama.cli.options import ConfigPath, Output, OutputFormat, split
from parallama.cli.show import show, show_rows
from parallama.errors import UsageError

if TYPE_CHECKING:
    from parallama.db.manage.roles import NamedRole

app = typer.Typer(name="roles", help="What users may do.", no_args_is_help=True)

_COLUMNS = ("name", "origin", "permissions", "description")

RoleArgument = Annotated[str, typer.Argument(metavar="ROLE", help="Its name.")]
Granted = typer.Option(
    metavar="A,B", help="resource:action[:scope], such as models:infer:ollama, usage:read, users:*."
)
Description = Annotated[str | None, typer.Option(help="What it is for.")]


@app.command("list")
def list_(config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """List all roles: those built in, those of the configuration, and those made here."""

    async def work(desk: Desk) -> list["NamedRole"]:
        from parallama.db.manage import roles

        return await roles.list_roles(desk.engine, desk.roles)

    show_rows(map(_row, run(config, work)), output, _COLUMNS)


@app.command()
def get(role: RoleArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """Show one role with all that it grants."""

    async def work(desk: Desk) -> "NamedRole":
        from parallama.db.manage import roles

        return await roles.get_role(desk.engine, desk.roles, role)

    show(_row(run(config, work)), output)


@app.command()
def create(
    role: Annotated[
        str, typer.Argument(metavar="ROLE", help="Up to 50 of a-z, 0-9, '_', '.' and '-'.")
    ],
    permissions: Annotated[str, Granted],
    description: Description = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Create the role ROLE. Users get it by `users create` and `users update`."""
    granted = split(permissions) or []

    async def work(desk: Desk) -> "NamedRole":
        from parallama.db.manage import roles

        return await roles.create_role(desk, role, granted, description=description)

    show(_row(run(config, work)), output)


@app.command()
def update(
    role: RoleArgument,
    permissions: Annotated[str | None, Granted] = None,
    description: Description = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Change what ROLE grants. It counts for all of its users within a second."""
    if permissions is None and description is None:
        raise UsageError("nothing to change: name --permissions or --description")

    async def work(desk: Desk) -> "NamedRole":
        from parallama.db.manage import roles

        return await roles.update_role(
            desk, role, granted=split(permissions), description=description
        )

    show(_row(run(config, work)), output)


@app.command()
def delete(
    role: RoleArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """Delete a role that no user has any more, and no limit is for."""

    async def work(desk: Desk) -> "NamedRole":
        from parallama.db.manage import roles

        return await roles.delete_role(desk, role)

    show(_row(run(config, work)), output)


def _row(role: "NamedRole") -> dict[str, Any]:
    return {
        "name": role.name,
        "origin": role.origin,
        "permissions": role.permissions,
        "description": role.description,
        "created_at": role.created_at,
        "updated_at": role.updated_at,
    }
