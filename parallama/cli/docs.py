"""Writes docs/cli.md from the commands' own help: `python -m parallama.cli.docs > docs/cli.md`."""

from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from parallama.cli import EXIT_CODES, app

_WIDTH = 96

_INTRODUCTION = """\
# The `parallama` command

Written by `python -m parallama.cli.docs`; do not edit.

The configuration is named by `--config PATH`, before the noun or behind the verb, or by
`PARALLAMA_CONFIG`. Users, keys and limits go by name or id. The answer is on standard output: a
table, or `-o json` and `-o csv` for programs. Times are ISO 8601 in UTC; tables of limits and
grants have them in the configured time zone. Amounts of money are exact, in JSON as text. Warnings
and errors are on standard error, and nothing ever asks back, so every command can be used in a
script.

A key is printed once, by `keys create`, and is never accepted on a command line. Keys in text are
found by this regular expression; their last six characters are a checksum of the rest (CRC-32 in
base 62):

    {pattern}

| exit code | meaning |
|---|---|
{exit_codes}
"""


def render() -> str:
    from parallama.keys import PATTERN

    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES)
    sections = [_INTRODUCTION.format(pattern=PATTERN, exit_codes=codes)]
    for name, text in _commands(get_command(app), "parallama", None):
        sections.append(f"## {name}\n\n```text\n{text}\n```\n")
    return "\n".join(sections)


def _commands(command: Any, name: str, parent: Any) -> Iterator[tuple[str, str]]:
    context = typer.Context(
        command, info_name=name, parent=parent, terminal_width=_WIDTH, max_content_width=_WIDTH
    )
    if not isinstance(command, TyperGroup):
        help_text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        yield context.command_path, help_text
        return
    for verb, inner in command.commands.items():
        yield from _commands(inner, verb, context)


if __name__ == "__main__":
    print(render(), end="")
