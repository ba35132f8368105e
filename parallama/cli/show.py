"""How answers are written: aligned columns for people, JSON and CSV for programs."""

import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from parallama.cli.options import FileFormat, Output
from parallama.money import plain

Row = Mapping[str, Any]

# A spreadsheet would run text that begins so. Model names are written by clients.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Printer:
    """
    Writes rows to standard output; call `end` when there are no more.

    A table shows `columns` and needs all rows before the first line. JSON and CSV show every
    field and are written as the rows come, so a million of them need no memory.
    """

    def __init__(self, output: Output | FileFormat, columns: Sequence[str]) -> None:
        self._output = output
        self._columns = columns
        self._count = 0
        self._table: list[list[Any]] = []
        self._csv = csv.writer(sys.stdout, lineterminator="\n")

    def add(self, row: Row) -> None:
        match self._output:
            case Output.TABLE:
                self._table.append([row[column] for column in self._columns])
            case Output.JSON | FileFormat.JSON:
                print("[" if self._count == 0 else ",", f"  {_json(row)}", sep="\n", end="")
            case FileFormat.NDJSON:
                print(_json(row))
            case Output.CSV | FileFormat.CSV:
                if self._count == 0:
                    self._csv.writerow(row)
                self._csv.writerow(_csv_cell(value) for value in row.values())
        self._count += 1

    def end(self) -> None:
        if self._output is Output.TABLE:
            _print_table([column.replace("_", " ") for column in self._columns], self._table)
        elif self._output in (Output.JSON, FileFormat.JSON):
            print("\n]" if self._count else "[]")


def show_rows(rows: Iterable[Row], output: Output, columns: Sequence[str]) -> None:
    printer = Printer(output, columns)
    for row in rows:
        printer.add(row)
    printer.end()


def show(row: Row, output: Output) -> None:
    """One thing: a line for each field, a JSON object, or CSV with one row."""
    match output:
        case Output.TABLE:
            width = max(map(len, row))
            for name, value in row.items():
                print(f"{name.replace('_', ' '):{width}}  {_text(value)}".rstrip())
        case Output.JSON:
            print(_json(row, indent=2))
        case Output.CSV:
            show_rows([row], output, list(row))


def note(text: str) -> None:
    """Something to know that is not the answer."""
    print(text, file=sys.stderr)


def iso(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    lines = [[name.upper() for name in header], *([_text(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [
        any(_is_number(row[at]) for row in rows)
        and all(_is_number(row[at], none=True) for row in rows)
        for at in range(len(header))
    ]
    for line in lines:
        cells = zip(line, widths, numeric, strict=True)
        print("  ".join(f"{c:>{w}}" if right else f"{c:<{w}}" for c, w, right in cells).rstrip())


def _is_number(value: object, *, none: bool = False) -> bool:
    if value is None:
        return none
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _text(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3f}"
        case Decimal():
            return plain(value)
        case datetime():
            return iso(value.replace(microsecond=0))
        case list() | tuple():
            return ", ".join(map(_text, value))
    # Names that clients chose must not move the cursor of who reads them.
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )


def _csv_cell(value: object) -> object:
    match value:
        case datetime():
            return iso(value)
        case list() | tuple():
            value = ",".join(map(str, value))
        case Mapping():
            value = _json(value)
        case bool():
            return "true" if value else "false"
        case Decimal():
            return plain(value)
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value


def _json(row: Row, indent: int | None = None) -> str:
    return json.dumps(row, indent=indent, default=_json_value, ensure_ascii=False)


def _json_value(value: object) -> object:
    if isinstance(value, datetime):
        return iso(value)
    if isinstance(value, Decimal):
        return plain(value)  # text: as a number it would come back as a float
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
