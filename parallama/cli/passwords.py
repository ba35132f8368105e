"""Where commands get a password from: a terminal, standard input, or a file. Never from words."""

import getpass
import sys
from pathlib import Path
from typing import Annotated

import typer

from parallama.errors import UsageError

_LARGEST = 4096

PasswordFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Its first line is the password; - for standard input."),
]


def ask(what: str) -> str:
    """Twice, without showing it. Empty if nothing was typed."""
    first = getpass.getpass(f"{what}: ")
    if first and getpass.getpass("The same again: ") != first:
        raise UsageError("these two are not the same: nothing was changed")
    return first


def at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def read(file: Path) -> str:
    try:
        if str(file) == "-":
            raw = sys.stdin.buffer.read(_LARGEST)
        else:
            with file.expanduser().open("rb") as opened:
                raw = opened.read(_LARGEST)
        password = raw.decode().partition("\n")[0].removesuffix("\r")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError("a password is UTF-8 text, and this is not") from None
    if not password:
        raise UsageError("there is no password on the first line")
    return password
