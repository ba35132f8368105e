"""`parallama users`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama.cli.desk import Desk, run
from parallama.cli.options import ConfigPath, Output, OutputFormat, UserArgument
from parallama.cli.show import show, show_rows
from parallama.errors import UsageError
from parallama.roles import Role

if TYPE_CHECKING:
    from parallama.db.manage.people import User

app = typer.Typer(name="users", help="Who may come in.", no_args_is_help=True)

_COLUMNS = ("username", "role", "disabled_at", "created_at", "id")


@app.command()
def create(
    name: Annotated[
        str, typer.Argument(help="Up to 255 visible characters, without spaces and ':'.")
    ],
    role: Annotated[Role, typer.Option(help="What the user may do.")] = Role.USER,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Create the user NAME. Calls need a key as well: see `keys create`."""

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        return await people.create_user(desk.engine, name, role, now=desk.now)

    show(_row(run(config, work)), output)


@app.command("list")
def list_(config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """List all users by name."""

    async def work(desk: Desk) -> list["User"]:
        from parallama.db.manage import people

        return await people.list_users(desk.engine)

    show_rows(map(_row, run(config, work)), output, _COLUMNS)


@app.command()
def get(user: UserArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """Show one user."""

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        return await people.get_user(desk.engine, user)

    show(_row(run(config, work)), output)


@app.command()
def update(
    user: UserArgument,
    role: Annotated[Role | None, typer.Option(help="The new role.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The new name. Usage so far keeps the old one.")
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Change a user's role or name. It counts within a second."""
    if role is None and name is None:
        raise UsageError("nothing to change: name --role or --name")

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        changed = await people.update_user(
            desk.engine, user, now=desk.now, role=role, username=name
        )
        desk.changed("user", changed.id)
        desk.changed("limits", changed.id)  # another role has other defaults
        return changed

    show(_row(run(config, work)), output)


@app.command()
def disable(
    user: UserArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """Stop all of a user's keys within a second. `users enable` undoes it."""

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        changed = await people.disable_user(desk.engine, user, now=desk.now)
        desk.changed("user", changed.id)
        return changed

    show(_row(run(config, work)), output)


@app.command()
def enable(
    user: UserArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """Let a disabled user in again."""

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        changed = await people.enable_user(desk.engine, user, now=desk.now)
        desk.changed("user", changed.id)
        return changed

    show(_row(run(config, work)), output)


@app.command()
def delete(
    user: UserArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """Delete a user with all keys and limits, at once and for good. Usage stays on record."""

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        deleted = await people.delete_user(desk.engine, user)
        desk.changed("user", deleted.id)
        desk.changed("limits", deleted.id)
        return deleted

    show(_row(run(config, work)), output)


def _row(user: "User") -> dict[str, Any]:
    return {
        "id": user.id,
        "username": user.username,
        "role": user.role,
        "created_at": user.created_at,
        "updated_at": user.updated_at,
        "disabled_at": user.disabled_at,
    }
