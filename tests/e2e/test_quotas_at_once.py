"""A quota is a promise, and it is usable: many calls at once against what fits a few."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from parallama.limits import Unit, Window
from tests.e2e.gateway import CHAT, Gateway, Json, Someone, running, says, until
from tests.faults.databases import Postgresql
from tests.parallama.servers import Server
from tests.postgres import Postgres
from tests.standin import StandIn
from tests.supervisor.supervised import exit_code, made, terminate, up

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
    """Exactly what fits, once a prompt of this size was seen."""
    body = {**CHAT, "max_tokens": ANSWER}
    gateway.row(*at_once(gateway.someone(), 1, body))
    someone = gateway.someone(tokens=20 * ONE)
    answers = at_once(someone, 200, body)
    assert sorted(answer.status_code for answer in answers) == [200] * 20 + [429] * 180
    spent = [gateway.row(a)["tokens_used"] for a in answers if a.status_code == 200]
    assert sum(spent) == 20 * ONE


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


@pytest.mark.parametrize("mode", GATEWAYS)
def test_two_hundred_against_twenty_through_two_gateways(
    tmp_path: Path, postgres: Postgres, mode: str
) -> None:
    """Two Envoys, each with a `ratelimit` of its own; one Redis, and one database."""
    books = Postgresql(postgres)
    body = {**CHAT, "max_tokens": ANSWER}
    with ExitStack() as stack:
        upstream = stack.enter_context(StandIn())
        redis = stack.enter_context(Server(tmp_path / "redis"))
        gateways = []
        for name in ("one", "two"):
            config = made(tmp_path / name, upstream.url, GATEWAYS[mode])
            own = "redis:\n  password_file: secrets/redis_password\n"
            text = config.read_text()
            assert own in text
            shared = f"redis: {{host: 127.0.0.1, port: {redis.port}}}\n"
            config.write_text(text.replace(own, shared))
            books.settle_in(config)
            gateways.append(stack.enter_context(up(tmp_path / name, upstream)))
        teacher, someone = gateways[0].someone(), gateways[0].someone(tokens=20 * ONE)
        for gateway in gateways:  # what such a prompt has is learned by each
            answers = at_once(replace(teacher, gateway=gateway), 1, body)
            assert answers[0].status_code == 200
        before = len(upstream.requests)
        with ThreadPoolExecutor(2) as threads:
            halves = threads.map(
                lambda gateway: at_once(replace(someone, gateway=gateway), 100, body), gateways
            )
            statuses = [answer.status_code for half in halves for answer in half]
        assert sorted(statuses) == [200] * 20 + [429] * 180
        assert len(upstream.requests) == before + 20
        mine = until(lambda: found if len(found := rows_of(books, someone)) == 200 else None)
        assert sum(mine) == 20 * ONE
        for gateway in gateways:
            terminate(gateway)
            assert exit_code(gateway) == 0


def rows_of(books: Postgresql, someone: Someone) -> list[int]:
    return [row.tokens for row in books.rows() if row.user_id == someone.user_id]
