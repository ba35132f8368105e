"""The tests of one library stand together, so that its process is started once."""

import pytest

from tests.clients.drivers import LIBRARIES

_TURNS = {name: turn for turn, name in enumerate(LIBRARIES)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)


def _turn(test: pytest.Item) -> int:
    spec = getattr(test, "callspec", None)
    mine = "tests/clients/" in test.nodeid and spec is not None
    return _TURNS.get(spec.params.get("name"), -1) if mine else -1
