"""What several tests of commands need."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from parallama.cli import app
from tests.parallama.commands import Parallama


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parallama:
    monkeypatch.delenv("PARALLAMA_CONFIG", raising=False)
    # Nothing listens on port 1, whatever else runs on this machine.
    made = CliRunner().invoke(app, ["init", "--dir", str(tmp_path), "--listen", "127.0.0.1:1"])
    assert made.exit_code == 0, made.output
    return Parallama(tmp_path)
