"""The rounds: the same order to each target in turn, with the CPU time it took."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench import procs
from bench.targets import Target

ROOT = Path(__file__).parent.parent
CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me about a fox."}]}
PATH = "/v1/chat/completions"


class Client:
    """The load client, started once and given one order after the other."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "bench.load"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._process:
            pass  # closes its input, which ends it

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("the load client gave up")
        result: dict[str, Any] = json.loads(answer)
        return result


@dataclass(slots=True)
class Round:
    """What one target did with one order."""

    target: str
    cpu_us: dict[str, float]
    """By process, for the whole round."""
    result: dict[str, Any]


@dataclass(slots=True)
class Rounds:
    """All rounds of one kind of work."""

    work: str
    rounds: list[Round] = field(default_factory=list)

    def of(self, target: str) -> list[Round]:
        return [one for one in self.rounds if one.target == target]


def _one(client: Client, target: Target, order: dict[str, Any]) -> Round:
    pids = target.pids()
    before = procs.cpu_seconds(pids)
    result = client.run(order)
    pids_after = target.pids()
    if died := sorted(label for pid, label in pids.items() if pid not in pids_after):
        raise SystemExit(f"{target.name}: {', '.join(died)} died during the round")
    after = procs.cpu_seconds(pids_after)
    spent = {label: (after[label] - before.get(label, 0.0)) * 1e6 for label in after}
    return Round(target.name, spent, result)


def take_turns(
    client: Client, targets: Sequence[Target], work: str, rounds: int, order: dict[str, Any]
) -> Rounds:
    """The target that starts changes with each round, so that a drift hits both alike."""
    done = Rounds(work)
    for number in range(rounds):
        print(f"  {work}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for target in targets if number % 2 == 0 else reversed(targets):
            body = {**CHAT, **order["body"]}
            full = {**order, "port": target.port, "request": target.request(PATH, body)}
            done.rounds.append(_one(client, target, full))
    return done


def requests_at_once(
    client: Client, targets: Sequence[Target], connections: int, rounds: int, seconds: float
) -> Rounds:
    order = {"kind": "closed_loop", "connections": connections, "seconds": seconds, "body": {}}
    return take_turns(client, targets, f"requests, {connections} at once", rounds, order)
