"""What an operator makes of parameters: it holds for each role, and the client is told."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from parallama.limits import Unit, Window
from parallama.roles import Role
from tests.e2e.gateway import PROMPT, Gateway, Json, Someone, running, says
from tests.standin import StandIn

MESSAGES = [{"role": "user", "content": PROMPT}]
TO_CHAT = "/v1/chat/completions"
CHANGED = "x-parallama-changed"
SHAPES = """{
  "*": {keep_alive: {max: 30m}, num_ctx: {max: 8192}, num_gpu: {set: -1}},
  user: {max_tokens: {max: 5, default: 3}, use_mmap: {drop: true}},
  operator: {num_ctx: {}, num_gpu: {}},
}"""


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    environ = {"PARALLAMA_REQUEST_SHAPES": SHAPES, "PARALLAMA_RATE_LIMITING__ENFORCEMENT": "hard"}
    with (
        StandIn(models=("smollm2",)) as upstream,
        running(tmp_path_factory.mktemp("shaped"), upstream, environ=environ) as gateway,
    ):
        yield gateway


@pytest.fixture
def gateway(shaped: Gateway) -> Gateway:
    shaped.upstream.reset()
    return shaped


def chat(someone: Someone, path: str = TO_CHAT, **more: Any) -> httpx.Response:
    headers = says(tokens=50)
    return someone.post(path, {"model": "smollm2", "messages": MESSAGES, **more}, headers=headers)


def sent(gateway: Gateway, answer: httpx.Response) -> Json:
    body: Json = json.loads(gateway.seen(answer).body)
    return body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("more", "most", "told"),
    [
        ({}, 3, "max_tokens=3"),
        ({"max_tokens": 4}, 4, None),
        ({"max_tokens": 40}, 5, "max_tokens=5"),
        ({"max_tokens": -1}, 5, "max_tokens=5"),
    ],
)
def test_no_answer_is_longer_than_the_role_may_have(
    gateway: Gateway, more: Json, most: int, told: str | None, stream: bool
) -> None:
    answer = chat(gateway.someone(), stream=stream, **more)
    assert answer.status_code == 200, answer.text
    assert answer.headers.get(CHANGED) == told
    assert sent(gateway, answer)["max_tokens"] == most
    assert gateway.row(answer)["completion_tokens"] == most


@pytest.mark.parametrize("stream", [False, True])
def test_ollamas_options(gateway: Gateway, stream: bool) -> None:
    options = {"num_ctx": 100_000, "num_gpu": 1, "use_mmap": False, "num_predict": -1, "seed": 7}
    answer = chat(gateway.someone(), "/api/chat", stream=stream, options=options, keep_alive=-1)
    assert answer.status_code == 200, answer.text
    assert sent(gateway, answer) == {
        "model": "smollm2", "messages": MESSAGES, "stream": stream, "keep_alive": "1800s",
        "options": {"num_ctx": 8192, "num_gpu": -1, "use_mmap": None, "num_predict": 5, "seed": 7},
    }  # fmt: skip
    assert answer.headers[CHANGED] == (
        "num_predict=5, num_ctx=8192, num_gpu=-1, use_mmap=null, keep_alive=1800s"
    )
    assert gateway.row(answer)["completion_tokens"] == 5


def test_a_role_has_its_own_rules_and_those_of_all(gateway: Gateway) -> None:
    options = {"num_ctx": 100_000, "num_gpu": 1, "num_predict": 9}
    told = {"options": options, "keep_alive": "24h", "stream": False}
    operator = chat(gateway.someone(role=Role.OPERATOR), "/api/chat", **told)
    assert sent(gateway, operator)["options"] == options
    assert operator.headers[CHANGED] == "keep_alive=1800s"
    admin = chat(gateway.someone(role=Role.ADMIN), "/api/chat", **told)
    assert sent(gateway, admin)["options"] == {**options, "num_ctx": 8192, "num_gpu": -1}
    assert admin.headers[CHANGED] == "num_ctx=8192, num_gpu=-1, keep_alive=1800s"


def test_what_is_let_through_is_told_nothing(gateway: Gateway) -> None:
    body = b'{"keep_alive":"5m", "model":"smollm2","options":{"num_gpu":-1,"num_predict":2}}'
    answer = gateway.someone().post("/api/chat", body)
    assert answer.status_code == 200
    assert CHANGED not in answer.headers
    assert gateway.seen(answer).body == body


def test_embeddings_write_nothing_and_keep_no_model(gateway: Gateway) -> None:
    someone = gateway.someone()
    answer = someone.post("/api/embed", {"model": "smollm2", "input": "x", "keep_alive": "forever"})
    assert sent(gateway, answer)["keep_alive"] == "1800s"
    assert answer.headers[CHANGED] == "num_gpu=-1, keep_alive=1800s"
    plain = someone.post("/v1/embeddings", {"model": "smollm2", "input": "x"})
    assert plain.status_code == 200
    assert CHANGED not in plain.headers


def test_the_bound_that_limits_see_is_the_one_after_the_change(gateway: Gateway) -> None:
    """Else the request would be held to need 40 tokens, and more than the limit has left."""
    someone = gateway.someone()
    gateway.limit(someone.name, {(Unit.TOKENS, Window.DAY): 60})
    answer = chat(someone, max_tokens=40, messages=[{"role": "user", "content": "x"}])
    assert answer.status_code == 200, answer.text
    assert answer.headers[CHANGED] == "max_tokens=5"
    held = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert held >= 60 - 5 - 40  # the bound that counts is the one after the change
    assert sent(gateway, answer)["max_tokens"] <= 5


def test_another_spelling_of_a_parameter_is_refused(gateway: Gateway) -> None:
    someone = gateway.someone()
    for body in (
        b'{"model":"smollm2","Keep_Alive":-1}',
        b'{"model":"smollm2","keep_alive":1,"keep_alive":-1}',
        b'{"model":"smollm2","options":{"num_ctx":1,"num_ctx":9999999}}',
    ):
        assert someone.post("/api/chat", body).status_code == 400
    assert gateway.upstream.requests == []
