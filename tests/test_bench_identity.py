"""The benchmark of authz still runs; what it measures is for people to read."""

import asyncio
from contextlib import ExitStack

import pytest

from bench import identity


def test_one_question_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(identity._one_question("ES256", 3, 1))
    assert "new token" in capsys.readouterr().out


def test_a_process_is_measured() -> None:
    with ExitStack() as stack:
        size = identity._sized(stack, None, 30, 5)
    assert (size.kind, size.keys) == ("SQLite", 30)
    assert min(size.start_ms, size.idle_mb, *size.cold_ms, *size.warm_ms) > 0
