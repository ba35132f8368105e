"""Everything in containers, once for all tests; skipped with a reason where that cannot be."""

import os
from collections.abc import Iterator

import pytest

from tests.containers import engine
from tests.containers.engine import Stack
from tests.e2e.gateway import free_port


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    engine.skip_unless(engine.compose)
    engine.standins()
    made = Stack(f"parallama-tests-{os.getpid()}", free_port())
    try:
        made.do("up", "-d", "--no-build")
        made.wait_well()
        yield made
    finally:
        made.do("down", "-v", "-t", "5")
