"""`parallama audit`."""

from collections.abc import Mapping
from dataclasses import asdict
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
)
from parallama.cli.show import Printer, note

if TYPE_CHECKING:
    from parallama.db.manage.audit import Entry, Which

app = typer.Typer(name="audit", help="Who changed what.", no_args_is_help=True)

_TABLE_ROWS = 50
_COLUMNS = ("at", "actor", "via", "action", "subject", "changes")

By = Annotated[str | None, typer.Option("--actor", help="Only by this one, by name or id.")]
Of = Annotated[
    str | None, typer.Option("--subject", help="Only of this user, key, role ..., by name or id.")
]
Action = Annotated[
    str | None, typer.Option(help="Only this, such as keys.rotate; or keys for all of them.")
]


@app.command("list")
def list_(
    actor: By = None,
    subject: Of = None,
    action: Action = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help=f"At most so many; {_TABLE_ROWS} in a table, otherwise all."),
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """List changes, newest first."""
    if limit is None and output is Output.TABLE:
        limit = _TABLE_ROWS
    which = (actor, subject, action, since, until)
    shown = _print(config, which, Printer(output, _COLUMNS), newest_first=True, limit=limit)
    if output is Output.TABLE and shown == limit:
        note(f"The newest {limit} are shown: --limit shows more, `audit export` all.")


@app.command()
def export(
    actor: By = None,
    subject: Of = None,
    action: Action = None,
    since: Since = None,
    until: Until = None,
    config: ConfigPath = None,
    output: Annotated[
        FileFormat, typer.Option("--output", "-o", help="The format; ndjson has a line for each.")
    ] = FileFormat.CSV,
) -> None:
    """
    Write all changes to standard output, oldest first.

    In CSV, text that a spreadsheet would take for a formula has a ' before it.
    """
    which = (actor, subject, action, since, until)
    _print(config, which, Printer(output, ()), newest_first=False, limit=None)


def _print(
    config: Any,
    which: tuple[str | None, ...],
    printer: Printer,
    *,
    newest_first: bool,
    limit: int | None,
) -> int:
    async def work(desk: Desk) -> int:
        from parallama.db.manage import audit

        count = 0
        entries = audit.entries(
            desk.engine, _which(desk, *which), newest_first=newest_first, limit=limit
        )
        async for entry in entries:
            printer.add(_row(entry))
            count += 1
        printer.end()
        return count

    return run(config, work)


def _which(
    desk: Desk,
    actor: str | None,
    subject: str | None,
    action: str | None,
    since: str | None,
    until: str | None,
) -> "Which":
    from parallama.db.manage.audit import Which

    return Which(
        actor=actor,
        subject=subject,
        action=action,
        since=parse_past(since, desk.now),
        until=parse_past(until, desk.now),
    )


def _row(entry: "Entry") -> dict[str, Any]:
    return asdict(entry) | {"changes": _changes(entry.before, entry.after)}


def _changes(before: object, after: object) -> list[str]:
    """What is different, in words: what a person looks for first."""
    old = before if isinstance(before, Mapping) else {}
    new = after if isinstance(after, Mapping) else {}
    names = [name for name in {**old, **new} if name != "updated_at"]
    if not old or not new:
        return []
    return [
        f"{name}: {_told(old.get(name))} -> {_told(new.get(name))}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _told(value: object) -> str:
    if value is None:
        return "-"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
