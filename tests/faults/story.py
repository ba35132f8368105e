"""One fault under load, and what became of every call."""

import asyncio
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

from parallama.trail import Trail
from tests.e2e.gateway import Gateway, until
from tests.faults.breaking import Fault, Stage
from tests.faults.company import Company
from tests.faults.databases import Books
from tests.faults.judging import (
    counters_of,
    look_at_counters,
    look_at_rows,
    open_calls,
    refusals,
)
from tests.faults.load import Load
from tests.faults.outcome import Outcome
from tests.standin import StandIn
from tests.supervisor.supervised import exit_code, made, terminate, up

LEASE = 3
_SETTINGS = """
usage: {{flush_seconds: 0.01}}
rate_limiting: {{reservation_seconds: {lease}, enforcement: {enforcement}}}
logging: {{format: json, requests: false}}
"""


def tell(
    folder: Path,
    name: str,
    fault: Fault,
    books: Books,
    *,
    calls: int,
    at_once: int = 20,
    seed: int = 1,
    hard: bool = False,
) -> Outcome:
    """
    Run `calls` with the fault in their midst, wait until all is quiet, and count. Raises
    CannotHappenHere.
    """
    began = time.monotonic()
    outcome = Outcome(name, books.name)
    with StandIn() as upstream, fault.prepared(folder):
        books.settle_in(prepared(folder, upstream, hard=hard))
        with up(folder, upstream) as gateway:
            company = Company(gateway, calls)
            load = Load(company.weights, calls=calls, at_once=at_once, seed=seed)
            chance = random.Random(seed)  # noqa: S311
            _under_load(load, Stage(gateway, books), fault, calls, company, chance)
            refused = set() if fault.kills_envoy else refusals(load.told)
            settle_down(
                outcome, gateway, lambda: refused <= {row.request_id for row in books.rows()}
            )
            look_at_rows(outcome, upstream.requests, books.rows(), load.told, company, fault)
            look_at_counters(outcome, gateway, books.rows())
            stop(outcome, gateway)
    outcome.seconds = time.monotonic() - began
    return outcome


def prepared(folder: Path, upstream: StandIn, *, hard: bool) -> Path:
    """The configuration of a gateway, made without a word."""
    settings = _SETTINGS.format(lease=LEASE, enforcement="hard" if hard else "soft")
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return made(folder, upstream.url, settings)


def stop(outcome: Outcome, gateway: Gateway) -> None:
    began = time.monotonic()
    terminate(gateway)
    assert exit_code(gateway, 60) == 0
    outcome.stopping = time.monotonic() - began


def _under_load(
    load: Load, stage: Stage, fault: Fault, calls: int, company: Company, chance: random.Random
) -> None:
    """Faults happen in this thread: what they start ends with the thread that did it."""
    moments = sorted(chance.uniform(0.05, 0.85) * calls for _ in range(fault.times))
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(asyncio.run, load.run())

        def go_on_to(count: float, *, tried: bool = False) -> None:
            until(
                lambda: (
                    running.done()
                    or (load.done >= count and not (tried and any(company.untried(load.told))))
                ),
                300,
            )

        try:
            for moment in moments:
                go_on_to(moment)
                time.sleep(chance.uniform(0, 0.02))
                fault.happens(stage)
            go_on_to(load.done + calls / 10, tried=True)
        finally:
            load.enough = True
        running.result()


def settle_down(
    outcome: Outcome, gateway: Gateway, told: Callable[[], bool] = lambda: True
) -> None:
    """
    All answers have ended, no call is open any more, and the trail is read. Calls that were refused
    are never open, and Envoy may still hold the last ones back: those are `told`.
    """
    began = time.monotonic()
    until(lambda: all(seen.ended for seen in gateway.upstream.requests), 60)
    trail = Trail(gateway.config.state_dir / "trail")
    # What is left after that is left for good, and is counted.
    with counters_of(gateway) as redis, suppress(AssertionError):
        until(lambda: open_calls(redis) == 0 and trail.waiting() == 0 and told(), 60 + 4 * LEASE)
    outcome.settling = time.monotonic() - began
