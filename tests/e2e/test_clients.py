"""What the `openai` library makes of what we add. All clients and what they do: tests/clients."""

from collections.abc import Iterator

import openai
import pytest

from parallama.roles import Role
from tests.e2e.gateway import PROMPT, Gateway, Someone, says

MESSAGES = [{"role": "user", "content": PROMPT}]
WORDS = "".join(f"w{n} " for n in range(7))


@pytest.fixture
def someone(gateway: Gateway) -> Someone:
    return gateway.someone(tokens=100_000)


@pytest.fixture
def gpt(gateway: Gateway, someone: Someone) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{gateway.url}/v1", api_key=someone.token, max_retries=0, timeout=10
    ) as client:
        yield client


def test_openai_chats(gateway: Gateway, gpt: openai.OpenAI, someone: Someone) -> None:
    answer = gpt.chat.completions.with_raw_response.create(model="smollm2", messages=MESSAGES)  # type: ignore[arg-type]
    parsed = answer.parse()
    assert parsed.choices[0].message.content == WORDS
    assert parsed.usage is not None
    (row,) = [gateway.row(answer.http_response)]
    assert row["prompt_tokens"] == parsed.usage.prompt_tokens
    assert row["completion_tokens"] == parsed.usage.completion_tokens
    someone.expect_spent(parsed.usage.total_tokens, limit=100_000)


@pytest.mark.parametrize("flavour", ["ollama", "openai", "llamacpp"])
@pytest.mark.parametrize("asked", [True, False])
def test_openai_streams(gateway: Gateway, gpt: openai.OpenAI, flavour: str, asked: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    with gpt.chat.completions.create(
        model="smollm2", messages=MESSAGES, stream=True, extra_headers=says(flavour=flavour),
        **options,
    ) as stream:  # type: ignore[call-overload]  # fmt: skip
        chunks = list(stream)
        row = gateway.row(stream.response)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == WORDS
    told = [chunk.usage for chunk in chunks if chunk.usage]
    assert len(told) == asked
    assert all(chunk.choices for chunk in chunks) != asked
    assert row["completion_tokens"] == gateway.upstream.last().emitted


def test_openai_understands_what_is_refused(gateway: Gateway) -> None:
    def client(someone: Someone) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{gateway.url}/v1", api_key=someone.token, max_retries=0, timeout=10
        )

    def ask(client: openai.OpenAI, model: str = "smollm2") -> None:
        client.chat.completions.create(model=model, messages=MESSAGES)  # type: ignore[arg-type]

    with client(gateway.someone(requests=1)) as limited:
        ask(limited)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(limited)
        assert caught.value.code == "insufficient_quota"
        assert "You have used up your limit of 1 request per day" in caught.value.message
        headers = caught.value.response.headers
        assert int(headers["retry-after"]) <= 86_400
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert caught.value.request_id
    with client(gateway.someone(expired=True)) as late:
        with pytest.raises(openai.AuthenticationError) as refused:
            ask(late)
        assert refused.value.code == "invalid_api_key"
    with client(gateway.someone(role=Role.READONLY)) as reader:
        with pytest.raises(openai.PermissionDeniedError) as forbidden:
            ask(reader)
        assert "readonly" in forbidden.value.message
    with client(gateway.someone(models=["smollm2"])) as narrow:
        with pytest.raises(openai.NotFoundError) as hidden:
            ask(narrow, "secret")
        assert hidden.value.code == "model_not_found"


def test_openai_does_not_retry_what_cannot_succeed(gateway: Gateway) -> None:
    someone = gateway.someone(requests=0)
    with openai.OpenAI(
        base_url=f"{gateway.url}/v1", api_key=someone.token, max_retries=2, timeout=10
    ) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="smollm2", messages=MESSAGES)  # type: ignore[arg-type]
        assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"
