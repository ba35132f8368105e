"""The running service against its own description: short here, long by `make fuzz-admin`."""

from pathlib import Path

from tests.admin.fuzz import fuzz
from tests.e2e.gateway import running
from tests.standin import StandIn


def test_it_does_what_it_says_whatever_it_is_sent(tmp_path: Path) -> None:
    with (
        StandIn(models=("smollm2",)) as upstream,
        running(tmp_path / "gw", upstream) as gateway,
    ):
        done = fuzz(gateway, examples=1, phases="fuzzing", seed=1, tags=("users", "auth"))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
