"""Where names are mapped, answers have the name that was asked for, whatever they look like."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.gateway import CHAT, EMBED, GENERATE, PROMPT, Gateway, Json, running, says
from tests.standin import StandIn

ASKED, MEANT = "gpt-4", "smollm2"
MAPPED = {
    f"PARALLAMA_API_GATEWAYS__{gateway}__MODEL_MAPPINGS": f"{{{ASKED}: {MEANT}}}"
    for gateway in ("OPENAI", "OLLAMA")
}
MANY = 60

CALLS = [
    pytest.param("/api/chat", CHAT, "ollama", id="chat, NDJSON"),
    pytest.param("/api/chat", {**CHAT, "stream": False}, "ollama", id="chat, JSON"),
    pytest.param("/api/generate", GENERATE, "ollama", id="generate, NDJSON"),
    pytest.param("/api/embed", EMBED, "ollama", id="embed"),
    pytest.param("/v1/embeddings", EMBED, "openai", id="v1 embeddings"),
    *(
        pytest.param(path, {**body, "stream": stream}, flavour, id=f"{path}, {flavour}, {how}")
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/completions", GENERATE),
            ("/v1/responses", {"model": MEANT, "input": PROMPT}),
            ("/v1/messages", {**CHAT, "max_tokens": 1000}),
        )
        for flavour in ("ollama", "llamacpp", "openai")
        for how, stream in (("JSON", False), ("SSE", True))
    ),
]
FORMS: list[Json] = [
    {},
    {"write_size": 1, "tokens": 5},
    {"crlf": True, "comments": True, "spaces": True},
    {"final_newline": False, "framing": "close"},
    {"chunks_per_write": 7, "write_size": 1000},
    {"usage_padding": 5_000_000},
]
STRANGE = {
    ("/api/chat", "ollama"),
    ("/v1/chat/completions", "llamacpp"),
    ("/v1/responses", "ollama"),
    ("/v1/messages", "openai"),
}
"""One of each kind is tried in all forms."""


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with (
        StandIn(models=(MEANT,)) as upstream,
        running(tmp_path_factory.mktemp("names"), upstream, environ=MAPPED) as gateway,
    ):
        yield gateway


def names(value: Any) -> Iterator[str]:
    """Where a client looks for the model of an answer."""
    for at in (value, value.get("response"), value.get("message")):
        if isinstance(at, dict) and isinstance(at.get("model"), str):
            yield at["model"]


def objects(answer: httpx.Response) -> list[Json]:
    if answer.headers["content-type"].startswith("application/json"):
        return [answer.json()]
    lines = [line.removeprefix("data:").strip() for line in answer.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.parametrize(("path", "body", "flavour"), CALLS)
def test_an_answer_has_the_name_that_was_asked_for_and_every_other_byte(
    mapped: Gateway, path: str, body: Json, flavour: str
) -> None:
    strange = (path, flavour) in STRANGE
    for form in FORMS if strange else FORMS[:1]:
        _expect_names(mapped, path, body, flavour, form)


def _expect_names(mapped: Gateway, path: str, body: Json, flavour: str, form: Json) -> None:
    """The same call by its own name passes unchanged, which tells what the bytes have to be."""
    someone = mapped.someone()
    if body.get("stream") and path in ("/v1/chat/completions", "/v1/completions"):
        body = {**body, "stream_options": {"include_usage": True}}
    told = says(**{"flavour": flavour, "tokens": MANY, **form})
    answer = someone.post(path, {**body, "model": ASKED}, headers=told)
    assert answer.status_code == 200, answer.text
    found = [name for one in objects(answer) for name in names(one)]
    assert found
    assert set(found) == {ASKED}
    assert MEANT not in answer.text
    row, seen = mapped.row(answer), mapped.seen(answer)
    assert (row["model_name"], row["requested_model"], row["finished"]) == (MEANT, ASKED, 1)
    assert row["tokens_used"] == seen.prompt_tokens + seen.emitted
    assert row["token_source"] == "reported"
    plain = someone.post(path, body, headers=told)
    assert len(plain.content) - len(answer.content) == len(found) * (len(MEANT) - len(ASKED))


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
def test_an_error_names_what_was_asked_for(mapped: Gateway, path: str) -> None:
    told = says(status=404, error=f"model '{MEANT}' not found")
    body = {**CHAT, "model": ASKED, "max_tokens": 5}
    answer = mapped.someone().post(path, body, headers=told)
    assert answer.status_code == 404
    assert f"model '{ASKED}' not found" in answer.text
    assert MEANT not in answer.text


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_no_token_waits_for_the_next(mapped: Gateway, path: str) -> None:
    told = says(tokens=9, hold_at=4, gate=path)
    body = {**CHAT, "model": ASKED, "stream": True}
    with mapped.someone().stream(path, body, headers=told) as answer:
        lines = (line for line in answer.iter_lines() if line)
        got = [next(lines) for _ in range(4)]
        mapped.upstream.release(path)
        got += list(lines)
    assert all(ASKED in line for line in got if "{" in line)
