"""`parallama limits`."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama.cli.desk import Desk, run
from parallama.cli.options import ConfigPath, Output, OutputFormat
from parallama.cli.show import show, show_rows
from parallama.errors import UsageError
from parallama.limits import ANY, Unit, Window

if TYPE_CHECKING:
    from parallama.db.manage.limits import Policy

app = typer.Typer(name="limits", help="How much users may use.", no_args_is_help=True)


class Gateway(StrEnum):
    OLLAMA = "ollama"
    OPENAI = "openai"
    EVERY = ANY


_COLUMNS = (
    "scope", "gateway", "model", "requests_per_minute", "requests_per_hour", "requests_per_day",
    "tokens_per_minute", "tokens_per_hour", "tokens_per_day",
)  # fmt: skip

Whose = Annotated[
    str,
    typer.Argument(metavar="USER", help="Name or id of a user, or role:NAME for a role's default."),
]
Model = Annotated[
    str, typer.Option(help="A name or the beginning of one with *; all it covers share one count.")
]
Amount = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="0 refuses every call.", show_default=False)
]


@app.command("set")
def set_(
    user: Whose,
    gateway: Annotated[Gateway, typer.Option(help="Which gateway; '*' counts all together.")],
    model: Model = ANY,
    requests_per_minute: Amount = None,
    requests_per_hour: Amount = None,
    requests_per_day: Amount = None,
    tokens_per_minute: Amount = None,
    tokens_per_hour: Amount = None,
    tokens_per_day: Amount = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Set limits of a user, or those that all users of a role have by default.

    Only the limits named here change. A user's own one counts instead of the role's for the same
    gateway, model, unit and window. Windows follow the UTC calendar.
    """
    given = {
        (Unit.REQUESTS, Window.MINUTE): requests_per_minute,
        (Unit.REQUESTS, Window.HOUR): requests_per_hour,
        (Unit.REQUESTS, Window.DAY): requests_per_day,
        (Unit.TOKENS, Window.MINUTE): tokens_per_minute,
        (Unit.TOKENS, Window.HOUR): tokens_per_hour,
        (Unit.TOKENS, Window.DAY): tokens_per_day,
    }
    amounts = {cell: amount for cell, amount in given.items() if amount is not None}

    async def work(desk: Desk) -> "Policy":
        from parallama.db.manage import limits

        policy = await limits.set_limits(
            desk.engine, user, gateway=gateway, model=model, amounts=amounts, now=desk.now
        )
        desk.changed("limits", policy.user_id or "")
        return policy

    show(_row(run(config, work)), output)


@app.command("list")
def list_(
    user: Annotated[
        str | None, typer.Argument(metavar="[USER]", help="A user, with the role's, or role:NAME.")
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """List the limits that are set. What is not listed is not limited."""

    async def work(desk: Desk) -> list["Policy"]:
        from parallama.db.manage import limits

        return await limits.list_limits(desk.engine, user)

    show_rows(map(_row, run(config, work)), output, _COLUMNS)


@app.command()
def unset(
    user: Whose,
    gateway: Annotated[
        Gateway | None, typer.Option(help="Only those of this gateway.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Only those of this model; needs --gateway.")
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Remove a user's own limits, so that the role's defaults count; or a role's defaults."""
    if model is not None and gateway is None:
        raise UsageError("--model needs --gateway: limits belong to both")

    async def work(desk: Desk) -> int:
        from parallama.db.manage import limits

        scope, removed = await limits.unset_limits(desk.engine, user, gateway=gateway, model=model)
        desk.changed("limits", scope.user_id or "")
        return removed

    show({"removed": run(config, work)}, output)


def _row(policy: "Policy") -> dict[str, Any]:
    amounts = {
        f"{unit}_per_{window}": policy.amounts.get((unit, window))
        for unit in Unit
        for window in Window
    }
    return {
        "id": policy.id,
        "scope": policy.scope,
        "user_id": policy.user_id,
        "gateway": policy.gateway,
        "model": policy.model,
        **amounts,
        "updated_at": policy.updated_at,
    }
