"""Limits: what they cover, how defaults and own ones merge, calendar windows."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama.limits import Limit, Unit, Window, merge, name_matches


def a_limit(
    gateway: str = "*", model: str = "*", window: Window = Window.DAY, amount: int = 10
) -> Limit:
    return Limit(gateway, model, Unit.REQUESTS, window, amount)


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("window", "start", "end"),
    [
        (Window.MINUTE, "2024-02-29T23:59:00", "2024-03-01T00:00:00"),
        (Window.HOUR, "2024-02-29T23:00:00", "2024-03-01T00:00:00"),
        (Window.DAY, "2024-02-29T00:00:00", "2024-03-01T00:00:00"),
    ],
)
def test_windows_follow_the_utc_calendar(window: Window, start: str, end: str) -> None:
    assert window.bounds(at("2024-02-29T23:59:59.999")) == (at(start), at(end))


@given(st.sampled_from(Window), st.integers(0, 4_000_000_000))
def test_every_moment_is_in_its_window_and_windows_meet(window: Window, now: int) -> None:
    start, end = window.bounds(now)
    assert start <= now < end
    assert window.bounds(end)[0] == end
    assert window.bounds(start) == (start, end)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("llama3", "llama3", True),
        ("llama3", "llama3:8b", False),
        ("llama3", "Llama3", False),
        ("llama*", "llama3:8b", True),
        ("llama*", "llama", True),
        ("llama*", "codellama", False),
        ("*", "", True),
        ("a*b", "axb", False),
        ("a.c", "abc", False),
        ("[a]", "a", False),
    ],
)
def test_names_match_as_a_whole_or_by_prefix(pattern: str, name: str, matches: bool) -> None:
    assert name_matches(pattern, name) is matches


@pytest.mark.parametrize(
    ("limit", "covers"),
    [
        pytest.param(a_limit(), True, id="everything"),
        pytest.param(a_limit(gateway="ollama"), True, id="its gateway"),
        pytest.param(a_limit(gateway="openai"), False, id="another gateway"),
        pytest.param(a_limit(model="llama*"), True, id="its model"),
        pytest.param(a_limit(gateway="ollama", model="gemma"), False, id="another model"),
    ],
)
def test_a_limit_covers_its_gateway_and_model(limit: Limit, covers: bool) -> None:
    assert limit.covers("ollama", "llama3") is covers


def test_an_own_limit_replaces_the_default_of_the_same_cell_only() -> None:
    day, hour = a_limit(amount=100), a_limit(window=Window.HOUR, amount=10)
    own = a_limit(amount=500)
    assert set(merge([day, hour], [own])) == {own, hour}


def test_an_own_limit_may_be_tighter_or_nothing_at_all() -> None:
    assert merge([a_limit(amount=100)], [a_limit(amount=0)]) == (a_limit(amount=0),)


def test_a_limit_on_another_gateway_or_model_stands_beside_the_default() -> None:
    default, gateway, model = a_limit(), a_limit(gateway="openai"), a_limit(model="llama*")
    assert set(merge([default], [gateway, model])) == {default, gateway, model}
