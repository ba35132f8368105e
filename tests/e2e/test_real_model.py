"""The bundled model behind the real gateway, called by an unmodified client."""

from collections.abc import Iterator

import openai
import pytest

from parallama.bundled_model import NAME
from tests.e2e.gateway import PROMPT, Gateway, Json, Someone, running
from tests.standin import StandIn

LIMIT = 100_000
MESSAGES = [{"role": "user", "content": f"Count to one hundred. {PROMPT}"}]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    environ = {"PARALLAMA_MODEL__BUNDLED": "true", "PARALLAMA_MODEL__CONTEXT_TOKENS": "2048"}
    with (
        StandIn() as unused,
        running(tmp_path_factory.mktemp("real"), unused, environ=environ) as gateway,
    ):
        yield gateway
        assert not unused.requests


@pytest.fixture
def someone(real: Gateway) -> Someone:
    return real.someone(tokens=LIMIT)


@pytest.fixture
def client(real: Gateway, someone: Someone) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{real.url}/v1", api_key=someone.token, max_retries=0, timeout=60
    ) as gpt:
        yield gpt


@pytest.mark.parametrize("asked", [True, False], ids=["usage asked for", "not asked for"])
def test_the_row_of_a_stream_is_the_models_own_count(
    real: Gateway, client: openai.OpenAI, asked: bool
) -> None:
    """Greedy decoding says the same twice, so the plain answer tells what the stream has to."""
    told = {"model": NAME, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**told)  # type: ignore[call-overload]
    options = {"stream_options": {"include_usage": True}} if asked else {}
    with client.chat.completions.create(**told, **options, stream=True) as stream:  # type: ignore[call-overload]
        chunks = list(stream)
        row = real.row(stream.response)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    counts = [(c.usage.prompt_tokens, c.usage.completion_tokens) for c in chunks if c.usage]
    expected = whole.usage.prompt_tokens, whole.usage.completion_tokens
    assert counts == ([expected] if asked else [])
    assert (row["prompt_tokens"], row["completion_tokens"]) == expected
    assert (row["token_source"], row["finished"], row["model_name"]) == ("reported", 1, NAME)
    assert 0 < row["time_to_first_token"] <= row["request_duration"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": PROMPT, "max_output_tokens": 16}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 16}),
    ],
)
def test_other_apis_are_the_models_own_count_too(
    real: Gateway, someone: Someone, path: str, body: Json
) -> None:
    """A chat of the same words, which is asked for its count, tells what it has to be."""
    told = body.get("messages") or [{"role": "user", "content": PROMPT}]
    chat = {"messages": told, "max_tokens": 16, "temperature": 0, "model": NAME}
    usage = someone.post("/v1/chat/completions", chat).json()["usage"]
    for stream in (False, True):
        asked = {**body, "model": NAME, "temperature": 0, "stream": stream}
        answer = someone.post(path, asked)
        assert answer.status_code == 200, answer.text
        row = real.row(answer)
        assert (row["prompt_tokens"], row["completion_tokens"]) == (
            usage["prompt_tokens"],
            usage["completion_tokens"],
        )
        assert (row["token_source"], row["finished"], row["served_model"]) == ("reported", 1, NAME)


def test_a_stream_that_is_abandoned_is_counted(
    real: Gateway, client: openai.OpenAI, someone: Someone
) -> None:
    with client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=1000, temperature=0, stream=True,  # type: ignore[arg-type]
    ) as stream:  # fmt: skip
        texts = (c for c in stream if c.choices and c.choices[0].delta.content)
        for _ in range(10):
            next(texts)
        response = stream.response
    row = real.row(response)
    assert (row["aborted"], row["finished"], row["token_source"]) == (1, 0, "counted")
    assert 10 <= row["completion_tokens"] < 200  # it was told to stop
    again = client.chat.completions.with_raw_response.create(
        model=NAME, messages=MESSAGES, max_tokens=1  # type: ignore[arg-type]
    )  # fmt: skip
    left = int(again.headers["x-ratelimit-remaining-tokens"])
    assert LIMIT - left - row["tokens_used"] < 200  # what the second one holds


def test_the_ollama_api_is_said_to_be_missing(real: Gateway, someone: Someone) -> None:
    for path in ("/api/chat", "/api/generate"):
        answer = someone.post(path, {"model": NAME, "messages": MESSAGES, "prompt": PROMPT})
        assert answer.status_code == 404
        assert "no Ollama API" in answer.json()["error"]
        assert real.row(answer)["tokens_used"] == 0
    assert someone.get("/v1/models").json()["data"][0]["id"] == NAME
