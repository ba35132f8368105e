"""`parallama usage prune`, on either database."""

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallama.config import Database
from parallama.db import database, ledger
from parallama.values import SecretFile
from tests.parallama.commands import invoke
from tests.parallama.db_on_disk import Opened, a_record, on

NOW = datetime.now(UTC)
AGES = (0, 1, 40, 89, 91, 400)


@pytest.fixture
def config(db: Database, tmp_path: Path) -> Path:
    """Of a database with rows of these ages in days."""

    async def fill(at: Opened) -> None:
        rows = [a_record(f"r{age}", timestamp=NOW - timedelta(days=age)) for age in AGES]
        await ledger.add(at.store, rows)

    on(db, fill)
    path = tmp_path / "config.yaml"
    told = {name: getattr(db, name) for name in db.model_fields_set}
    given = {
        name: str(at.path if isinstance(at, SecretFile) else at) if name != "port" else at
        for name, at in told.items()
    }
    path.write_text(yaml.safe_dump({"database": given}))
    return path


def prune(config: Path, *words: str) -> Any:
    told = invoke("usage", "prune", "--config", str(config), "-o", "json", *words)
    assert told.exit_code == 0, told.stderr
    return json.loads(told.stdout)


def left(db: Database) -> list[str]:
    async def look() -> Sequence[str]:
        async with database(db) as store:
            rows = await store.read("SELECT request_id FROM gateway_usage_logs ORDER BY timestamp")
            return [id for (id,) in rows]

    return list(asyncio.run(look()))


def test_rows_go_by_age(db: Database, config: Path) -> None:
    told = prune(config, "--older-than", "90d")
    assert (told["rows"], told["removed"]) == (2, True)
    assert left(db) == ["r89", "r40", "r1", "r0"]


def test_rows_go_by_date(db: Database, config: Path) -> None:
    day = f"{NOW - timedelta(days=39):%Y-%m-%d}"
    told = prune(config, "--before", day)
    assert told == {"before": f"{day}T00:00:00Z", "rows": 4, "removed": True}
    assert left(db) == ["r1", "r0"]


def test_a_dry_run_only_counts(db: Database, config: Path) -> None:
    told = prune(config, "--older-than", "12w", "--dry-run")
    assert (told["rows"], told["removed"]) == (3, False)
    assert len(left(db)) == len(AGES)


def test_the_configuration_says_how_long_rows_are_kept(
    db: Database, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLAMA_USAGE__RETENTION_DAYS", "30")
    assert prune(config)["rows"] == 4
    assert left(db) == ["r1", "r0"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "set usage.retention_days"),
        (("--before", "2026-01-01", "--older-than", "1d"), "either --before or --older-than"),
        (("--before", "2999-01-01"), "in the future"),
        (("--before", "soon"), "not a time"),
        (("--older-than", "soon"), "not an age"),
        (("--older-than", "99999999d"), "too long a time"),
    ],
)
def test_what_nobody_could_mean_removes_nothing(
    db: Database, config: Path, words: tuple[str, ...], complaint: str
) -> None:
    told = invoke("usage", "prune", "--config", str(config), *words)
    assert told.exit_code == 2
    assert complaint in told.stderr
    assert len(left(db)) == len(AGES)
