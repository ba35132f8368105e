"""From rounds to numbers with bars beside them."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure import Round, Rounds
from bench.procs import Memory

BARE, OURS = "bare", "parallama"


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; `ratio` and `added` compare Parallama with bare Envoy."""

    name: str
    unit: str
    bare: float | None
    ours: float | None
    ratio: float | None = None
    added: float | None = None
    bar: str = ""
    met: bool | None = None


def _latencies(one: Round) -> list[float]:
    return [us / 1e3 for us, count in one.result["latency_us"] for _ in range(count)]


def _latency(share: float) -> Callable[[Round], float]:
    return lambda one: percentile(_latencies(one), share)


def _rate(one: Round) -> float:
    return float(one.result["count"] / one.result["seconds"])


def _row(
    rounds: Rounds,
    name: str,
    unit: str,
    value: Callable[[Round], float],
    *,
    most_times: float | None = None,
    most_added: float | None = None,
) -> Row:
    """The medians over the rounds; ratio and difference are medians over pairs that took turns."""
    bare, ours = [[value(one) for one in rounds.of(target)] for target in (BARE, OURS)]
    pairs = list(zip(bare, ours, strict=False))
    ratio = statistics.median(o / b for b, o in pairs) if pairs and all(bare) else None
    added = statistics.median(o - b for b, o in pairs) if pairs else None
    bar, met = "", None
    if most_times is not None:
        bar, met = f"<= {most_times:g} x", None if ratio is None else ratio <= most_times
    if most_added is not None:
        bar, met = f"<= +{most_added:g} {unit}", None if added is None else added <= most_added
    middle = [statistics.median(values) if values else None for values in (bare, ours)]
    return Row(name, unit, middle[0], middle[1], ratio, added, bar, met)


def _cpu_rows(rounds: Rounds, name: str, count: str, most_times: float | None) -> list[Row]:
    """CPU for each request or chunk: the sum, then each process."""

    def each(one: Round) -> float:
        return float(sum(one.cpu_us.values()) / one.result[count])

    rows = [_row(rounds, name, "us", each, most_times=most_times)]
    for label in sorted({label for one in rounds.rounds for label in one.cpu_us}):
        shares = {
            target: [one.cpu_us.get(label, 0.0) / one.result[count] for one in rounds.of(target)]
            for target in (BARE, OURS)
        }
        middle = [statistics.median(v) if v and any(v) else None for v in shares.values()]
        ratio = middle[1] / middle[0] if middle[0] and middle[1] else None
        rows.append(Row(f"  {label}", "us", middle[0], middle[1], ratio))
    return rows


def request_rows(rounds: Rounds, *, judged: bool) -> list[Row]:
    rows = _cpu_rows(rounds, f"CPU per request; {rounds.work}", "count", 25.0 if judged else None)
    rows.append(_row(rounds, "  answers", "1/s", _rate))
    for share in (0.5, 0.99):
        name = f"  latency p{share * 100:g}"
        rows.append(_row(rounds, name, "ms", _latency(share)))
    return rows


def stream_rows(rounds: Rounds, *, most_added: float | None = None) -> list[Row]:
    """Time to first token and gap between chunks."""

    def middle(field: str, share: float) -> Callable[[Round], float]:
        return lambda one: percentile(one.result[field], share)

    work = rounds.work
    first = f"first token p50; {work}"
    return [
        _row(rounds, first, "ms", middle("first_ms", 0.5), most_added=most_added),
        _row(rounds, "  first token p99", "ms", middle("first_ms", 0.99)),
        _row(rounds, "  gap p50", "ms", middle("gap_ms", 0.5)),
        _row(rounds, "  gap p99", "ms", middle("gap_ms", 0.99)),
    ]


def chunk_rows(rounds: Rounds) -> list[Row]:
    return _cpu_rows(rounds, f"CPU per chunk; {rounds.work}", "chunks", 2.0)


def memory_rows(found: Mapping[str, Sequence[Memory]]) -> list[Row]:
    """Resident memory; the sum counts shared pages once for each process, PSS once in all."""
    ours = found.get(OURS, [])
    python = [one for one in ours if one.python]
    rows = []
    if python:
        rss = sum(one.rss_mb for one in python)
        pss = sum(one.pss_mb for one in python)
        rows.append(Row("memory, all Python, RSS", "MB", None, rss, bar="< 250 MB", met=rss < 250))
        rows.append(Row("memory, all Python, PSS", "MB", None, pss, bar="< 250 MB", met=pss < 250))
    for one in found.get(BARE, []):
        rows.append(Row(f"  {one.label}, RSS", "MB", one.rss_mb, None))
        rows.append(Row(f"  {one.label}, PSS", "MB", one.pss_mb, None))
    for one in ours:
        rows.append(Row(f"  {one.label}, RSS", "MB", None, one.rss_mb))
        rows.append(Row(f"  {one.label}, PSS", "MB", None, one.pss_mb))
    return rows


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """For people: the bars and whether they are met in the last two columns."""
    head = ("", "unit", "bare Envoy", "Parallama", "ratio", "added", "bar", "")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        met = {True: "met", False: "MISSED", None: ""}[row.met]
        numbers = [_number(value) for value in (row.bare, row.ours, row.ratio, row.added)]
        lines.append((row.name, row.unit, *numbers, row.bar, met))
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    left = {0, 1, 6, 7}

    def cell(text: str, column: int) -> str:
        width = widths[column]
        return text.ljust(width) if column in left else text.rjust(width)

    return "\n".join(
        "  ".join(cell(text, column) for column, text in enumerate(line)).rstrip() for line in lines
    )


def summary(rounds: Rounds) -> list[dict[str, Any]]:
    """The rounds for the JSON file, with percentiles instead of every latency."""
    found = []
    for one in rounds.rounds:
        result = {k: v for k, v in one.result.items() if not isinstance(v, list)}
        lists: dict[str, list[float]] = {}
        if "latency_us" in one.result:
            lists["latency_ms"] = _latencies(one)
        lists |= {k: one.result[k] for k in ("first_ms", "gap_ms") if k in one.result}
        for name, values in lists.items():
            shares = (0.5, 0.9, 0.99)
            result[name] = {f"p{s * 100:g}": percentile(values, s) for s in shares if values}
        found.append({"target": one.target, "cpu_us": one.cpu_us, **result})
    return found
