"""A real Valkey for all, and a house for each test."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from parallama.config import Database
from tests.admin import house
from tests.parallama.db_on_disk import settings
from tests.valkey import Valkey


@pytest.fixture(scope="session")
def shared_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey(tmp_path_factory.mktemp("v"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def valkey(shared_valkey: Valkey) -> Valkey:
    shared_valkey.flush()
    return shared_valkey


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: to make a signing key takes a tenth of a second."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def on_both(state: Path, db: Database, valkey: Valkey) -> Any:
    """Runs a story on SQLite, and on PostgreSQL."""
    return partial(house.run, state, db, valkey)


@pytest.fixture
def on_one(state: Path, tmp_path: Path, valkey: Valkey) -> Any:
    """Runs a story where it does not matter which database it is."""
    return partial(house.run, state, settings(tmp_path), valkey)
