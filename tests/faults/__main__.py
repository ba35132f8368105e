"""
Faults under load: `make faults`, or `python -m tests.faults "kill envoy" --calls 500`.

Each fault gets a gateway of its own. What the stand-in upstream says that it emitted is compared
with the usage rows and with the counters.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.breaking import FAULTS, CannotHappenHere
from tests.faults.databases import DATABASES, Books, databases
from tests.faults.outcome import HEADER
from tests.faults.storm import storm
from tests.faults.story import tell

TALES = (*FAULTS, "storm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(TALES))
    parser.add_argument("--database", choices=DATABASES, help="only with this one")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hard", action="store_true", help="with rate_limiting.enforcement: hard")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave their folders there")
    chosen = parser.parse_args()
    if unknown := set(chosen.faults) - set(TALES):
        parser.error(f"no such fault: {', '.join(unknown)}")
    kinds = [chosen.database] if chosen.database else DATABASES
    print(HEADER, flush=True)
    good = True
    with databases(*kinds) as books, _folder(chosen.keep) as folder:
        for name in chosen.faults or TALES:
            for kind in kinds:
                if name not in FAULTS or kind in FAULTS[name].databases:
                    how = {"calls": chosen.calls, "seed": chosen.seed, "hard": chosen.hard}
                    good &= _told(folder / f"{name}, {kind}", name, books[kind](), how)
    sys.exit(not good)


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        yield Path(folder)


def _told(at: Path, name: str, books: Books, how: dict[str, Any]) -> bool:
    """Whether all was as it should be."""
    try:
        if name in FAULTS:
            outcome = tell(at, name, FAULTS[name], books, **how)
        else:
            outcome = storm(at, books, **how)
    except CannotHappenHere as why:
        print(f"{name:16} {books.name:8} not tried: {why}", flush=True)
        return True
    except AssertionError as why:
        print(f"{name:16} {books.name:8} {why}", flush=True)
        return False
    print(outcome, *outcome.notes, *outcome.bad[:10], sep="\n  ", flush=True)
    return not outcome.bad


if __name__ == "__main__":
    main()
