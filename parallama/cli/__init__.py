"""The `parallama` command: nouns, then verbs. Errors are printed here and nowhere else."""

import sys
from io import TextIOWrapper
from typing import Any

import typer
from typer.core import TyperGroup

from parallama import __version__
from parallama.cli import (
    audit,
    config,
    db,
    envoy,
    explain,
    identities,
    init,
    keys,
    limits,
    models,
    prices,
    restart,
    roles,
    signing_keys,
    status,
    tokens,
    up,
    usage,
    users,
)
from parallama.cli.options import GlobalConfigPath
from parallama.errors import Conflict, NotFound, ParallamaError, Unavailable, UsageError

EXIT_CODES = (
    (0, "done"),
    (1, "something an operator can fix; the message says what to do"),
    (2, "the command makes no sense as it was given"),
    (3, "what was named does not exist"),
    (4, "what should be made exists already, or more than one thing has that name"),
    (5, "a store did not answer: the same command may work later"),
    (130, "stopped by Ctrl-C"),
)

_CODE_OF: dict[type[ParallamaError], int] = {
    UsageError: 2,
    NotFound: 3,
    Conflict: 4,
    Unavailable: 5,
}


class _Commands(TyperGroup):
    """The root of all commands, where their errors become a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a reader that went away is noticed here, not while exiting
            return result
        except ParallamaError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(_CODE_OF.get(type(error), 1)) from None


# \b keeps the lines apart.
_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:<4} {what}" for code, what in EXIT_CODES)

app = typer.Typer(
    name="parallama",
    cls=_Commands,
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"parallama {__version__}")
        raise typer.Exit


@app.callback()
def root(
    config: GlobalConfigPath = None,
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and stop."
    ),
) -> None:
    """
    Keys, quotas and honest usage for a shared language-model server.

    Users, keys and limits go by name or id. Everything written to standard output is the answer,
    in a table or with -o json; everything else goes to standard error. Nothing asks back, but for
    passwords at a terminal.
    """


app.command()(init.init)
app.command()(up.up)
app.command()(restart.restart)
app.command()(envoy.envoy)
app.command()(status.status)
app.command()(explain.explain)
for _noun in (
    config,
    db,
    users,
    identities,
    roles,
    keys,
    limits,
    models,
    prices,
    usage,
    audit,
    tokens,
    signing_keys,
):
    app.add_typer(_noun.app)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, TextIOWrapper
        ):  # a name must not fail for the terminal's character set
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="parallama")
