"""Unmodified client libraries: they need nothing but the address and the key."""

from collections.abc import Iterator

import ollama
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


@pytest.fixture
def llama(gateway: Gateway, someone: Someone) -> Iterator[ollama.Client]:
    with ollama.Client(host=gateway.url, headers=someone.headers, timeout=10) as client:
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


def test_openai_completes_embeds_and_lists(gpt: openai.OpenAI) -> None:
    assert gpt.completions.create(model="smollm2", prompt=PROMPT).choices[0].text == WORDS
    vectors = gpt.embeddings.create(model="smollm2", input=["a", "b"])
    assert [item.embedding for item in vectors.data] == [[0.125, 0.25, 0.375, 0.5]] * 2
    assert {model.id for model in gpt.models.list()} == {"smollm2:latest", "secret:latest"}


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


def test_ollama_chats_and_streams(gateway: Gateway, llama: ollama.Client) -> None:
    answer = llama.chat("smollm2", MESSAGES)
    assert answer.message.content == WORDS
    assert (answer.prompt_eval_count, answer.eval_count) == (11, 7)
    parts = list(llama.chat("smollm2", MESSAGES, stream=True))
    assert "".join(part.message.content or "" for part in parts) == WORDS
    assert parts[-1].done
    assert [p.response for p in llama.generate("smollm2", PROMPT, stream=True)][:1] == ["w0 "]
    assert llama.embed("smollm2", ["a", "b"]).embeddings == [[0.125, 0.25, 0.375, 0.5]] * 2


def test_ollama_lists_and_shows(llama: ollama.Client) -> None:
    assert {model.model for model in llama.list().models} == {"smollm2:latest", "secret:latest"}
    assert {model.model for model in llama.ps().models} == {"smollm2:latest", "secret:latest"}
    assert llama.show("smollm2").modelinfo


def test_ollama_understands_what_is_refused(gateway: Gateway) -> None:
    def refused(someone: Someone, model: str = "smollm2") -> ollama.ResponseError:
        with (
            ollama.Client(host=gateway.url, headers=someone.headers, timeout=10) as client,
            pytest.raises(ollama.ResponseError) as caught,
        ):
            for _ in client.chat(model, MESSAGES, stream=True):
                pass
        return caught.value

    limited = refused(gateway.someone(requests=0))
    assert limited.status_code == 429
    assert limited.error.startswith("You have no allowance for requests")
    assert refused(gateway.someone(expired=True)).status_code == 401
    assert "readonly" in refused(gateway.someone(role=Role.READONLY)).error
    hidden = refused(gateway.someone(models=["smollm2"]), "secret")
    assert (hidden.status_code, hidden.error) == (
        404, 'model "secret" not found, try pulling it first',
    )  # fmt: skip


def test_an_operator_pulls_copies_and_deletes_with_ollama(gateway: Gateway) -> None:
    someone = gateway.someone(role=Role.OPERATOR)
    with ollama.Client(host=gateway.url, headers=someone.headers, timeout=10) as client:
        states = [part.status for part in client.pull("new", stream=True)]
        assert states[0] == "pulling manifest"
        assert states[-1] == "success"
        client.copy("new", "copied")
        client.delete("new")
        names = {model.model for model in client.list().models}
        assert "copied:latest" in names
        assert "new:latest" not in names
