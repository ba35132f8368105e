import json
from dataclasses import replace

import pytest

from parallama.limits import Grant, Limit, Unit, Window
from ratelimit.rules import (
    Admitted,
    Level,
    Need,
    Reserve,
    Room,
    admit,
    buckets,
    decision,
    duration,
    instead,
    refuse,
    tightest,
)

NOON = 1_700_049_600.0  # 2023-11-15 12:00:00 UTC
ASK = Reserve(
    user="u",
    key="k",
    gateway="openai",
    dialect="openai",
    model="smollm2",
    endpoint="/v1/chat/completions",
    max_tokens=100,
    body_bytes=400,
    request_id="r",
)


def limit(unit=Unit.REQUESTS, window=Window.MINUTE, amount=10, *, gateway="*", model="*") -> Limit:
    return Limit(gateway, model, unit, window, amount)


def level(at: Limit, used=0, reserved=0, *, full=False, now=NOON) -> Level:
    (bucket,) = buckets([at], "openai", "smollm2", "k", now)
    return Level(bucket, used, reserved, full)


@pytest.mark.parametrize(
    ("gateway", "model", "meets"),
    [
        pytest.param("*", "*", True, id="everything"),
        pytest.param("openai", "*", True, id="this gateway"),
        pytest.param("ollama", "*", False, id="another gateway"),
        pytest.param("*", "smollm2", True, id="this model"),
        pytest.param("*", "smol*", True, id="a prefix of the model"),
        pytest.param("*", "smol", False, id="a prefix without its star"),
        pytest.param("*", "llama3", False, id="another model"),
        pytest.param("ollama", "smollm2", False, id="this model elsewhere"),
    ],
)
def test_a_call_meets_the_limits_that_cover_it(gateway, model, meets):
    met = buckets([limit(gateway=gateway, model=model)], "openai", "smollm2", "k", NOON)
    assert len(met) == meets


def test_a_changed_amount_keeps_the_bucket():
    few, many = (buckets([limit(amount=n)], "o", "m", "k", NOON)[0] for n in (1, 1000))
    assert few.name == many.name


@pytest.mark.parametrize(
    ("window", "later", "same"),
    [
        (Window.MINUTE, 59.9, True),
        (Window.MINUTE, 60, False),
        (Window.HOUR, 3599, True),
        (Window.HOUR, 3600, False),
        (Window.DAY, 3600, True),
        (Window.DAY, 12 * 3600 - 1, True),
        (Window.DAY, 12 * 3600, False),
    ],
)
def test_each_window_has_its_own_bucket(window, later, same):
    at, after = (buckets([limit(window=window)], "o", "m", "k", NOON + n)[0] for n in (0, later))
    assert (at.name == after.name) is same


def test_no_two_limits_share_a_name():
    cells = [
        limit(gateway=gateway, model=model)
        for gateway, model in [("a", "b:c"), ("a:b", "c"), ("a", "b%3Ac"), ("a:", "b"), ("*", "*")]
    ]
    cells += [limit(Unit.TOKENS), limit(window=Window.DAY), limit(Unit.TOKENS, Window.DAY)]
    cells += [replace(limit(), key="k"), replace(limit(), shadow=True), limit(window=Window.MONTH)]
    cells += [replace(limit(), key="k", shadow=True), limit(Unit.CONCURRENT, Window.MOMENT)]
    names = {buckets([cell], cell.gateway, cell.model, cell.key, NOON)[0].name for cell in cells}
    assert len(names) == len(cells)


@pytest.mark.parametrize(
    "hostile", ["a}b{c", "naïve 模型 🦙", "x" * 10_000, "a b\r\nc", "%7D", "a:b"]
)
def test_a_name_cannot_leave_its_part_of_the_key(hostile):
    (bucket,) = buckets([limit(model=hostile)], "openai", hostile, "k", NOON)
    assert bucket.name.isascii()
    assert not set(bucket.name) & set("{} \r\n")
    assert bucket.name.count(":") == 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1, "1s"), (59, "59s"), (60, "1m0s"), (360, "6m0s"), (3600, "1h0m0s"), (86399, "23h59m59s")],
)
def test_durations_are_written_as_go_does(seconds, text):
    assert duration(seconds) == text


def test_the_tightest_limit_of_each_unit_is_shown():
    levels = [
        level(limit(amount=10), used=1),
        level(limit(window=Window.DAY, amount=100), used=98),
        level(limit(Unit.TOKENS, amount=1000), used=100, reserved=300),
    ]
    assert admit(levels, "r", 300, NOON + 0.5) == Admitted(
        "r", 300, Room(100, 2, 12 * 3600), Room(1000, 600, 60)
    )


def test_of_equally_tight_limits_the_slower_is_shown():
    levels = [level(limit(), used=10), level(limit(window=Window.HOUR), used=10)]
    assert admit(levels, "r", 0, NOON).requests == Room(10, 0, 3600)


def test_a_shadow_is_told_and_not_shown():
    shadow = replace(limit(Unit.TOKENS, amount=5), shadow=True)
    levels = [level(limit(Unit.TOKENS, amount=1000), used=10), level(shadow, used=9, full=True)]
    answer = admit(levels, "r", 9, NOON)
    assert answer.tokens == Room(1000, 990, 60)
    assert answer.would_refuse == ("5 tokens per minute",)


def grant(id="g", unit=Unit.TOKENS, *, model="*", until=NOON + 1000) -> Grant:
    return Grant(id, "*", model, unit, 500, NOON - 5, until)


def names(levels, *grants) -> list[list[str]]:
    found = instead(levels, grants, "openai", "smollm2", NOON)
    return [[bucket.name.partition(":")[0] for bucket in each] for each in found]


def test_a_grant_takes_the_place_of_all_limits_of_its_unit():
    full = level(limit(Unit.TOKENS), used=10, full=True)
    levels = [level(limit()), full, level(limit(Unit.TOKENS, Window.DAY))]
    assert names(levels, grant("one"), grant("two")) == [["", "grant"], ["", "grant"]]
    (chosen,) = instead(levels, [grant()], "openai", "smollm2", NOON)
    assert (chosen[1].limit.amount, chosen[1].end) == (500, NOON + 1000)


def test_a_grant_helps_only_where_and_while_it_is_given():
    levels = [level(limit(Unit.TOKENS), used=10, full=True)]
    assert names(levels, grant(unit=Unit.REQUESTS)) == []
    assert names([level(limit(Unit.TOKENS), used=9)], grant()) == []
    assert names(levels, grant(model="llama*")) == []
    assert names(levels, grant(until=NOON)) == []
    both = [*levels, level(limit(), used=10, full=True)]
    assert names(both, grant()) == []
    assert names(both, grant(), grant("r", Unit.REQUESTS)) == [["grant", "grant"]]


@pytest.mark.parametrize(
    ("at", "words"),
    [
        (limit(Unit.COST, Window.DAY, 12_500_000_000), "12.5 of cost per day"),
        (limit(Unit.COMPUTE_SECONDS, Window.HOUR, 90_000), "90 compute seconds per hour"),
        (limit(Unit.CONCURRENT, Window.MOMENT, 1), "1 request at once"),
        (
            limit(Unit.CONCURRENT, Window.MOMENT, 4, model="smol*"),
            "4 requests at once for model smol*",
        ),
        (replace(limit(window=Window.MONTH), key="k"), "10 requests per month with this key"),
    ],
)
def test_every_unit_has_its_words(at, words):
    assert words in refuse([level(at, used=at.amount, full=True)], NOON).message


def test_so_many_at_once_is_worth_trying_again():
    refused = refuse([level(limit(Unit.CONCURRENT, Window.MOMENT, 4), used=4, full=True)], NOON)
    assert (refused.code, refused.retry_after, refused.may_retry) == (
        "rate_limit_exceeded", 5, True
    )  # fmt: skip


def test_nothing_left_is_never_less_than_nothing():
    assert admit([level(limit(Unit.TOKENS), used=90)], "r", 1, NOON).tokens == Room(10, 0, 60)


@pytest.mark.parametrize(
    ("levels", "code", "wait", "may_retry", "words"),
    [
        pytest.param(
            [level(limit(), used=10, full=True)],
            "rate_limit_exceeded", 48, True,
            "You have reached your limit of 10 requests per minute. "
            "It resets in 48s: try again then.",
            id="minute",
        ),
        pytest.param(
            [level(limit(window=Window.DAY, model="smol*"), used=10, full=True)],
            "insufficient_quota", 43188, False,
            "You have used up your limit of 10 requests per day for model smol*. It resets in "
            "11h59m48s: wait until then, or ask your administrator for a higher limit.",
            id="day",
        ),
        pytest.param(
            [
                level(limit(), used=10, full=True),
                level(limit(window=Window.HOUR), used=12, full=True),
                level(limit(window=Window.DAY), used=9),
            ],
            "insufficient_quota", 3588, False,
            "per hour", id="the slowest of the full ones, not of all",
        ),
        pytest.param(
            [level(limit(Unit.TOKENS, Window.DAY, 0, gateway="openai"), full=True)],
            "insufficient_quota", 43188, False,
            "You have no allowance for tokens on openai: your limit is 0 per day. "
            "Ask your administrator for one.",
            id="no allowance",
        ),
        pytest.param(
            [
                level(limit(amount=0), full=True),
                level(limit(window=Window.DAY), used=10, full=True),
            ],
            "insufficient_quota", 48, False,
            "no allowance", id="no allowance wins: waiting does not help",
        ),
        pytest.param(
            [level(limit(Unit.TOKENS, Window.DAY, 100), used=50, reserved=40, full=True)],
            "rate_limit_exceeded", 5, True,
            "Your requests that are still running hold the rest of your limit of 100 tokens per "
            "day. Try again when one of them has finished, or ask for fewer tokens (max_tokens).",
            id="held by requests that still run",
        ),
        pytest.param(
            [
                level(limit(Unit.TOKENS, Window.DAY, 100), reserved=100, full=True),
                level(limit(), used=10, full=True),
            ],
            "rate_limit_exceeded", 48, True,
            "10 requests per minute", id="what is gone wins over what is held",
        ),
        pytest.param(
            [level(limit(Unit.TOKENS, amount=1), used=1, full=True)],
            "rate_limit_exceeded", 48, True, "1 token per minute", id="one is singular",
        ),
    ],
)  # fmt: skip
def test_refusals(levels, code, wait, may_retry, words):
    refused = refuse(levels, NOON + 12)
    assert (refused.code, refused.retry_after, refused.may_retry) == (code, wait, may_retry)
    assert words in refused.message


def test_a_wait_is_never_shorter_than_it_says():
    assert refuse([level(limit(), used=10, full=True)], NOON + 58.7).retry_after == 2
    assert refuse([level(limit(), used=10, full=True)], NOON + 59.99).retry_after == 1


TOKENS_A_DAY = limit(Unit.TOKENS, Window.DAY, 1000)
MIDNIGHT = 1_700_092_800


@pytest.mark.parametrize(
    ("levels", "which"),
    [
        pytest.param([], None, id="no limit"),
        pytest.param([level(limit(), 9), level(TOKENS_A_DAY, 100)], 0, id="the smaller part left"),
        pytest.param([level(limit(), 5), level(TOKENS_A_DAY, 100, 500)], 1, id="with what is held"),
        pytest.param([level(limit(), 5), level(limit(amount=0))], 1, id="a limit of 0"),
        pytest.param([level(replace(limit(), shadow=True), 99), level(limit(), 1)], 1, id="shadow"),
        pytest.param([level(replace(limit(), shadow=True), 99)], None, id="in the shadow alone"),
        pytest.param([level(limit(), 99), level(TOKENS_A_DAY, 1)], 0, id="one that was crossed"),
    ],
)
def test_the_tightest_limit_is_the_one_of_which_least_is_left(levels, which):
    assert tightest(levels) is (None if which is None else levels[which])


@pytest.mark.parametrize(
    ("at", "told"),
    [
        (None, {}),
        (
            level(TOKENS_A_DAY, 12, 34),
            {"limit": "1000 tokens per day", "used": 12, "held": 34, "needs": 150},
        ),
        (
            level(limit(Unit.COMPUTE_SECONDS, Window.DAY, 90_000), 1500),
            {"limit": "90 compute seconds per day", "used": 1.5, "held": 0.0, "needs": 2.5},
        ),
        (
            level(limit(Unit.COST, Window.DAY, 2_500_000_000), 1_000_000_001),
            {"limit": "2.5 of cost per day", "used": 1.0, "held": 0.0, "needs": 0.001},
        ),
    ],
)
def test_a_decision_names_its_limit_and_what_was_counted(at, told):
    need = Need(50, 100, compute=2500, cost=1_000_000)
    said = json.loads(f"{{{decision(at, need, 1_700_049_500.1239)}}}")
    assert said == {"policy_at": 1_700_049_500.124, **told, **({"ends": MIDNIGHT} if at else {})}


@pytest.mark.parametrize("model", ["llama3:70b-instruct-q4_K_M", "m" * 255, '"' * 255, "模" * 255])
def test_a_decision_is_small_and_always_json(model):
    at = level(limit(Unit.TOKENS, Window.MONTH, 10**9, gateway="openai"), 10**8, 10**6)
    at = at._replace(bucket=replace(at.bucket, limit=replace(at.bucket.limit, model=model)))
    said = decision(at, Need(10**5, 10**5), NOON)
    assert json.loads(f"{{{said}}}")["used"] == 10**8
    usual = len(model) < 30
    assert len(said.encode()) < (200 if usual else 600)
