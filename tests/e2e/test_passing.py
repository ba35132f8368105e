"""What passes through the gateway: the same bytes, the same headers, and at once."""

import json
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from parallama.roles import Role
from tests.e2e.gateway import CHAT, EMBED, GENERATE, PATIENCE, PROMPT, Gateway, Json, Someone, says
from tests.standin import StandIn

SSE = {**CHAT, "stream": True}
ASKED = {**SSE, "stream_options": {"include_usage": True}}


def direct(
    upstream: StandIn, path: str, body: bytes, behaviour: dict[str, str], method: str = "POST"
) -> httpx.Response:
    return httpx.request(method, upstream.url + path, content=body, headers=behaviour, timeout=10)


def both(
    someone: Someone, path: str, body: bytes, behaviour: dict[str, str], method: str = "POST"
) -> tuple[httpx.Response, httpx.Response]:
    """The answer through the gateway and the one without it, of one second of the clock."""
    upstream = someone.gateway.upstream
    for _ in range(5):
        before = direct(upstream, path, body, behaviour, method)
        answer = someone.ask(method, path, content=body, headers=behaviour)
        after = direct(upstream, path, body, behaviour, method)
        if before.content == after.content and before.headers["date"] == after.headers["date"]:
            return answer, before
    raise AssertionError("every call took longer than a second")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/api/chat", CHAT, id="chat, NDJSON"),
        pytest.param("/api/chat", {**CHAT, "stream": False}, id="chat, JSON"),
        pytest.param("/api/generate", GENERATE, id="generate, NDJSON"),
        pytest.param("/api/embed", EMBED, id="embed"),
        pytest.param("/v1/chat/completions", CHAT, id="v1 chat, JSON"),
        pytest.param("/v1/chat/completions", ASKED, id="v1 chat, SSE with usage"),
        pytest.param("/v1/completions", GENERATE, id="v1 completions"),
        pytest.param("/v1/embeddings", EMBED, id="v1 embeddings"),
    ],
)
@pytest.mark.parametrize("form", [{}, {"crlf": True, "comments": True, "spaces": True}])
def test_request_answer_and_headers_pass_as_they_are(
    gateway: Gateway, path: str, body: Json, form: Json
) -> None:
    sent = json.dumps(body, indent=3, ensure_ascii=False).encode()
    told = {**says(headers={"x-own": "kept", "server": "stand-in"}, **form), "user-agent": "me/1"}
    answer, alone = both(gateway.someone(), path, sent, told)
    assert answer.content == alone.content
    assert gateway.seen(answer).body == sent
    added = {name: v for name, v in answer.headers.items() if name not in alone.headers}
    assert added.keys() == {"x-request-id"}
    hop_by_hop = ("connection", "transfer-encoding")
    for name, value in alone.headers.items():
        assert name in hop_by_hop or answer.headers[name] == value


def test_the_upstream_sees_the_clients_headers_and_few_more(gateway: Gateway) -> None:
    mine = {"user-agent": "me/1", "accept": "*/*", "x-custom": "kept", "content-type": "text/plain"}
    answer = gateway.someone().post("/v1/chat/completions", CHAT, headers=mine)
    got = {name.lower(): value for name, value in gateway.seen(answer).headers}
    for name in ("user-agent", "accept", "x-custom"):
        assert got.pop(name) == mine[name]
    assert got.pop("content-type") == "application/json"  # as it was read
    assert got.pop("host") == "127.0.0.1"  # or Ollama refuses
    assert got.pop("x-request-id") == answer.headers["x-request-id"]
    about_the_client = {"x-forwarded-for", "x-forwarded-proto", "x-envoy-external-address"}
    assert got.keys() <= {"content-length", *about_the_client}


def without_usage_event(stream: bytes) -> bytes:
    events = stream.split(b"\n\n")
    return b"\n\n".join(event for event in events if b'"choices":[]' not in event)


@pytest.mark.parametrize("flavour", ["ollama", "openai", "llamacpp", "bare", "cumulative"])
@pytest.mark.parametrize("form", [{}, {"write_size": 1}, {"chunks_per_write": 100}])
def test_usage_nobody_asked_for_is_asked_and_taken_out_again(
    gateway: Gateway, flavour: str, form: Json
) -> None:
    someone, told = gateway.someone(), says(flavour=flavour, **form)
    sent = b'{"model":"smollm2",  "stream": true, "seed":9007199254740993,"messages":["\xc3\xa9"]}'
    spliced = b'{"stream_options":{"include_usage":true},' + sent[1:]
    for _ in range(5):
        before = direct(gateway.upstream, "/v1/chat/completions", spliced, told)
        answer = someone.post("/v1/chat/completions", sent, headers=told)
        after = direct(gateway.upstream, "/v1/chat/completions", spliced, told)
        if before.content == after.content:
            break
    assert gateway.seen(answer).body == spliced
    assert answer.content == without_usage_event(before.content)
    assert b"[DONE]" in answer.content


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(b"null", b'{"include_usage":true}', id="null"),
        pytest.param(b"{}", b'{"include_usage":true}', id="empty"),
        pytest.param(b'{ "a" :1}', b'{"include_usage":true, "a" :1}', id="others beside it"),
        pytest.param(b'{"include_usage": false }', b'{"include_usage": true }', id="declined"),
        pytest.param(b'{"include_usage":null}', b'{"include_usage":true}', id="null inside"),
    ],
)
def test_only_the_few_bytes_that_ask_for_usage_change(
    gateway: Gateway, options: bytes, expected: bytes
) -> None:
    head, tail = (
        b'{"stream":true,"big":123456789012345678901,"stream_options" : ',
        b' ,"model":"smollm2"}',
    )
    answer = gateway.someone().post(
        "/v1/chat/completions",
        head + options + tail,
        headers=says(flavour="openai"),
    )
    assert answer.status_code == 200
    got = gateway.seen(answer).body
    assert got == head + expected + tail


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/api/chat", CHAT, id="NDJSON"),
        pytest.param("/v1/chat/completions", SSE, id="SSE"),
        pytest.param("/v1/chat/completions", ASKED, id="SSE with usage"),
    ],
)
def test_each_of_twenty_chunks_reaches_the_client_before_the_next_is_sent(
    gateway: Gateway, path: str, body: Json
) -> None:
    someone = gateway.someone()
    for sent in range(1, 21):
        told = says(tokens=20, hold_at=sent, gate=f"{path}{sent}", flavour="ollama")
        with someone.stream(path, body, headers=told) as answer:
            lines = (line for line in answer.iter_lines() if line)
            got = [next(lines) for _ in range(sent)]  # the upstream will not send more
            assert f"w{sent - 1} " in got[-1]
            gateway.upstream.release(f"{path}{sent}")
            assert len(list(lines)) >= 20 - sent


def test_the_status_line_passes_before_the_first_chunk(gateway: Gateway) -> None:
    told = says(early_headers=True, hold_at=0)
    with gateway.someone().stream("/v1/chat/completions", SSE, headers=told) as answer:
        assert answer.status_code == 200
        gateway.upstream.release()
        assert b"[DONE]" in answer.read()


def test_time_to_the_first_token_is_measured(gateway: Gateway) -> None:
    someone = gateway.someone()
    slow = gateway.row(someone.post("/v1/chat/completions", SSE, headers=says(delay=0.3)))
    assert 0.3 <= slow["time_to_first_token"] <= slow["request_duration"]
    stream = gateway.row(someone.post("/api/chat", CHAT, headers=says(gap=0.05, tokens=8)))
    assert stream["time_to_first_token"] < 0.3 < stream["request_duration"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda s: s.get("/"),
        lambda s: s.get("/healthz"),
        lambda s: s.gateway.http.get("/"),
        lambda s: s.gateway.http.get("/healthz"),
    ],
    ids=["/", "/healthz", "/ without a key", "/healthz without a key"],
)
def test_root_and_health_are_open(
    gateway: Gateway, ask: Callable[[Someone], httpx.Response]
) -> None:
    answer = ask(gateway.someone())
    assert answer.status_code == 200
    assert answer.headers["x-request-id"]
    assert not gateway.upstream.requests


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
@pytest.mark.parametrize("path", ["/metrics", "/models", "/api", "/v1", "/healthzz", "/x"])
def test_everything_else_is_404(gateway: Gateway, method: str, path: str) -> None:
    answer = gateway.someone().ask(method, path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    assert method == "HEAD" or answer.json()["error"]["code"] == "unknown_endpoint"
    assert not gateway.upstream.requests


def test_reading_about_models_is_free(gateway: Gateway) -> None:
    someone = gateway.someone(tokens=0, requests=0)
    for path in ("/api/tags", "/api/version", "/api/ps", "/v1/models"):
        answer = someone.get(path)
        assert answer.status_code == 200
        assert gateway.row(answer)["tokens_used"] == 0
    assert someone.post("/api/show", {"model": "smollm2"}).status_code == 200


def test_no_text_is_stored(gateway: Gateway) -> None:
    answer = gateway.someone().post("/api/chat", CHAT)
    assert PROMPT not in str(gateway.row(answer))
    for file in gateway.folder.glob("parallama.db*"):
        assert PROMPT.encode() not in file.read_bytes()
        assert b"w0 w1" not in file.read_bytes()


BOUND = 1.0  # seconds until an upstream is hung up on


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("chunk", [0, 3], ids=["before its answer", "within it"])
@pytest.mark.parametrize("stream", [True, False], ids=["a stream", "one piece"])
def test_a_client_that_leaves_is_told_to_the_upstream_at_once(
    gateway: Gateway, upstream: StandIn, path: str, chunk: int, stream: bool
) -> None:
    """So that it stops to generate."""
    someone = gateway.someone()
    body = json.dumps({**CHAT, "stream": stream, "max_tokens": 9}).encode()
    told = says(tokens=9, hold_at=chunk, gate="never")
    head = "".join(f"{k}: {v}\r\n" for k, v in (someone.headers | told).items())
    with socket.create_connection(gateway.address, timeout=PATIENCE) as client:
        client.sendall(
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{head}\r\n".encode()
            + body
        )
        upstream.wait(lambda seen: seen.held, PATIENCE)
    left = time.monotonic()
    upstream.wait(lambda seen: seen.client_gone, PATIENCE)
    assert time.monotonic() - left < BOUND


def test_heads_are_answered(gateway: Gateway) -> None:
    someone = gateway.someone()
    for path in ("/", "/ollama/", "/api/version", "/api/tags", "/ollama/api/tags"):
        answer = someone.ask("HEAD", path)
        assert answer.status_code == 200
        assert answer.content == b""


def test_a_model_is_deleted_by_a_body(gateway: Gateway, upstream: StandIn) -> None:
    operator = gateway.someone(role=Role.OPERATOR)
    for name in ("model", "name"):
        body = {name: upstream.models[-1]}
        answer = operator.ask("DELETE", "/api/delete", json=body)
        assert answer.status_code == 200
        assert gateway.seen(answer).json() == body
    assert not upstream.models
