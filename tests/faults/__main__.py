"""
Faults under load: `make faults`, or `python -m tests.faults "kill envoy" --calls 500`.

Each fault gets a gateway of its own. What the stand-in upstream says that it emitted is compared
with the usage rows and with the counters.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults.story import FAULTS, HEADER, tell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    if unknown := set(chosen.faults) - set(FAULTS):
        parser.error(f"no such fault: {', '.join(unknown)}")
    print(HEADER)
    bad = False
    for name in chosen.faults or FAULTS:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            outcome = tell(
                Path(folder) / "g", name, FAULTS[name], calls=chosen.calls, seed=chosen.seed
            )
        print(outcome, flush=True)
        for what in ("lost", "doubled", "inexact"):
            for line in getattr(outcome, what)[:5]:
                print(f"  {what}: {line}")
        bad = bad or not outcome.good
    sys.exit(bad)


if __name__ == "__main__":
    main()
