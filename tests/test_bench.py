"""The benchmark measures what it says: on a real bare Envoy, and with numbers done by hand."""

from collections.abc import Iterator

import pytest

from bench import __main__ as bench
from bench import measure, procs, report, targets


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[targets.Target]:
    directory = tmp_path_factory.mktemp("bench")
    with bench.cheap_upstream() as upstream, targets.bare_envoy(directory, upstream) as target:
        yield target


@pytest.fixture(scope="module")
def client() -> Iterator[measure.Client]:
    with measure.Client() as running:
        yield running


def test_a_closed_loop_through_a_real_envoy(bare: targets.Target, client: measure.Client) -> None:
    [one] = measure.requests_at_once(client, [bare], 4, 1, 0.2).rounds
    assert one.result["count"] == sum(count for _, count in one.result["latency_us"]) > 10
    assert list(one.cpu_us) == ["envoy"]


def test_streams_through_a_real_envoy(bare: targets.Target, client: measure.Client) -> None:
    body = {"stream": True, "max_tokens": 6, "gap_ms": 1}
    order = {"kind": "streams", "count": 3, "spacing": 0.001, "body": body}
    [one] = measure.take_turns(client, [bare], "streams", 1, order).rounds
    assert one.result["chunks"] == 3 * (6 + 2)  # the tokens, the finish and [DONE]
    assert len(one.result["first_ms"]) == 3
    assert all(0 < first < 1000 for first in one.result["first_ms"])


def test_memory_of_a_real_process(bare: targets.Target) -> None:
    [found] = procs.memory(bare.pids())
    assert (found.label, found.python) == ("envoy", False)
    assert 0 < found.pss_mb <= found.rss_mb


def test_targets_take_turns(bare: targets.Target, client: measure.Client) -> None:
    other = targets.Target("other", bare.port, bare.root)
    done = measure.requests_at_once(client, [bare, other], 1, 3, 0.01)
    assert [one.target for one in done.rounds] == [
        "bare",
        "other",
        "other",
        "bare",
        "bare",
        "other",
    ]


def a_round(
    target: str, cpu_us: float, *, count: int = 10, latency_us: int = 1000
) -> measure.Round:
    result = {"count": count, "seconds": 2.0, "latency_us": [[latency_us, count]]}
    return measure.Round(target, {"envoy": cpu_us}, result)


def test_ratios_are_of_pairs_that_took_turns() -> None:
    """A machine that slows down to a half in the second round does not change the ratio."""
    done = measure.Rounds(
        "w",
        [
            a_round("bare", 100),
            a_round("parallama", 900),
            a_round("parallama", 1800),
            a_round("bare", 200),
        ],
    )
    cpu, envoy, rate, *_ = report.request_rows(done, judged=True)
    assert (cpu.bare, cpu.ours, cpu.ratio, cpu.met) == (15, 135, 9, True)
    assert (envoy.name, envoy.ours, rate.bare) == ("  envoy", 135, 5)


@pytest.mark.parametrize(("cpu", "verdict"), [(2500, "met"), (2501, "MISSED")])
def test_the_table_says_whether_a_bar_is_met(cpu: float, verdict: str) -> None:
    done = measure.Rounds("w", [a_round("bare", 100), a_round("parallama", cpu)])
    line = report.table(report.request_rows(done, judged=True)).splitlines()[1]
    assert line.endswith(f"<= 25 x  {verdict}")


def test_percentiles() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [report.percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert report.percentile([7.0], 0.5) == 7
