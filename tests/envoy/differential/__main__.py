"""
A long trial of facts.lua: `python -m tests.envoy.differential`, or `make fuzz-bodies`.

Real Go reads along where it is installed, nlohmann/json where a C++ compiler and its header are.
"""

import argparse
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.envoy.differential.readers import Real, real_go, real_nlohmann
from tests.envoy.differential.texts import Texts
from tests.envoy.differential.trial import Told, lua, tried

_SHARE = 20_000
_MOST_SHOWN = 20


def one_share(seed: int, count: int, real: list[Real]) -> Told:
    return tried(islice(Texts(seed), count), lua(), real)


def main() -> None:
    args = argparse.ArgumentParser("python -m tests.envoy.differential", description=__doc__)
    args.add_argument("--texts", type=int, default=100_000)
    args.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    chosen = args.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    began, told, last = time.monotonic(), Told(), 0.0
    with TemporaryDirectory() as folder, ProcessPoolExecutor(os.cpu_count()) as pool:
        real = [each for make in (real_go, real_nlohmann) if (each := make(Path(folder)))]
        names = [name for each in real for name in each.views]
        print(f"real parsers: {', '.join(names) or 'none, only their models'}", flush=True)
        counts = [min(_SHARE, chosen.texts - at) for at in range(0, chosen.texts, _SHARE)]
        shares = [
            pool.submit(one_share, chosen.seed + at, count, real) for at, count in enumerate(counts)
        ]
        for share in as_completed(shares):
            told += share.result()
            if (now := time.monotonic()) - last > 10 and told.texts < chosen.texts:
                last = now
                print(f"{told.texts} texts, {len(told.wrong)} divergences", flush=True)
    for line in told.wrong[:_MOST_SHOWN]:
        print(line[:2000])
    print(
        f"{told.texts} texts in {time.monotonic() - began:.0f} s: {told.refused} refused, the "
        f"others passed on, {told.edited} of them edited; {told.read} were read by a server: "
        f"{len(told.wrong)} divergences"
    )
    sys.exit(1 if told.wrong or not told.read else 0)


if __name__ == "__main__":
    main()
