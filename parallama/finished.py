"""What the facts of a finished request mean as a usage row, wherever they were read (pure)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from parallama import contract as c
from parallama.usage import TokenSource, UsageRecord

Facts = Mapping[str, Any]
"""One namespace of Envoy's dynamic metadata: text, floats or ints, booleans."""

MOST = 10**9
"""More tokens than this no request has, nor milliseconds: who says so is wrong."""

_MICROSECONDS = 10**6
_UPSTREAM_ANSWERED = "via_upstream"
_CLIENT_LEFT = frozenset({"DC", "DR"})
_CLIENT_CLOSED_REQUEST = 499  # as Ollama and nginx say it; Envoy logs 0 where nothing was sent
_SOURCES: dict[object, TokenSource] = {"reported": "reported", "estimated": "estimated"}


@dataclass(frozen=True, slots=True)
class Finished:
    """
    A usage record, and what the caller's tightest limits had left after it.

    `odd` names numbers that cannot be, as the upstream reported them: the row has the nearest that
    can be, or does without.
    """

    record: UsageRecord
    tokens_left: int | None
    requests_left: int | None
    odd: tuple[str, ...]


def finished(
    *,
    request_id: str,
    start: int,
    duration: float,
    first_byte: float | None,
    status: int,
    flags: str,
    details: str,
    upstream: str | None,
    who: Facts,
    lua: Facts,
    limits: Facts,
    attempts: int = 0,
) -> Finished | None:
    """
    None for a request of nobody we know. `start` is microseconds since the epoch, the rest seconds.

    Raises OverflowError, ValueError or OSError for a time that no calendar has.
    """
    user = _text(who, c.USER)
    if user is None:
        return None
    aborted = details.startswith("downstream_remote")
    if flags and not aborted:
        aborted = not _CLIENT_LEFT.isdisjoint(flags.split(","))
    if status == 0 and aborted:
        status = _CLIENT_CLOSED_REQUEST
    told = lua.get(c.USAGE_SOURCE)
    odd = [c.USAGE_ODD] if lua.get(c.USAGE_ODD) is True else []
    total = _count(lua, c.TOTAL_TOKENS, odd) or 0
    prompt = _count(lua, c.PROMPT_TOKENS, odd)
    completion = _count(lua, c.COMPLETION_TOKENS, odd)
    cached = _count(lua, c.CACHED_TOKENS, odd)
    reasoning = _count(lua, c.REASONING_TOKENS, odd)
    compute_ms = _number(lua, c.COMPUTE_MS, odd)
    if completion is None and told == "counted":
        # While a stream runs only its total is written: all that one that was cut has.
        completion = max(0, total - (prompt or 0))
    at = datetime.fromtimestamp(start // _MICROSECONDS, UTC)
    record = UsageRecord(
        request_id=request_id,
        timestamp=at.replace(microsecond=start % _MICROSECONDS),
        user_id=user,
        username=_text(who, c.USERNAME) or "",
        key_id=_text(who, c.KEY),
        gateway=_text(who, c.GATEWAY) or "",
        dialect=_text(who, c.DIALECT) or "",
        endpoint=_text(who, c.ENDPOINT) or "",
        model_name=_text(lua, c.MODEL),
        served_model=_text(lua, c.RESPONSE_MODEL),
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=cached,
        tokens_used=total,
        # Where nothing was told nothing was generated, and that was counted.
        token_source=_SOURCES.get(told, "counted") if isinstance(told, str) else "counted",
        streamed=lua.get(c.STREAM) is True,
        finished=lua.get(c.FINISHED) is True,
        aborted=aborted,
        status_code=status,
        flags=flags,
        error_message=_error(details, lua, odd=bool(odd)),
        request_duration=duration,
        time_to_first_token=_first_token(start, lua, first_byte if status == 200 else None),
        compute_ms=compute_ms,
        upstream_host=upstream,
        cost=None,
        grants=_text(limits, c.GRANTS),
        decision=_decision(who, limits),
        requested_model=_text(lua, c.REQUESTED_MODEL),
        attempts=attempts or None,
        reasoning_tokens=reasoning,
    )
    left = _plain(limits, c.TOKENS_LEFT)
    if left is not None:
        left += (_plain(limits, c.GRANTED) or 0) - total
    return Finished(record, left, _plain(limits, c.REQUESTS_LEFT), tuple(odd))


def _decision(who: Facts, limits: Facts) -> str | None:
    """
    As JSON, in few bytes: `rule` where ours refused it, `known_at` (see `parallama.contract`), and
    what ratelimit says of limits (see `ratelimit.rules.decision`).
    """
    parts = []
    if (rule := _text(who, c.RULE)) is not None:
        parts.append(f'"rule":"{rule}"')
    known_at = who.get(c.KNOWN_AT)
    if isinstance(known_at, int | float) and math.isfinite(known_at):
        parts.append(f'"known_at":{known_at:.3f}')
    if (limit := _text(limits, c.DECISION)) is not None:
        parts.append(limit)
    return f"{{{','.join(parts)}}}" if parts else None


def _text(facts: Facts, name: str) -> str | None:
    value = facts.get(name)
    return value if isinstance(value, str) and value else None


def _number(facts: Facts, name: str, odd: list[str]) -> float | None:
    """From 0 to MOST. What is beyond is brought there, and noted in `odd`."""
    value = facts.get(name)
    if type(value) is not float and type(value) is not int:
        return None
    if 0 <= value <= MOST:
        return float(value)
    odd.append(name)
    return None if math.isnan(value) else float(min(max(value, 0), MOST))


def _count(facts: Facts, name: str, odd: list[str]) -> int | None:
    value = _number(facts, name, odd)
    return None if value is None else int(value)


def _plain(facts: Facts, name: str) -> int | None:
    """A number of our own, which may be negative."""
    value = facts.get(name)
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _first_token(start: int, lua: Facts, first_byte: float | None) -> float | None:
    at = lua.get(c.FIRST_TOKEN_AT)
    if isinstance(at, int | float) and math.isfinite(at):
        return max(0.0, at / 1000 - start / _MICROSECONDS)
    return first_byte


def _error(details: str, lua: Facts, *, odd: bool) -> str | None:
    if lua.get(c.UPSTREAM_ERROR) is True:
        return "the upstream reported an error inside its answer"
    if details not in ("", _UPSTREAM_ANSWERED):
        return details
    if lua.get(c.NO_END) is True:
        return "the upstream ended its stream without an end mark"
    return "the upstream reported a usage that cannot be" if odd else None
