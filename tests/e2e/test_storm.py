"""The short form of `python -m tests.faults storm`."""

from pathlib import Path

from tests.faults.databases import Sqlite
from tests.faults.storm import storm


def test_streams_that_are_abandoned_are_charged_what_was_delivered(tmp_path: Path) -> None:
    outcome = storm(tmp_path / "g", Sqlite(), calls=150, at_once=50)
    assert not outcome.bad
    assert outcome.rows == 150
