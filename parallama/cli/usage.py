"""`parallama usage`."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama.cli.desk import Desk, run
from parallama.cli.options import (
    ConfigPath,
    FileFormat,
    Output,
    OutputFormat,
    Since,
    Until,
    parse_past,
    split,
)
from parallama.cli.prune import prune
from parallama.cli.reconcile import reconcile
from parallama.cli.show import Printer, note, show_rows
from parallama.errors import UsageError

if TYPE_CHECKING:
    from parallama.db.manage.usage import Which
    from parallama.usage import UsageRecord

app = typer.Typer(name="usage", help="What was used.", no_args_is_help=True)

_TABLE_ROWS = 50
_COLUMNS = (
    "timestamp", "user", "gateway", "endpoint", "model_name", "requested_model",
    "prompt_tokens", "completion_tokens", "token_source", "status_code", "aborted",
    "request_duration", "time_to_first_token", "cost",
)  # fmt: skip
_SUMS = (
    "requests", "errors", "aborted", "prompt_tokens", "completion_tokens", "tokens_used", "cost",
    "without_cost",
)  # fmt: skip

User = Annotated[
    str | None, typer.Option(help="Only this user's, by name or id; also of a deleted one.")
]


@app.command("list")
def list_(
    user: User = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help=f"At most so many; {_TABLE_ROWS} in a table, otherwise all."),
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """List finished requests, newest first."""
    if limit is None and output is Output.TABLE:
        limit = _TABLE_ROWS
    shown = _print(config, _which(user, since, until), Printer(output, _COLUMNS), limit=limit)
    if output is Output.TABLE and shown == limit:
        note(f"The newest {limit} are shown: --limit shows more, `usage export` all.")


@app.command()
def summary(
    by: Annotated[
        str, typer.Option(metavar="A,B", help="Any of user, key, gateway, model, day.")
    ] = "user",
    user: User = None,
    since: Since = None,
    until: Until = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Add up requests, tokens and cost. Days are UTC.

    WITHOUT COST says how many requests used tokens of a model that had no price: their cost is not
    in the sum.
    """
    groups = split(by) or []

    async def work(desk: Desk) -> tuple[list[str], list[dict[str, Any]]]:
        from parallama.db.manage import usage

        unknown = [group for group in groups if group not in usage.BY]
        if unknown:
            known = ", ".join(usage.BY)
            raise UsageError(f"cannot add up by {', '.join(unknown)}: choose from {known}")
        columns = [next(iter(usage.BY[group])) for group in dict.fromkeys(groups)]
        return columns, await usage.summary(desk.engine, _which(user, since, until), groups)

    columns, rows = run(config, work)
    show_rows(rows, output, (*columns, *_SUMS))


@app.command()
def export(
    user: User = None,
    since: Since = None,
    until: Until = None,
    config: ConfigPath = None,
    output: Annotated[
        FileFormat, typer.Option("--output", "-o", help="The format; ndjson has a line for each.")
    ] = FileFormat.CSV,
) -> None:
    """
    Write all requests to standard output, oldest first.

    In CSV, text that a spreadsheet would take for a formula has a ' before it.
    """
    _print(config, _which(user, since, until), Printer(output, ()), newest_first=False)


app.command()(prune)
app.command()(reconcile)


def _print(
    config: Any,
    which: "Which",
    printer: Printer,
    *,
    limit: int | None = None,
    newest_first: bool = True,
) -> int:
    async def work(desk: Desk) -> int:
        from parallama.db.manage import usage

        count = 0
        rows = usage.rows(desk.engine, which, newest_first=newest_first, limit=limit)
        async for record in rows:
            printer.add(_row(record))
            count += 1
        printer.end()
        return count

    return run(config, work)


def _which(user: str | None, since: str | None, until: str | None) -> "Which":
    from parallama.db.manage.usage import Which

    now = datetime.now(UTC)
    return Which(user, parse_past(since, now), parse_past(until, now))


def _row(record: "UsageRecord") -> dict[str, Any]:
    fields = asdict(record)
    if record.decision is not None:
        fields["decision"] = json.loads(record.decision)
    row = {"request_id": fields.pop("request_id"), "timestamp": fields.pop("timestamp")}
    return row | {"user": fields.pop("username")} | fields
