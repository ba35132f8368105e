"""Tokens in the row and on the quota are those that the upstream emitted."""

from typing import Any

import pytest

from tests.e2e.gateway import CHAT, EMBED, GENERATE, PROMPT, Gateway, Json, says

LIMIT = 1_000_000
RESPONSE = {"model": "smollm2", "input": PROMPT}
MESSAGE = {**CHAT, "max_tokens": 1000}
ASKED = {"stream_options": {"include_usage": True}}
NOT_ASKED = {"stream_options": {"include_usage": False}}


def count(gateway: Gateway, path: str, body: Json, **behaviour: Any) -> tuple[Json, int, int]:
    """The row of such a call, and the tokens that the upstream read and wrote for it."""
    someone = gateway.someone(tokens=LIMIT)
    answer = someone.post(path, body, headers=says(**behaviour))
    assert answer.status_code == 200, answer.text
    row, seen = gateway.row(answer), gateway.seen(answer)
    assert row["tokens_used"] == (row["prompt_tokens"] or 0) + row["completion_tokens"]
    assert (row["finished"], row["aborted"], row["status_code"]) == (1, 0, 200)
    assert row["user_id"] == someone.user_id
    assert row["key_id"] == someone.key_id
    assert (row["model_name"], row["endpoint"]) == ("smollm2", path)
    assert row["streamed"] == (body.get("stream", path in ("/api/chat", "/api/generate")))
    someone.expect_spent(row["tokens_used"], limit=LIMIT)
    return row, seen.prompt_tokens, seen.emitted


REPORTED = [
    pytest.param("/api/chat", CHAT, {}, id="chat, NDJSON"),
    pytest.param("/api/chat", {**CHAT, "stream": False}, {}, id="chat, JSON"),
    pytest.param("/api/generate", GENERATE, {}, id="generate, NDJSON"),
    pytest.param("/api/generate", {**GENERATE, "stream": False}, {}, id="generate, JSON"),
    pytest.param("/api/chat", CHAT, {"reasoning_tokens": 4}, id="chat, thinking, NDJSON"),
    pytest.param("/api/chat", CHAT, {"tokens": 0}, id="chat, an empty answer"),
    pytest.param("/api/chat", CHAT, {"tokens_per_chunk": 3}, id="chat, more tokens than lines"),
    pytest.param("/api/embed", EMBED, {}, id="embed"),
    pytest.param("/v1/embeddings", EMBED, {"flavour": "openai"}, id="v1 embeddings"),
    *(
        pytest.param(path, {**body, **stream}, {"flavour": flavour}, id=f"{path}, {flavour}, {how}")
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", GENERATE))
        for flavour in ("ollama", "openai", "llamacpp", "cumulative")
        for how, stream in {
            "JSON": {},
            "SSE": {"stream": True},
            "SSE, usage asked for": {"stream": True, **ASKED},
        }.items()
    ),
    *(
        pytest.param(path, {**body, **stream}, {"flavour": flavour}, id=f"{path}, {flavour}, {how}")
        for path, body in (("/v1/responses", RESPONSE), ("/v1/messages", MESSAGE))
        for flavour in ("ollama", "openai", "llamacpp")
        for how, stream in {"JSON": {}, "SSE": {"stream": True}}.items()
    ),
    pytest.param(
        "/v1/responses",
        {**RESPONSE, "stream": True},
        {"flavour": "openai", "reasoning_tokens": 4},
        id="responses, thinking",
    ),
    pytest.param(
        "/v1/messages",
        {**MESSAGE, "stream": True},
        {"flavour": "openai", "cached_tokens": 5},
        id="messages, part of the prompt from a cache",
    ),
    pytest.param(
        "/v1/messages", MESSAGE, {"flavour": "llamacpp", "cached_tokens": 5}, id="messages, cached"
    ),
    pytest.param(
        "/v1/chat/completions",
        {**CHAT, "stream": True, **NOT_ASKED},
        {"flavour": "openai"},
        id="SSE, usage declined",
    ),
    pytest.param(
        "/v1/chat/completions",
        {**CHAT, "stream": True},
        {"flavour": "llamacpp", "omit": ["usage"]},
        id="SSE, llama.cpp's timings alone",
    ),
    pytest.param(
        "/v1/chat/completions",
        CHAT,
        {"flavour": "llamacpp", "omit": ["usage"]},
        id="JSON, llama.cpp's timings alone",
    ),
    pytest.param(
        "/v1/chat/completions",
        {**CHAT, "stream": True, "n": 3},
        {"flavour": "openai"},
        id="SSE, three choices",
    ),
]


@pytest.mark.parametrize(("path", "body", "behaviour"), REPORTED)
def test_reported_tokens_are_recorded_and_charged(
    gateway: Gateway, path: str, body: Json, behaviour: Json
) -> None:
    row, prompt, emitted = count(gateway, path, body, **{"tokens": 9, **behaviour})
    assert row["token_source"] == "reported"
    assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt, emitted)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("choices", [1, 2])
def test_a_stream_that_reports_nothing_is_counted_to_the_token(
    gateway: Gateway, path: str, choices: int
) -> None:
    body = CHAT if path == "/v1/chat/completions" else GENERATE
    row, _, emitted = count(
        gateway, path, {**body, "stream": True, "n": choices}, flavour="bare", tokens=9
    )
    assert row["token_source"] == "counted"
    assert (row["prompt_tokens"], row["completion_tokens"]) == (None, emitted)
    assert emitted == 9 * choices


@pytest.mark.parametrize(("path", "body"), [("/v1/responses", RESPONSE), ("/v1/messages", MESSAGE)])
def test_typed_streams_that_report_nothing_are_counted_to_the_token(
    gateway: Gateway, path: str, body: Json
) -> None:
    told = {"flavour": "bare", "tokens": 9, "reasoning_tokens": 4}
    row, _, emitted = count(gateway, path, {**body, "stream": True}, **told)
    assert row["token_source"] == "counted"
    assert (row["prompt_tokens"], row["completion_tokens"], emitted) == (None, emitted, 9)


def test_thinking_that_nobody_reports_is_counted(gateway: Gateway) -> None:
    body = {**CHAT, "stream": True}
    row, _, emitted = count(
        gateway, "/v1/chat/completions", body, flavour="bare", tokens=9, reasoning_tokens=5
    )
    assert (row["token_source"], row["completion_tokens"]) == ("counted", emitted)


@pytest.mark.parametrize(
    ("path", "body", "flavour"),
    [
        pytest.param("/v1/chat/completions", CHAT, "bare", id="chat"),
        pytest.param("/v1/embeddings", EMBED, "bare", id="v1 embeddings"),
        pytest.param("/api/embeddings", GENERATE, "ollama", id="Ollama's old embeddings"),
    ],
)
def test_json_without_any_count_is_estimated_and_says_so(
    gateway: Gateway, path: str, body: Json, flavour: str
) -> None:
    row, _, _ = count(gateway, path, body, flavour=flavour)
    assert row["token_source"] == "estimated"
    assert row["tokens_used"] > 0


def test_a_missing_prompt_count_of_ollama_is_zero(gateway: Gateway) -> None:
    row, _, emitted = count(gateway, "/api/chat", CHAT, omit=["prompt_eval_count"])
    assert (row["prompt_tokens"], row["completion_tokens"]) == (0, emitted)


@pytest.mark.parametrize("cached", [0, 5])
def test_cached_tokens_have_a_column_where_zero_is_not_null(gateway: Gateway, cached: int) -> None:
    row, prompt, _ = count(
        gateway, "/v1/chat/completions", CHAT, flavour="openai", cached_tokens=cached
    )
    assert (row["prompt_tokens"], row["cached_tokens"]) == (prompt, cached)
    for path, body in (("/v1/responses", RESPONSE), ("/v1/messages", MESSAGE)):
        for stream in (False, True):
            asked = {**body, "stream": stream}
            row, prompt, _ = count(gateway, path, asked, flavour="openai", cached_tokens=cached)
            assert (row["prompt_tokens"], row["cached_tokens"]) == (prompt, cached)


@pytest.mark.parametrize("thought", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/responses", RESPONSE)]
)
def test_thinking_that_is_reported_has_a_column_where_zero_is_not_null(
    gateway: Gateway, path: str, body: Json, stream: bool, thought: int
) -> None:
    asked = {**body, "stream": stream}
    row, _, emitted = count(gateway, path, asked, flavour="openai", reasoning_tokens=thought)
    assert (row["completion_tokens"], row["reasoning_tokens"]) == (emitted, thought)


FORMS = [
    pytest.param({"write_size": 1}, id="one-byte writes"),
    pytest.param({"crlf": True}, id="CRLF"),
    pytest.param({"comments": True}, id="comments"),
    pytest.param({"spaces": True}, id="spaces in JSON"),
    pytest.param({"final_newline": False}, id="no newline at the end"),
    pytest.param({"chunks_per_write": 100}, id="all in one write"),
    pytest.param({"framing": "close"}, id="ended by close"),
    pytest.param({"usage_padding": 300_000}, id="300 KB of usage at once"),
    pytest.param({"usage_padding": 300_000, "write_size": 1024}, id="300 KB of usage in 1 KB"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/api/chat", CHAT, id="NDJSON"),
        pytest.param("/v1/chat/completions", {**CHAT, "stream": True}, id="SSE"),
        pytest.param("/v1/chat/completions", {**CHAT, "stream": True, **ASKED}, id="SSE asked"),
        pytest.param("/v1/chat/completions", CHAT, id="JSON"),
        pytest.param("/v1/responses", {**RESPONSE, "stream": True}, id="responses"),
        pytest.param("/v1/messages", {**MESSAGE, "stream": True}, id="messages"),
    ],
)
def test_the_form_of_the_bytes_changes_no_count(
    gateway: Gateway, path: str, body: Json, form: Json
) -> None:
    row, prompt, emitted = count(gateway, path, body, tokens=30, **form)
    assert row["token_source"] == "reported"
    assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt, emitted)


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_a_client_that_takes_gzip_is_counted(gateway: Gateway, path: str) -> None:
    someone = gateway.someone()
    headers = {"accept-encoding": "gzip", **says(gzip=True)}
    answer = someone.post(path, {**CHAT, "stream": True}, headers=headers)
    assert answer.status_code == 200
    assert gateway.row(answer)["completion_tokens"] == gateway.seen(answer).emitted > 0


def test_a_maximum_in_the_request_holds_and_is_counted(gateway: Gateway) -> None:
    row, _, emitted = count(
        gateway, "/v1/chat/completions", {**CHAT, "max_tokens": 3, "stream": True}, tokens=50
    )
    assert row["completion_tokens"] == emitted == 3


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param({"report": {"eval_count": -5}}, id="negative"),
        pytest.param({"report": {"eval_count": 1e300}}, id="beyond all measure"),
        pytest.param({"report": {"eval_count": "7"}}, id="not a number"),
        pytest.param({"omit": ["eval_count"]}, id="none"),
    ],
)
def test_text_is_not_free_where_the_upstream_counts_it_wrongly(
    gateway: Gateway, behaviour: Json
) -> None:
    row, _, emitted = count(gateway, "/api/chat", CHAT, **behaviour)
    assert row["completion_tokens"] == emitted


@pytest.mark.parametrize("path", ["/ollama/v1/chat/completions", "/openai/v1/chat/completions"])
def test_a_prefix_names_the_gateway_and_not_the_endpoint(gateway: Gateway, path: str) -> None:
    answer = gateway.someone().post(path, CHAT)
    row = gateway.row(answer)
    assert row["gateway_type"] == path.split("/")[1]
    assert (row["endpoint"], row["dialect"]) == ("/v1/chat/completions", "openai")
    assert row["tokens_used"] == gateway.seen(answer).emitted + row["prompt_tokens"]
