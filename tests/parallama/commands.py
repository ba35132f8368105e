"""Runs commands in this process, on a real database."""

import asyncio
import csv
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from parallama.cli import app
from parallama.db import database, ledger
from parallama.usage import UsageRecord
from tests.parallama.db_on_disk import settings


@dataclass(frozen=True)
class Done:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@cache
def _commands() -> Any:
    """All of them. Typer's own runner makes them anew for each call, which takes half its time."""
    return get_command(app)


def invoke(
    *words: str, text: str | bytes | None = None, environ: Mapping[str, str] | None = None
) -> Done:
    """`parallama` with these words, and `text` on its standard input. What it raises is raised."""
    with CliRunner().isolation(input=text, env=environ) as (stdout, stderr, _):
        with pytest.raises(SystemExit) as end:
            _commands().main(args=words, prog_name="parallama")
        sys.stdout.flush()
        sys.stderr.flush()
        told = [stream.getvalue().decode() for stream in (stdout, stderr)]
    assert isinstance(end.value.code, int)
    return Done(end.value.code, *told)


class Parallama:
    """Runs commands with one configuration, made by `parallama init`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"

    def run(self, *words: str) -> Done:
        return invoke(*words, "--config", str(self.config))

    def table(self, *words: str) -> str:
        return self._checked(*words).stdout

    def json(self, *words: str) -> Any:
        return json.loads(self._checked(*words, "-o", "json").stdout)

    def csv(self, *words: str) -> list[dict[str, str]]:
        return list(csv.DictReader(StringIO(self._checked(*words, "-o", "csv").stdout)))

    def refused(self, code: int, *words: str) -> str:
        """What stands on stderr; nothing is on stdout, and there is no traceback."""
        result = self.run(*words)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        return result.stderr

    def add(self, *records: UsageRecord) -> None:
        async def work() -> None:
            async with database(settings(self.folder)) as store:
                await ledger.add(store, records)

        asyncio.run(work())

    def _checked(self, *words: str) -> Done:
        result = self.run(*words)
        assert result.exit_code == 0, result.output
        assert result.stderr == "" or words[:2] == ("keys", "create")
        return result
