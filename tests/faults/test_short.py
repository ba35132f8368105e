"""The short form of `make faults`."""

from pathlib import Path

import pytest

from tests.faults.story import FAULTS, tell

KILLS = ("kill usage_sink", "kill ratelimit", "kill valkey", "kill envoy")


@pytest.mark.parametrize("fault", KILLS)
def test_one_call_is_one_row_whatever_dies(tmp_path: Path, fault: str) -> None:
    outcome = tell(tmp_path / "g", fault, FAULTS[fault], calls=150)
    assert outcome.good, outcome
    assert outcome.rows > 50
