"""`parallama users`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama.cli import passwords
from parallama.cli.desk import Desk, run
from parallama.cli.options import ConfigPath, Output, OutputFormat, UserArgument, split
from parallama.cli.show import show, show_rows
from parallama.errors import UsageError
from parallama.roles import Role

if TYPE_CHECKING:
    from parallama.db.manage.people import User

app = typer.Typer(name="users", help="Who may come in.", no_args_is_help=True)

_COLUMNS = ("username", "role", "more_roles", "disabled_at", "created_at", "id")


@app.command()
def create(
    name: Annotated[
        str, typer.Argument(help="Up to 255 visible characters, without spaces and ':'.")
    ],
    role: Annotated[
        str, typer.Option(help="What the user may do, and whose default limits count.")
    ] = Role.USER.value,
    more_roles: Annotated[
        str | None, typer.Option(metavar="A,B", help="Roles that grant more besides.")
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Create the user NAME. Calls need a key as well: see `keys create`."""

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        return await people.create_user(desk, name, role, more_roles=split(more_roles) or ())

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
    role: Annotated[str | None, typer.Option(help="The new role.")] = None,
    more_roles: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="All roles that grant more besides; '' for none."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The new name. Usage so far keeps the old one.")
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Change a user's roles or name. It counts within a second."""
    if role is None and more_roles is None and name is None:
        raise UsageError("nothing to change: name --role, --more-roles or --name")

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        return await people.update_user(
            desk, user, role=role, more_roles=split(more_roles), username=name
        )

    show(_row(run(config, work)), output)


@app.command()
def disable(
    user: UserArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """Stop all of a user's keys within a second. `users enable` undoes it."""

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        return await people.disable_user(desk, user)

    show(_row(run(config, work)), output)


@app.command()
def enable(
    user: UserArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """Let a disabled user in again."""

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        return await people.enable_user(desk, user)

    show(_row(run(config, work)), output)


@app.command("set-password")
def set_password(
    user: UserArgument,
    password_file: passwords.PasswordFile = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Let the user not log in at all any more.")
    ] = False,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Give a user a password to log in with. All sessions of the user end; keys stay good.

    It is asked for at a terminal, else read from standard input.
    """
    password = None
    if remove and password_file is not None:
        raise UsageError("name either --remove or --password-file")
    if not remove and password_file is None and passwords.at_terminal():
        password = passwords.ask(f"New password for {user}")
    elif not remove:
        password = passwords.read(password_file or Path("-"))

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        settings = desk.config.authentication
        return await people.set_password(desk, user, password, settings=settings)

    show(_row(run(config, work)), output)


@app.command()
def unlock(
    user: UserArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """
    Let a user log in at once, who has to wait for wrong passwords.

    Where it is the address that has to wait, it goes on to.
    """

    async def work(desk: Desk) -> "User":
        from contextlib import aclosing

        from parallama.db.manage import sessions
        from parallama.lockout import Lockout
        from parallama.stores import connect_redis

        told, timeout = desk.config.authentication, desk.config.redis.timeout_seconds
        async with (
            connect_redis(desk.config) as redis,
            aclosing(Lockout(redis, told, timeout=timeout)) as lockout,
        ):
            return await sessions.unlock(desk, user, lockout)

    show(_row(run(config, work)), output)


@app.command("log-out")
def log_out(
    user: UserArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """End all of a user's sessions within a second. Keys stay good."""

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        return await people.log_out(desk, user)

    show(_row(run(config, work)), output)


@app.command()
def delete(
    user: UserArgument, config: ConfigPath = None, output: OutputFormat = Output.TABLE
) -> None:
    """Delete a user with all keys and limits, at once and for good. Usage stays on record."""

    async def work(desk: Desk) -> "User":
        from parallama.db.manage import people

        return await people.delete_user(desk, user)

    show(_row(run(config, work)), output)


def _row(user: "User") -> dict[str, Any]:
    return {
        "id": user.id,
        "username": user.username,
        "role": user.role,
        "more_roles": user.more_roles,
        "created_at": user.created_at,
        "updated_at": user.updated_at,
        "disabled_at": user.disabled_at,
        "has_password": user.has_password,
    }
