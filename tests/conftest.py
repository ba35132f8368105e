"""Databases for the tests of all parts, and how many examples they try."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parallama.config import Database
from tests import examples as examples  # it sets what Hypothesis does
from tests.containers import stores
from tests.parallama.db_on_disk import settings
from tests.postgres import Postgres

_PLACES = stores.places("postgres")


@pytest.fixture(scope="session")
def postgres_at() -> Iterator[Callable[[str], Postgres]]:
    """One server for all tests that ask for it, in each of its places."""
    made: dict[str, Postgres] = {}

    def at(place: str) -> Postgres:
        if place not in made:
            made[place] = stores.postgres(place)
        return made[place]

    yield at
    for server in made.values():
        server.remove()


@pytest.fixture(scope="session", params=_PLACES)
def postgres(request: pytest.FixtureRequest, postgres_at: Callable[[str], Postgres]) -> Postgres:
    return postgres_at(request.param)


@pytest.fixture(params=["sqlite", *_PLACES])
def db(
    request: pytest.FixtureRequest, tmp_path: Path, postgres_at: Callable[[str], Postgres]
) -> Iterator[Database]:
    """An empty database of either kind: what holds for one holds for the other."""
    if request.param == "sqlite":
        yield settings(tmp_path)
    else:
        server = postgres_at(request.param)
        yield server.shared()
        server.clean()
