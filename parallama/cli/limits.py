"""`parallama limits`."""

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama import money
from parallama.cli.desk import Desk, run
from parallama.cli.options import ConfigPath, Output, OutputFormat, UserArgument, parse_end
from parallama.cli.refusals import refusals
from parallama.cli.show import show, show_rows
from parallama.errors import UsageError
from parallama.limits import ANY, Unit, Window

if TYPE_CHECKING:
    from parallama.cli.refusals import Refusals
    from parallama.db.manage.grants import Granted
    from parallama.db.manage.limits import Amount as Number
    from parallama.db.manage.limits import Policy

app = typer.Typer(name="limits", help="How much users may use.", no_args_is_help=True)


class Gateway(StrEnum):
    OLLAMA = "ollama"
    OPENAI = "openai"
    EVERY = ANY


_COLUMNS = ("scope", "gateway", "model", "limit", "no_room", "resets_at", "shadow")
_GRANT_COLUMNS = ("id", "user", "gateway", "model", "amount", "unit", "until", "over")

# What can be set, by the name it has in the answer.
_CELLS = {
    f"{unit}_per_{window}": (unit, window)
    for unit in (Unit.REQUESTS, Unit.TOKENS, Unit.COMPUTE_SECONDS, Unit.COST)
    for window in (Window.MINUTE, Window.HOUR, Window.DAY, Window.MONTH)
    if unit is not Unit.COST or window in (Window.DAY, Window.MONTH)
} | {"concurrent": (Unit.CONCURRENT, Window.MOMENT)}
_TOLD = {Unit.COMPUTE_SECONDS: "compute seconds"}

Whose = Annotated[
    str,
    typer.Argument(
        metavar="SCOPE",
        help="Name or id of a user, role:NAME for a role's default, or key:NAME_OR_ID.",
    ),
]
Model = Annotated[
    str, typer.Option(help="A name or the beginning of one with *; all it covers share one count.")
]
Amount = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="0 refuses every call.", show_default=False)
]
Seconds = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=0, help="Of the model's work; 0 refuses every call.", show_default=False
    ),
]
Cost = Annotated[
    str | None,
    typer.Option(
        metavar="AMOUNT", help="By `parallama prices`; 0 refuses every call.", show_default=False
    ),
]


@app.command("set")
def set_(
    scope: Whose,
    gateway: Annotated[Gateway, typer.Option(help="Which gateway; '*' counts all together.")],
    model: Model = ANY,
    requests_per_minute: Amount = None,
    requests_per_hour: Amount = None,
    requests_per_day: Amount = None,
    requests_per_month: Amount = None,
    tokens_per_minute: Amount = None,
    tokens_per_hour: Amount = None,
    tokens_per_day: Amount = None,
    tokens_per_month: Amount = None,
    compute_seconds_per_minute: Seconds = None,
    compute_seconds_per_hour: Seconds = None,
    compute_seconds_per_day: Seconds = None,
    compute_seconds_per_month: Seconds = None,
    cost_per_day: Cost = None,
    cost_per_month: Cost = None,
    concurrent: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="At once; 0 refuses every call.", show_default=False),
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Count and report, and never refuse.")
    ] = False,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Set limits of a user or a key, or those that all users of a role have by default.

    Only the limits named here change. A user's own one counts instead of the role's for the same
    gateway, model, unit and window; a key's counts besides. Windows follow the calendar of the
    configured time zone. Limits in the shadow stand beside the others, for a try.
    """
    given: dict[str, Number | None] = {
        "requests_per_minute": requests_per_minute,
        "requests_per_hour": requests_per_hour,
        "requests_per_day": requests_per_day,
        "requests_per_month": requests_per_month,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_hour": tokens_per_hour,
        "tokens_per_day": tokens_per_day,
        "tokens_per_month": tokens_per_month,
        "compute_seconds_per_minute": compute_seconds_per_minute,
        "compute_seconds_per_hour": compute_seconds_per_hour,
        "compute_seconds_per_day": compute_seconds_per_day,
        "compute_seconds_per_month": compute_seconds_per_month,
        "cost_per_day": None if cost_per_day is None else money.parse(cost_per_day),
        "cost_per_month": None if cost_per_month is None else money.parse(cost_per_month),
        "concurrent": concurrent,
    }
    amounts = {_CELLS[name]: amount for name, amount in given.items() if amount is not None}

    async def work(desk: Desk) -> tuple[Desk, "Policy"]:
        from parallama.db.manage import limits

        policy = await limits.set_limits(
            desk,
            scope,
            gateway=gateway,
            model=model,
            amounts=amounts,
            shadow=shadow,
        )
        return desk, policy

    desk, policy = run(config, work)
    if output is Output.TABLE:
        show_rows(_lines(desk, policy, {}), output, _COLUMNS)
    else:
        show(_row(policy), output)


@app.command("list")
def list_(
    scope: Annotated[
        str | None,
        typer.Argument(
            metavar="[SCOPE]",
            help="A user, with the role's and the keys'; a key, with the user's; or role:NAME.",
        ),
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    List the limits that are set, and when each count starts again. What is not listed is not
    limited.

    A table has a line for each limit, with times in the configured time zone. NO ROOM says how many
    calls found none in this window, or for `concurrent` within a day: they were refused, or a grant
    paid for them; of a limit in the shadow, they would have been. Roles are counted user by user:
    name a SCOPE to see it.
    """

    async def work(desk: Desk) -> tuple[Desk, list["Policy"], "Refusals"]:
        from parallama.db.manage import limits

        policies = await limits.list_limits(desk.engine, scope, roles=desk.roles)
        user = None if scope is None else await limits.user_of(desk.engine, scope, roles=desk.roles)
        return desk, policies, await refusals(desk, policies, user)

    desk, policies, no_room = run(config, work)
    if output is Output.TABLE:
        lines = (line for policy in policies for line in _lines(desk, policy, no_room))
        show_rows(lines, output, _COLUMNS)
    else:
        rows = (_row(each) | _no_room(each, no_room) | _resets(desk, each) for each in policies)
        show_rows(rows, output, ())


@app.command()
def unset(
    scope: Whose,
    gateway: Annotated[
        Gateway | None, typer.Option(help="Only those of this gateway.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Only those of this model; needs --gateway.")
    ] = None,
    shadow: Annotated[bool, typer.Option("--shadow", help="Only those that never refuse.")] = False,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Remove the own limits of a user, so that the role's count; or a role's, or a key's."""
    if model is not None and gateway is None:
        raise UsageError("--model needs --gateway: limits belong to both")

    async def work(desk: Desk) -> int:
        from parallama.db.manage import limits

        _, removed = await limits.unset_limits(
            desk, scope, gateway=gateway, model=model, shadow=True if shadow else None
        )
        return removed

    show({"removed": run(config, work)}, output)


@app.command()
def grant(
    user: UserArgument,
    until: Annotated[
        str,
        typer.Option(
            metavar="WHEN",
            help="3d or 12h from now; today, tomorrow, a weekday such as Friday (the next one, "
            "today's included) or a date such as 2026-01-31, to the end of that day; or a time "
            "such as 2026-01-31T12:00. All in the configured time zone.",
        ),
    ],
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="So many tokens more.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="So many requests more.")
    ] = None,
    compute_seconds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="So much more of the model's work.")
    ] = None,
    cost: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="So much more, by `parallama prices`.")
    ] = None,
    gateway: Annotated[Gateway, typer.Option(help="For which gateway.")] = Gateway.EVERY,
    model: Annotated[
        str, typer.Option(help="For which model: a name, or the beginning of one with *.")
    ] = ANY,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Give USER more for a while, beyond every limit of the same unit.

    It is used up only by what the limits alone would refuse, and once.
    """
    given: dict[Unit, Number | None] = {
        Unit.TOKENS: tokens,
        Unit.REQUESTS: requests,
        Unit.COMPUTE_SECONDS: compute_seconds,
        Unit.COST: None if cost is None else money.parse(cost),
    }
    named = [(unit, amount) for unit, amount in given.items() if amount is not None]
    if len(named) != 1:
        raise UsageError("name one of --tokens, --requests, --compute-seconds, --cost")
    ((unit, amount),) = named

    async def work(desk: Desk) -> tuple[Desk, "Granted"]:
        from parallama.db.manage import grants

        made = await grants.grant(
            desk,
            user,
            unit,
            amount,
            until=parse_end(until, desk.now, desk.config.rate_limiting.zone),
            gateway=gateway,
            model=model,
        )
        return desk, made

    desk, made = run(config, work)
    show(_grant_row(made, desk, output), output)


@app.command("grants")
def grants_(
    user: Annotated[
        str | None, typer.Argument(metavar="[USER]", help="Only this user's, by name or id.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Those that are over as well.")] = False,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """List what was granted."""

    async def work(desk: Desk) -> tuple[Desk, list["Granted"]]:
        from parallama.db.manage import grants

        after = None if all_ else desk.now
        return desk, await grants.list_grants(desk.engine, user, after=after)

    desk, granted = run(config, work)
    show_rows((_grant_row(each, desk, output) for each in granted), output, _GRANT_COLUMNS)


@app.command("revoke-grant")
def revoke_grant(
    id: Annotated[str, typer.Argument(metavar="ID", help="As `parallama limits grants` shows it.")],
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Take a grant back. What was used of it stays used."""

    async def work(desk: Desk) -> tuple[Desk, "Granted"]:
        from parallama.db.manage import grants

        return desk, await grants.revoke_grant(desk, id)

    desk, revoked = run(config, work)
    show(_grant_row(revoked, desk, output), output)


def _row(policy: "Policy") -> dict[str, Any]:
    return {
        "id": policy.id,
        "scope": policy.scope,
        "user_id": policy.user_id,
        "key_id": policy.key_id,
        "gateway": policy.gateway,
        "model": policy.model,
        "shadow": policy.shadow,
        **{name: policy.amounts.get(cell) for name, cell in _CELLS.items()},
        "updated_at": policy.updated_at,
    }


def _resets(desk: Desk, policy: "Policy") -> dict[str, Any]:
    """A time for each window that something is limited in."""
    limited = {window for _, window in policy.amounts}
    return {
        f"{window}_resets_at": _end(desk, window).astimezone(UTC) if window in limited else None
        for window in Window
        if window is not Window.MOMENT
    }


def _no_room(policy: "Policy", no_room: "Refusals") -> dict[str, Any]:
    return {f"{name}_no_room": no_room.get((policy.id, cell)) for name, cell in _CELLS.items()}


def _lines(desk: Desk, policy: "Policy", no_room: "Refusals") -> Iterator[dict[str, Any]]:
    """What a person reads: a line for each limit."""
    scope = policy.scope
    if policy.key_id is not None:
        name = "" if policy.key_name is None else f" {policy.key_name!r}"
        scope = f"{scope} ({policy.username}'s{name})"
    for (unit, window), amount in policy.amounts.items():
        yield {
            "scope": scope,
            "gateway": policy.gateway,
            "model": policy.model,
            "limit": _told(unit, window, amount),
            "no_room": no_room.get((policy.id, (unit, window))),
            "resets_at": None if window is Window.MOMENT else _end(desk, window),
            "shadow": policy.shadow,
        }


def _told(unit: Unit, window: Window, amount: "Number") -> str:
    if unit is Unit.COST:
        return f"cost {money.plain(Decimal(amount))} per {window}"
    if unit is Unit.CONCURRENT:
        return f"{amount} requests at once"
    return f"{amount} {_TOLD.get(unit, unit)} per {window}"


def _end(desk: Desk, window: Window) -> datetime:
    zone = desk.config.rate_limiting.zone
    return datetime.fromtimestamp(window.bounds(desk.now.timestamp(), zone)[1], zone)


def _grant_row(grant: "Granted", desk: Desk, output: Output) -> dict[str, Any]:
    zone = desk.config.rate_limiting.zone if output is Output.TABLE else UTC
    return {
        "id": grant.id,
        "user": grant.username,
        "user_id": grant.user_id,
        "gateway": grant.gateway,
        "model": grant.model,
        "unit": grant.unit,
        "amount": grant.amount,
        "created_at": grant.created_at.astimezone(zone),
        "until": grant.expires_at.astimezone(zone),
        "over": grant.expires_at <= desk.now,
    }
