"""A real Valkey for the tests of the counters: a process, and a container where there are any."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers import stores
from tests.valkey import Valkey

_PLACES = stores.places("valkey")


@pytest.fixture(scope="session", params=_PLACES)
def shared_valkey(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Valkey]:
    server = stores.valkey(request.param, tmp_path_factory.mktemp("v"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def valkey(shared_valkey: Valkey) -> Valkey:
    """Empty, and shared by all tests."""
    shared_valkey.flush()
    return shared_valkey


@pytest.fixture(params=_PLACES)
def own_valkey(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Valkey]:
    """One that a test may kill."""
    server = stores.valkey(request.param, tmp_path)
    server.start()
    yield server
    server.stop()
