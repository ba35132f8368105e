"""What several tests of commands need."""

import asyncio
from pathlib import Path

import pytest

from tests.parallama.commands import Parallama, invoke
from tests.parallama.db_on_disk import migrate, settings


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parallama:
    monkeypatch.delenv("PARALLAMA_CONFIG", raising=False)
    asyncio.run(migrate(settings(tmp_path)))  # what is there `init` leaves
    # Nothing listens on port 1, whatever else runs on this machine.
    made = invoke("init", "--dir", str(tmp_path), "--listen", "127.0.0.1:1")
    assert made.exit_code == 0, made.output
    return Parallama(tmp_path)
