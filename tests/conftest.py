"""What the tests of several parts share: databases, one gateway, how many examples they try."""

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parallama.config import Database
from tests import examples as examples  # it sets what Hypothesis does
from tests.containers import stores
from tests.parallama.db_on_disk import settings
from tests.postgres import Postgres

if TYPE_CHECKING:
    from tests.e2e.gateway import Gateway
    from tests.standin import StandIn

_PLACES = stores.places("postgres")

# What takes longest goes first, or all others wait for it in the end.
_LONGEST = (
    "tests/supervisor/test_rolling.py",
    "tests/e2e/test_trail.py",
    "tests/usage_sink/test_process.py",
    ("tests/faults/", "tests/clients/", "tests/e2e/", "tests/supervisor/"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)


def pytest_collection_finish() -> None:
    """What is there by now stays, so that nobody looks through it for rubbish: it is a lot."""
    gc.freeze()


def _turn(test: pytest.Item) -> int:
    places = enumerate(_LONGEST)
    return next((n for n, at in places if test.nodeid.startswith(at)), len(_LONGEST))


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


@pytest.fixture(scope="session")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Gateway"]:
    """
    One for all stories that need nothing special, of clients as well. Its Envoy keeps finished
    requests to itself for a shorter time, since many tests wait for the row.
    """
    from parallama.supervisor.envoy_files import packaged
    from tests.e2e.gateway import running
    from tests.standin import StandIn

    folder = tmp_path_factory.mktemp("gw")
    shutil.copytree(packaged(), folder / "quick")
    envoy = folder / "quick" / "envoy.yaml"
    text, waits = envoy.read_text("utf-8"), "buffer_flush_interval: 0.1s"
    assert waits in text
    envoy.write_text(text.replace(waits, "buffer_flush_interval: 0.01s"), "utf-8")
    settings = "envoy: {dir: quick}\n"
    with (
        StandIn(models=("smollm2", "secret")) as upstream,
        running(folder, upstream, settings=settings) as gateway,
    ):
        yield gateway


@pytest.fixture
def gateway(shared_gateway: "Gateway") -> "Gateway":
    """Its upstream has forgotten what was before."""
    shared_gateway.upstream.reset()
    return shared_gateway


@pytest.fixture
def upstream(gateway: "Gateway") -> "StandIn":
    return gateway.upstream
