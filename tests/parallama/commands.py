"""Runs commands in this process, on a real database."""

import asyncio
import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from parallama.cli import app
from parallama.db import database, ledger
from parallama.usage import UsageRecord
from tests.parallama.db_on_disk import settings


class Parallama:
    """Runs commands with one configuration, made by `parallama init`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"

    def run(self, *words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--config", str(self.config)])

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
        assert isinstance(result.exception, SystemExit)
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        return result.stderr

    def add(self, *records: UsageRecord) -> None:
        async def work() -> None:
            async with database(settings(self.folder)) as store:
                await ledger.add(store, records)

        asyncio.run(work())

    def _checked(self, *words: str) -> Result:
        result = self.run(*words)
        assert result.exit_code == 0, (result.output, result.exception)
        assert result.stderr == "" or words[:2] == ("keys", "create")
        return result
