"""The short form of `make faults`."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.breaking import FAULTS
from tests.faults.databases import Books, Postgresql, Sqlite
from tests.faults.story import tell
from tests.postgres import Postgres

KILLS = ("kill usage_sink", "kill ratelimit", "kill valkey", "kill envoy")


def check(folder: Path, name: str, books: Books) -> None:
    outcome = tell(folder, name, replace(FAULTS[name], times=1), books, calls=200)
    assert not outcome.bad
    assert outcome.rows > 150


@pytest.mark.parametrize("fault", KILLS)
def test_one_call_is_one_row_whatever_dies(tmp_path: Path, fault: str) -> None:
    check(tmp_path / "g", fault, Sqlite())


def test_one_call_is_one_row_where_postgresql_dies(tmp_path: Path, postgres: Postgres) -> None:
    check(tmp_path / "g", "kill postgres", Postgresql(postgres))
