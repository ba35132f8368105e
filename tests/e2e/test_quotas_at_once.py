"""A quota is a promise, and it is usable: many calls at once against what fits a few."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from parallama.limits import Unit, Window
from tests.e2e.gateway import CHAT, Gateway, Json, Someone, running, says
from tests.standin import StandIn

PROMPT, ANSWER = 11, 20
ONE = PROMPT + ANSWER
GATEWAYS = {
    "soft": "",
    "hard": "rate_limiting: {enforcement: hard}\n",
}


@pytest.fixture(scope="module", params=GATEWAYS)
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp(request.param)
    with StandIn() as upstream, running(folder, upstream, settings=GATEWAYS[request.param]) as it:
        teacher = it.someone()
        for body in (CHAT, {**CHAT, "max_tokens": 1000}):
            for _ in range(3):  # its usual length, and how many tokens such a prompt has
                answer = teacher.post("/v1/chat/completions", body, headers=says(tokens=ANSWER))
                it.row(answer)
        yield it


def at_once(someone: Someone, calls: int, body: Json) -> list[httpx.Response]:
    with ThreadPoolExecutor(calls) as threads:
        told = says(tokens=ANSWER, gap=0.002)
        asked = [
            threads.submit(someone.post, "/v1/chat/completions", body, headers=told)
            for _ in range(calls)
        ]
        return [each.result() for each in asked]


def test_fifty_that_name_no_maximum_against_ten(gateway: Gateway) -> None:
    someone = gateway.someone(tokens=10 * ONE)
    answers = at_once(someone, 50, CHAT)
    passed = [answer for answer in answers if answer.status_code == 200]
    assert {answer.status_code for answer in answers} == {200, 429}
    hard = gateway.config.rate_limiting.enforcement == "hard"
    assert 8 <= len(passed) <= (12 if hard else 10)
    assert sum(gateway.row(answer)["tokens_used"] for answer in passed) <= 10 * ONE


def test_two_hundred_against_twenty(gateway: Gateway) -> None:
    someone = gateway.someone(tokens=20 * ONE)
    answers = at_once(someone, 200, {**CHAT, "max_tokens": ANSWER})
    spent = sum(gateway.row(a)["tokens_used"] for a in answers if a.status_code == 200)
    # Where limits are hard, what is left may be enough for one more answer that is cut short.
    hard = gateway.config.rate_limiting.enforcement == "hard"
    assert 19 <= sum(answer.status_code == 200 for answer in answers) <= (22 if hard else 20)
    assert spent <= 20 * ONE


def test_where_limits_are_hard_a_lone_call_ends_at_its_limit(gateway: Gateway) -> None:
    hard = gateway.config.rate_limiting.enforcement == "hard"
    someone = gateway.someone(tokens=ONE)
    answer = someone.post(
        "/v1/chat/completions", {**CHAT, "max_tokens": 1000}, headers=says(tokens=500)
    )
    used = gateway.row(answer)["tokens_used"]
    assert (used <= ONE) if hard else (used == PROMPT + 500)
    after = someone.post("/v1/chat/completions", CHAT)
    assert after.status_code == 429


def test_so_many_at_once(gateway: Gateway) -> None:
    someone = gateway.someone()
    gateway.limit(someone.name, {(Unit.CONCURRENT, Window.MOMENT): 3})
    answers = at_once(someone, 12, CHAT)
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert "3 requests at once" in refused.json()["error"]["message"]
    for answer in answers:
        gateway.row(answer)
    assert someone.post("/v1/chat/completions", CHAT).status_code == 200
