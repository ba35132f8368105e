"""What became of every call: the stand-in's word against the rows and the counters."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from redis import Redis

from parallama.limits import Unit
from tests.e2e.gateway import Gateway
from tests.faults.breaking import Fault
from tests.faults.company import Company
from tests.faults.databases import Row
from tests.faults.load import Told
from tests.faults.outcome import Outcome
from tests.standin import Seen


@contextmanager
def counters_of(gateway: Gateway) -> Iterator[Redis]:
    path = os.path.relpath(gateway.config.run_dir / "valkey.sock")
    password = gateway.config.redis.password
    secret = password.get_secret_value() if password else None
    with Redis(unix_socket_path=path, password=secret, decode_responses=True) as redis:
        yield redis


def open_calls(redis: Redis) -> int:
    return sum(int(redis.zcard(key)) for key in redis.keys("rl:*:open"))


def refusals(told: Iterable[Told]) -> set[str]:
    """Requests that were refused for a limit."""
    return {call.request_id or "" for call in told if call.status == 429}


def look_at_rows(
    outcome: Outcome,
    requests: list[Seen],
    rows: list[Row],
    told: list[Told],
    company: Company,
    fault: Fault,
) -> None:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.request_id, []).append(row)
    calls = {call.number: call for call in told}
    seen = [
        (at, calls[int(number)]) for at in requests if (number := at.header("x-number")) is not None
    ]
    outcome.calls, outcome.rows = len(told), len(rows)
    outcome.slowest = max(call.seconds for call in told)
    outcome.refused = len(told) - len({call.number for _, call in seen})
    outcome.unknown = sum(row.source == "unknown" for row in rows)
    outcome.doubled += [id for id, several in found.items() if len(several) > 1]
    for at, call in seen:
        id = at.header("x-request-id") or ""
        if id not in found:
            outcome.lost.append(f"{id} {call}")
        elif why := _inexact(at, call, found[id][0]):
            outcome.inexact.append(f"{id} {call}: {why}")
    if not fault.kills_envoy:
        missing = refusals(told) - found.keys()
        outcome.lost += [f"refusal {call}" for call in told if call.request_id in missing]
        outcome.inexact += [f"{row}" for row in rows if row.source == "unknown"]
    outcome.overspent += company.overspent(seen, rows)
    outcome.untried += company.untried(told)


def _inexact(seen: Seen, call: Told, row: Row) -> str | None:
    """Where the row does not say what was spent."""
    if call.complete and call.kind not in ("cut", "hang up"):
        spent = seen.prompt_tokens + seen.emitted
        return f"{row.tokens} for {spent}" if row.tokens != spent else None
    if call.status != 200 or row.source == "unknown":
        return None
    # What was delivered, or what was on its way to the client by then.
    if call.kind in ("cut", "hang up") and not call.delivered - 1 <= row.tokens <= seen.emitted + 1:
        return f"{row.tokens} for {call.delivered} to {seen.emitted}"
    return None


def look_at_counters(outcome: Outcome, gateway: Gateway, rows: list[Row]) -> None:
    """Only users with a token limit have tokens counted."""
    spent: Counter[str] = Counter()
    for row in rows:
        spent[row.user_id] += row.tokens
    with counters_of(gateway) as redis:
        outcome.left_open = open_calls(redis)
        for user, tokens in spent.items():
            for key in redis.keys(f"rl:*:b:{user}:*"):
                if redis.type(key) == "zset":
                    outcome.held += int(redis.zcard(key))
                    continue
                bucket = redis.hgetall(key)
                outcome.held += int(bucket.get("reserved", 0))
                if Unit.TOKENS in key:
                    outcome.miscounted += abs(int(bucket.get("used", 0)) - tokens)
