"""Streams that end badly: by the client, by the upstream, or by an error inside."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.gateway import (
    CHAT,
    GENERATE,
    PATIENCE,
    PROMPT,
    Gateway,
    Json,
    Someone,
    says,
    until,
)

LIMIT = 1_000_000
SSE = {**CHAT, "stream": True}
ASKED = {**SSE, "stream_options": {"include_usage": True}}
RESPONSE = {"model": "smollm2", "input": PROMPT, "stream": True}
MESSAGE = {**SSE, "max_tokens": 1000}
HEADS = {"/v1/responses": 4, "/v1/messages": 2}
"""Events before the first that has text."""

STREAMS = [
    pytest.param("/api/chat", CHAT, "ollama", id="chat, NDJSON"),
    pytest.param("/api/generate", GENERATE, "ollama", id="generate, NDJSON"),
    pytest.param("/v1/chat/completions", SSE, "ollama", id="SSE"),
    pytest.param("/v1/chat/completions", ASKED, "ollama", id="SSE with usage"),
    pytest.param("/v1/chat/completions", SSE, "llamacpp", id="SSE, llama.cpp"),
    pytest.param("/v1/chat/completions", SSE, "openai", id="SSE, usage null until the end"),
    pytest.param("/v1/chat/completions", SSE, "cumulative", id="SSE, usage in every chunk"),
    pytest.param("/v1/completions", {**GENERATE, "stream": True}, "bare", id="completions"),
    pytest.param("/v1/responses", RESPONSE, "ollama", id="responses"),
    pytest.param("/v1/responses", RESPONSE, "llamacpp", id="responses, llama.cpp"),
    pytest.param("/v1/messages", MESSAGE, "ollama", id="messages"),
    pytest.param("/v1/messages", MESSAGE, "openai", id="messages as Anthropic's"),
]


def wait_for_gone(gateway: Gateway, request_id: str) -> int:
    """The tokens that the upstream wrote before it noticed that it was hung up on."""
    mine = gateway.upstream.wait(
        lambda seen: seen.header("x-request-id") == request_id and seen.ended
    )
    assert mine.client_gone
    assert not mine.finished
    return mine.emitted


@pytest.mark.parametrize("chunks", [1, 40])
@pytest.mark.parametrize(("path", "body", "flavour"), STREAMS)
def test_a_client_that_hangs_up_pays_for_what_was_delivered(
    gateway: Gateway, path: str, body: Json, flavour: str, chunks: int
) -> None:
    someone = gateway.someone(tokens=LIMIT)
    events = chunks + 1 + HEADS.get(path, 0)
    told = says(flavour=flavour, tokens=100, hold_at=events)
    with someone.stream(path, body, headers=told) as answer:
        lines = (line for line in answer.iter_lines() if line and not line.startswith("event:"))
        for _ in range(events):
            next(lines)
    emitted = wait_for_gone(gateway, answer.headers["x-request-id"])
    assert emitted >= chunks
    row = gateway.row(answer)
    assert (row["aborted"], row["finished"], row["status_code"]) == (1, 0, 200)
    assert "DC" in row["flags"] or "DR" in row["flags"]
    assert abs(row["completion_tokens"] - emitted) <= 1
    assert row["tokens_used"] == (row["prompt_tokens"] or 0) + row["completion_tokens"]
    assert row["token_source"] == ("reported" if flavour == "cumulative" else "counted")
    someone.expect_spent(row["tokens_used"], limit=LIMIT)


@pytest.mark.parametrize(("path", "body"), [("/api/chat", CHAT), ("/v1/chat/completions", SSE)])
def test_a_client_that_hangs_up_before_the_first_token_pays_nothing(
    gateway: Gateway, path: str, body: Json
) -> None:
    someone = gateway.someone(tokens=LIMIT)
    with pytest.raises(httpx.ReadTimeout):
        someone.post(path, body, headers=says(hold_at=0), timeout=0.2)
    seen = gateway.upstream.wait(lambda seen: seen.client_gone and seen.ended)
    request_id = seen.header("x-request-id") or ""
    (row,) = until(lambda: gateway.rows(request_id))
    assert (row["aborted"], row["status_code"], row["tokens_used"]) == (1, 499, 0)
    someone.expect_spent(0, limit=LIMIT)


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_clients_that_leave_at_any_moment_leave_nothing_held(gateway: Gateway, path: str) -> None:
    """What is spent in the end is what the rows say, and no reservation stays behind."""
    someone = gateway.someone(tokens=LIMIT)
    body = json.dumps({**CHAT, "stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {someone.token}\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    assert someone.post(path, CHAT).status_code == 200  # so that the key is known

    def leave(moment: int) -> None:
        with socket.create_connection(gateway.address, timeout=PATIENCE) as client:
            client.sendall(request)
            time.sleep(moment % 25 / 5000)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(leave, range(100)))
    until(lambda: gateway.active_requests() == 0)
    # The rows of two workers come in no order: some may still be on their way.
    someone.expect_spent(
        lambda: sum(row["tokens_used"] for row in gateway.rows_of(someone.user_id)), limit=LIMIT
    )
    assert len(gateway.rows_of(someone.user_id)) > 2


def broken(someone: Someone, path: str, body: Json, told: dict[str, str]) -> tuple[str, bytes]:
    """The request id and the bytes that came before the stream broke."""
    got: list[bytes] = []
    with someone.stream(path, body, headers=told) as answer:
        with pytest.raises(httpx.RemoteProtocolError):
            got.extend(answer.iter_raw())
        return answer.headers["x-request-id"], b"".join(got)


@pytest.mark.parametrize("cut", ["close", "reset"])
def test_a_stream_cut_by_the_upstream_breaks_for_the_client_too(gateway: Gateway, cut: str) -> None:
    """All kinds of streams at once: Envoy takes a second to hang up."""

    def one(kind: Any) -> None:
        path, body, flavour = kind.values
        someone = gateway.someone(tokens=LIMIT)
        # It pauses, so that a reset does not overtake what was written before it.
        told = says(flavour=flavour, tokens=100, cut_after=21, cut=cut, gap=0.002)
        request_id, got = broken(someone, path, body, told)
        (row,) = until(lambda: gateway.rows(request_id))
        emitted = gateway.upstream.wait(
            lambda seen: seen.header("x-request-id") == request_id and seen.ended
        ).emitted
        assert (row["aborted"], row["finished"]) == (0, 0)
        assert row["flags"], "nothing says that it broke"
        assert row["error_message"]
        assert abs(row["completion_tokens"] - emitted) <= 1
        assert row["token_source"] == ("reported" if flavour == "cumulative" else "counted")
        assert got
        someone.expect_spent(row["tokens_used"], limit=LIMIT)

    with ThreadPoolExecutor() as threads:
        list(threads.map(one, STREAMS))


@pytest.mark.parametrize(("path", "body", "flavour"), STREAMS)
def test_a_stream_without_its_own_end_mark_is_not_finished(
    gateway: Gateway, path: str, body: Json, flavour: str
) -> None:
    """The client is told so in the stream's own form, and the row says it."""
    someone = gateway.someone(tokens=LIMIT)
    told = says(flavour=flavour, tokens=100, cut_after=20, cut="clean")
    answer = someone.post(path, body, headers=told)
    last = [line for line in answer.text.split("\n") if line][-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    message = error if path.startswith("/api/") else error["message"]
    assert "without an end mark" in message
    row = gateway.row(answer)
    assert row["error_message"] == "the upstream ended its stream without an end mark"
    assert (row["aborted"], row["finished"], row["status_code"]) == (0, 0, 200)
    assert row["completion_tokens"] == gateway.seen(answer).emitted
    someone.expect_spent(row["tokens_used"], limit=LIMIT)


def test_a_json_answer_cut_in_its_middle_breaks_for_the_client(gateway: Gateway) -> None:
    someone = gateway.someone(tokens=LIMIT)
    request_id, got = broken(someone, "/v1/chat/completions", CHAT, says(cut_after=0))
    assert got
    (row,) = until(lambda: gateway.rows(request_id))
    assert (row["finished"], bool(row["flags"])) == (0, True)
    someone.expect_spent(row["tokens_used"], limit=LIMIT)


@pytest.mark.parametrize(
    ("path", "body", "flavour"),
    [
        pytest.param("/api/chat", CHAT, "ollama", id="NDJSON"),
        pytest.param("/v1/chat/completions", SSE, "openai", id="SSE"),
        pytest.param("/v1/chat/completions", ASKED, "llamacpp", id="SSE, llama.cpp"),
        pytest.param("/v1/responses", RESPONSE, "openai", id="responses"),
        pytest.param("/v1/responses", RESPONSE, "llamacpp", id="responses, llama.cpp"),
        pytest.param("/v1/messages", MESSAGE, "openai", id="messages"),
        pytest.param("/v1/messages", MESSAGE, "llamacpp", id="messages, llama.cpp"),
    ],
)
def test_an_error_inside_an_answer_of_200_is_noted_and_passed_on(
    gateway: Gateway, path: str, body: Json, flavour: str
) -> None:
    someone = gateway.someone(tokens=LIMIT)
    told = says(flavour=flavour, tokens=100, error_after=6, error="out of memory")
    answer = someone.post(path, body, headers=told)
    assert answer.status_code == 200
    assert "out of memory" in answer.text
    assert "without an end mark" not in answer.text
    row = gateway.row(answer)
    assert "error" in row["error_message"]
    assert row["completion_tokens"] == gateway.seen(answer).emitted
    assert row["finished"] == 0
    someone.expect_spent(row["tokens_used"], limit=LIMIT)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 501, 503])
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_an_error_of_the_upstream_passes_unchanged_and_is_free(
    gateway: Gateway, path: str, status: int
) -> None:
    someone = gateway.someone(tokens=LIMIT)
    told = says(status=status, error="words of the upstream")
    answer = someone.post(path, {**CHAT, "stream": True}, headers=told)
    alone = httpx.post(gateway.upstream.url + path, json=CHAT, headers=told)
    assert (answer.status_code, answer.content) == (status, alone.content)
    assert answer.headers["content-type"] == alone.headers["content-type"]
    row = gateway.row(answer)
    assert (row["status_code"], row["tokens_used"]) == (status, 0)
    someone.expect_spent(0, limit=LIMIT)
