"""Limits: what they cover, how defaults and own ones merge, calendar windows."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from parallama.limits import FOREVER, Grant, Limit, Unit, Window, merge, name_matches

CALENDAR = (Window.MINUTE, Window.HOUR, Window.DAY, Window.MONTH)
# Clocks that change at night, at midnight in both directions, by two hours, by half of one (Lord
# Howe), in another half of the year, for a month of fasting; and offsets that are no whole hours.
ZONES = (
    "UTC", "Europe/Berlin", "America/New_York", "America/Havana", "America/Santiago",
    "America/St_Johns", "Africa/Cairo", "Africa/Casablanca", "Asia/Beirut", "Asia/Kolkata",
    "Asia/Kathmandu", "Australia/Lord_Howe", "Pacific/Chatham", "Antarctica/Troll",
)  # fmt: skip
FIRST, LAST = 1_704_067_200, 2_366_841_600  # 2024 to 2045


def a_limit(
    gateway: str = "*",
    model: str = "*",
    window: Window = Window.DAY,
    amount: int = 10,
    key: str = "",
    *,
    shadow: bool = False,
) -> Limit:
    return Limit(gateway, model, Unit.REQUESTS, window, amount, key, shadow)


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


# Windows


@pytest.mark.parametrize(
    ("window", "start", "end"),
    [
        (Window.MINUTE, "2024-02-29T23:59:00", "2024-03-01T00:00:00"),
        (Window.HOUR, "2024-02-29T23:00:00", "2024-03-01T00:00:00"),
        (Window.DAY, "2024-02-29T00:00:00", "2024-03-01T00:00:00"),
        (Window.MONTH, "2024-02-01T00:00:00", "2024-03-01T00:00:00"),
    ],
)
def test_windows_follow_the_utc_calendar(window: Window, start: str, end: str) -> None:
    assert window.bounds(at("2024-02-29T23:59:59.999")) == (at(start), at(end))


@pytest.mark.parametrize(
    ("zone", "now", "window", "hours"),
    [
        ("Europe/Berlin", "2026-03-29T12:00", Window.DAY, 23),
        ("Europe/Berlin", "2026-10-25T12:00", Window.DAY, 25),
        ("Europe/Berlin", "2026-03-15T12:00", Window.MONTH, 31 * 24 - 1),
        ("Europe/Berlin", "2026-10-15T12:00", Window.MONTH, 31 * 24 + 1),
        ("Europe/Berlin", "2026-12-31T23:59", Window.MONTH, 31 * 24),
        ("America/New_York", "2026-03-08T00:00", Window.DAY, 23),
        ("Australia/Lord_Howe", "2026-04-05T12:00", Window.DAY, 24.5),
        ("Australia/Lord_Howe", "2026-10-04T12:00", Window.DAY, 23.5),
        ("Antarctica/Troll", "2026-03-29T12:00", Window.DAY, 22),
        pytest.param("America/Havana", "2026-03-08T12:00", Window.DAY, 23, id="no midnight"),
        pytest.param("America/Havana", "2026-11-01T12:00", Window.DAY, 25, id="two midnights"),
    ],
)
def test_where_clocks_change_a_window_is_shorter_or_longer(
    zone: str, now: str, window: Window, hours: float
) -> None:
    start, end = window.bounds(at(now, zone), ZoneInfo(zone))
    assert (end - start) / 3600 == hours


def test_a_window_in_which_clocks_change_has_one_end_all_along() -> None:
    """What was counted before the change is counted after it, too."""
    zone = ZoneInfo("Europe/Berlin")
    start, end = at("2026-03-29T00:00", "Europe/Berlin"), at("2026-03-30T00:00", "Europe/Berlin")
    for second in range(int(start), int(end), 600):
        assert Window.DAY.bounds(second, zone) == (start, end)


def test_the_hour_that_comes_twice_is_two_windows() -> None:
    zone = ZoneInfo("Europe/Berlin")
    first = at("2026-10-25T00:00")  # 2:00 in summer time, and an hour later 2:00 again
    assert Window.HOUR.bounds(first + 60, zone) == (first, first + 3600)
    assert Window.HOUR.bounds(first + 3660, zone) == (first + 3600, first + 7200)


def test_the_hour_in_which_a_clock_jumps_by_half_of_one_takes_longer() -> None:
    zone = ZoneInfo("Australia/Lord_Howe")
    change = at("2026-04-04T15:00")  # 2:00 in summer time, and at once 1:30
    for second in (-3600, -1, 0, 1799):
        assert Window.HOUR.bounds(change + second, zone) == (change - 3600, change + 1800)


def test_an_hour_begins_with_the_clock_of_its_zone() -> None:
    noon = at("2026-01-01T12:00")
    assert Window.HOUR.bounds(noon, ZoneInfo("Asia/Kathmandu")) == (noon - 2700, noon + 900)


def test_a_moment_has_no_end() -> None:
    assert Window.MOMENT.bounds(at("2026-01-01T12:00")) == (0, FOREVER)
    assert at("9999-12-31T23:59:59") < FOREVER


@given(st.sampled_from(CALENDAR), st.floats(0, 4_000_000_000))
@example(Window.HOUR, 1_750_000_799.9999998)
@example(Window.HOUR, 1_750_000_800.1234567)
def test_every_moment_is_in_its_window_and_windows_meet(window: Window, now: float) -> None:
    start, end = window.bounds(now)
    assert start <= now < end
    assert window.bounds(end)[0] == end
    assert window.bounds(start) == window.bounds(end - 1) == (start, end)


def slow(window: Window, now: int, zone: ZoneInfo) -> tuple[int, int]:
    """
    The seconds around `now` at which a calendar on the wall of `zone` shows the same page; of an
    hour, those between two at which the clock beside it strikes.

    Asks only what is shown at an instant, and never for the instant at which it is shown.
    """

    def shown(second: int) -> datetime:
        return datetime.fromtimestamp(second, UTC).astimezone(zone)

    def page(second: int) -> tuple[int, ...]:
        return shown(second).timetuple()[: 2 if window is Window.MONTH else 3]

    if window is Window.HOUR:
        minute = now // 60 * 60
        start = next(at for at in range(minute, 0, -60) if shown(at).minute == 0)
        return start, next(at for at in range(minute + 60, 2 * now, 60) if shown(at).minute == 0)
    longest = (27 if window is Window.DAY else 32 * 24) * 3600
    return (
        first(lambda second: page(second) == page(now), now - longest, now),
        first(lambda second: page(second) != page(now), now, now + longest),
    )


def first(true: Callable[[int], bool], no: int, yes: int) -> int:
    """The first second for which it is true; from `no` on it is false, and then true to `yes`."""
    while yes - no > 1:
        middle = (no + yes) // 2
        no, yes = (no, middle) if true(middle) else (middle, yes)
    return yes


def check(window: Window, now: int, zone: str) -> None:
    assert window.bounds(now, ZoneInfo(zone)) == slow(window, now, ZoneInfo(zone)), now


SLOW = (Window.HOUR, Window.DAY, Window.MONTH)


@given(st.sampled_from(SLOW), st.integers(FIRST, LAST), st.sampled_from(ZONES))
def test_windows_are_the_pages_of_a_calendar(window: Window, now: int, zone: str) -> None:
    check(window, now, zone)


@pytest.mark.parametrize("zone", ZONES)
def test_windows_are_the_pages_of_a_calendar_also_around_each_change_of_clocks(zone: str) -> None:
    info = ZoneInfo(zone)

    def offset(second: int) -> timedelta | None:
        return datetime.fromtimestamp(second, info).utcoffset()

    week = 7 * 86400
    for begin in range(FIRST, LAST, week):
        before = offset(begin)
        if offset(begin + week) != before:

            def changed(second: int, before: timedelta | None = before) -> bool:
                return offset(second) != before

            change = first(changed, begin, begin + week)
            for hours in (-25, -3, -2, -1, 0, 1, 2, 3, 23, 25):
                for seconds in (-1, 0, 1799):
                    for window in SLOW:
                        check(window, change + hours * 3600 + seconds, zone)


@given(st.integers(FIRST, LAST), st.sampled_from(ZONES), st.sampled_from(SLOW))
def test_windows_meet_in_every_zone(now: int, zone: str, window: Window) -> None:
    info = ZoneInfo(zone)
    start, end = window.bounds(now, info)
    assert start <= now < end
    assert window.bounds(start, info) == window.bounds(end - 1, info) == (start, end)
    assert window.bounds(end, info)[0] == end


# What is covered


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
        pytest.param(a_limit(model="library/LLAMA3:latest"), True, id="its model by another name"),
        pytest.param(a_limit(gateway="ollama", model="gemma"), False, id="another model"),
        pytest.param(a_limit(key="k1"), True, id="its key"),
        pytest.param(a_limit(key="k2"), False, id="another key"),
        pytest.param(a_limit(key="k1", model="gemma"), False, id="its key and another model"),
        pytest.param(a_limit(shadow=True), True, id="in the shadow"),
    ],
)
def test_a_limit_covers_its_gateway_model_and_key(limit: Limit, covers: bool) -> None:
    assert limit.covers("ollama", "llama3", "k1") is covers


@pytest.mark.parametrize(
    ("gateway", "model", "now", "covers"),
    [
        pytest.param("ollama", "llama3", 1000.0, True, id="from its first moment"),
        pytest.param("ollama", "llama3", 1999.9, True, id="to its last"),
        pytest.param("ollama", "llama3", 999.9, False, id="not before"),
        pytest.param("ollama", "llama3", 2000.0, False, id="not when it is over"),
        pytest.param("openai", "llama3", 1500.0, False, id="another gateway"),
        pytest.param("ollama", "gemma", 1500.0, False, id="another model"),
    ],
)
def test_a_grant_covers_its_time_gateway_and_model(
    gateway: str, model: str, now: float, covers: bool
) -> None:
    grant = Grant("g", "ollama", "llama*", Unit.TOKENS, 10, created_at=1000.0, expires_at=2000.0)
    assert grant.covers(gateway, model, now) is covers


def test_counters_can_hold_what_is_not_whole() -> None:
    assert {unit: unit.parts for unit in Unit if unit.parts != 1} == {
        Unit.COMPUTE_SECONDS: 1000,
        Unit.COST: 10**9,
    }


# Defaults and own ones


def test_an_own_limit_replaces_the_default_of_the_same_cell_only() -> None:
    day, hour = a_limit(amount=100), a_limit(window=Window.HOUR, amount=10)
    own = a_limit(amount=500)
    assert set(merge([day, hour], [own])) == {own, hour}


def test_an_own_limit_may_be_tighter_or_nothing_at_all() -> None:
    assert merge([a_limit(amount=100)], [a_limit(amount=0)]) == (a_limit(amount=0),)


@pytest.mark.parametrize(
    "own",
    [
        pytest.param(a_limit(gateway="openai"), id="another gateway"),
        pytest.param(a_limit(model="llama*"), id="another model"),
        pytest.param(a_limit(window=Window.MONTH), id="another window"),
        pytest.param(a_limit(key="k1", amount=1), id="a key's"),
        pytest.param(a_limit(shadow=True, amount=1), id="in the shadow"),
    ],
)
def test_any_other_limit_stands_beside_the_default(own: Limit) -> None:
    assert set(merge([a_limit()], [own])) == {a_limit(), own}


def test_in_the_shadow_too_an_own_limit_replaces_the_default() -> None:
    default, own = a_limit(shadow=True), a_limit(amount=3, shadow=True)
    assert set(merge([default, a_limit()], [own])) == {own, a_limit()}


def test_limits_of_two_keys_stand_side_by_side() -> None:
    first, second = a_limit(key="k1"), a_limit(key="k2", amount=20)
    assert set(merge([], [first, second])) == {first, second}
