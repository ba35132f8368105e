"""
What Parallama adds to Envoy, what a usage row and a decision cost: `python -m bench`, `make bench`.

The same work goes through bare Envoy and through Parallama in one run. The two take turns in short
rounds, because the speed of a machine drifts; ratios are medians over such pairs. Load client and
upstream are processes of their own and are not counted. Nothing is asserted: the table shows the
bars, and bench/results/NAME.json holds everything.

CPU per request is measured at saturation, in a closed loop. Streams carry a token a chunk; their
first token is measured at the client, over connections that are open already. The upstream is as
cheap as can be: one that takes its time would hide what the gateway adds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import decisions, measure, procs, report, sink, targets


@contextmanager
def cheap_upstream() -> Iterator[int]:
    """A process of its own; its port."""
    command = [sys.executable, "-m", "bench.upstream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=measure.ROOT) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def _start(stack: ExitStack, chosen: argparse.Namespace, upstream: int) -> list[targets.Target]:
    """Both gateways, or the one that was asked for, with as many worker threads each."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    started = []
    concurrency = "1"
    if chosen.only != report.BARE:
        gateway = targets.parallama(directory, upstream, chosen.parallama)
        started.append(stack.enter_context(gateway))
        envoys = [pid for pid, label in started[0].pids().items() if label == "envoy"]
        given = procs.argument(envoys[0], "--concurrency") if envoys else None
        concurrency = given or str(os.cpu_count())
    if chosen.only != report.OURS:
        bare = targets.bare_envoy(directory, upstream, concurrency)
        started.insert(0, stack.enter_context(bare))
    return started


class Bench:
    """Collects rounds and rows."""

    def __init__(self, chosen: argparse.Namespace, client: measure.Client) -> None:
        self.rows: list[report.Row] = []
        self.work: dict[str, list[dict[str, Any]]] = {}
        self.memory: dict[str, list[procs.Memory]] = {}
        self._client = client
        self._rounds = 2 if chosen.quick else 5
        self._seconds = 1.0 if chosen.quick else 2.0

    def requests(self, running: list[targets.Target]) -> None:
        measure.requests_at_once(self._client, running, 16, 1, 1.0)  # warms caches and pools
        for connections in (16, 1):
            work = (connections, self._rounds, self._seconds)
            done = measure.requests_at_once(self._client, running, *work)
            self._keep(done, report.request_rows(done, judged=connections == 16))
        self.memory = {target.name: procs.memory(target.pids()) for target in running}

    def first_tokens(self, running: list[targets.Target]) -> None:
        """One stream after the other, then many that overlap: staggered, and all at one instant."""
        self._streams(running, "warm-up", 50, 0.0, tokens=1, gap_ms=0, rounds=1)
        one = self._streams(running, "1 stream at a time", 10, 0.25, tokens=10, rounds=self._rounds)
        self._keep(one, report.stream_rows(one, most_added=2.0))
        for count in (16, 50):
            for how, spacing in (("20 ms apart", 0.02), ("at one instant", 0.0)):
                name = f"{count} streams {how}"
                done = self._streams(running, name, count, spacing, rounds=self._rounds)
                bar = 2.0 if spacing else 15.0 if count == 50 else None
                self._keep(done, report.stream_rows(done, most_added=bar))

    def chunks(self, running: list[targets.Target]) -> None:
        name = "16 streams, a token each 5 ms"
        rounds = max(2, self._rounds // 2)
        done = self._streams(running, name, 16, 0.0, tokens=1000, gap_ms=5, rounds=rounds)
        self._keep(done, report.chunk_rows(done))

    def _streams(
        self,
        running: list[targets.Target],
        name: str,
        count: int,
        spacing: float,
        *,
        tokens: int = 50,
        gap_ms: int = 20,
        rounds: int,
    ) -> measure.Rounds:
        body = {"stream": True, "max_tokens": tokens, "gap_ms": gap_ms}
        order = {"kind": "streams", "count": count, "spacing": spacing, "body": body}
        return measure.take_turns(self._client, running, name, rounds, order)

    def _keep(self, done: measure.Rounds, rows: list[report.Row]) -> None:
        self.rows += rows
        self.work[done.work] = report.summary(done)


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        bench = Bench(chosen, stack.enter_context(measure.Client()))
        running = _start(stack, chosen, stack.enter_context(cheap_upstream()))
        bench.requests(running)
        bench.first_tokens(running)
        bench.chunks(running)
    bench.rows += report.memory_rows(bench.memory)
    print(report.table(bench.rows))
    return {
        "stores": list(_stores(quick=chosen.quick)) if chosen.only is None else [],
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release()},
        "python": platform.python_version(),
        "quick": chosen.quick,
        "rows": [asdict(row) for row in bench.rows],
        "memory": {name: [asdict(one) for one in found] for name, found in bench.memory.items()},
        "rounds": bench.work,
    }


def _stores(*, quick: bool) -> Iterator[str]:
    """Lines of the two benchmarks that need no Envoy, in a short form; see bench.sink and so on."""
    rows, calls = (20_000, 4_000) if quick else (100_000, 20_000)
    for title, lines in (
        ("usage rows", lambda: sink.run(rows, 500, None)),
        ("decisions of ratelimit", lambda: _decisions(calls)),
    ):
        print(f"\n{title}")
        for line in lines():
            print(line, flush=True)
            yield line


def _decisions(calls: int) -> Iterator[str]:
    yield decisions.HEADER
    for users in (10, 10_000, 1_000_000):
        yield from decisions.run(users, calls)


def main() -> None:
    text = argparse.RawDescriptionHelpFormatter
    args = argparse.ArgumentParser("python -m bench", description=__doc__, formatter_class=text)
    args.add_argument("--name", help="of the file under bench/results/; default: the time")
    args.add_argument("--only", choices=[report.BARE, report.OURS], help="measure one side")
    args.add_argument("--quick", action="store_true", help="few and short rounds: a rough look")
    beside = Path(sys.executable).parent / "parallama"
    args.add_argument("--parallama", type=Path, default=beside, help="the program to measure")
    chosen = args.parse_args()
    found = run(chosen)
    name = chosen.name or time.strftime("%Y%m%d-%H%M%S")
    path = measure.ROOT / "bench" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
