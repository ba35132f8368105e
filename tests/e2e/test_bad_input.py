"""Bodies, paths and methods that are wrong: a refusal in the caller's dialect, and no harm."""

import gzip
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.e2e.gateway import CHAT, EMBED, GENERATE, PATIENCE, Gateway, Someone
from tests.standin import StandIn

PATHS = ["/api/chat", "/v1/chat/completions", "/ollama/api/chat", "/ollama/v1/chat/completions"]
MB = 1 << 20


def check_refusal(answer: httpx.Response, status: int) -> str:
    """The sentence of a refusal in the dialect of its path."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    if "/api/" in answer.request.url.path:
        assert isinstance(error, str)
        return error
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return str(error["message"])


TEXT = json.dumps(CHAT)
WRONG = {
    "empty": b"",
    "white space": b" \n\t ",
    "a word": b"hello",
    "null": b"null",
    "an array": b"[]",
    "a string": b'"model"',
    "truncated in a string": TEXT[:-20].encode(),
    "truncated before its end": TEXT[:-1].encode(),
    "two objects": (TEXT + TEXT).encode(),
    "no colon": b'{"model" "smollm2"}',
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16 without a mark": TEXT.encode("utf-16-be"),
    "a byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "a model that is no UTF-8": b'{"model":"smollm2\xff\xfe","messages":[1]}',
    "half a pair in the model": b'{"model":"\\ud800","messages":[1]}',
    "gzip that nobody announced": gzip.compress(TEXT.encode()),
    "a form": b"model=smollm2&prompt=x",
    "no model": b'{"messages":[1]}',
    "an empty model": b'{"model":"","messages":[1]}',
    "a very long model": b'{"model":"%b","messages":[1]}' % (b"x" * 300),
    "a model twice": b'{"model":"smollm2","model":"smollm2"}',
    "a stream that is a word": b'{"model":"smollm2","stream":"yes","messages":[1]}',
    "no whole number": b'{"model":"smollm2","max_tokens":1.5,"options":{"num_predict":1.5}}',
    "deep nesting, not closed": b'{"model":"smollm2","x":' + b"[" * 100_000,
    "very many keys": b'{"model":"smollm2"' + b',"x":1' * 100_000 + b"}",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_body_is_refused_in_the_callers_dialect(
    gateway: Gateway, upstream: StandIn, path: str
) -> None:
    someone = gateway.someone(tokens=100_000)
    for name, body in WRONG.items():
        answer = someone.post(path, body)
        message = check_refusal(answer, 400)
        assert len(message) > 10, name
        row = gateway.row(answer) if name == "empty" else None
        assert row is None or (row["status_code"], row["tokens_used"]) == (400, 0)
    assert not upstream.requests
    someone.expect_spent(0, limit=100_000)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "x-gzip", "identity, gzip"])
def test_a_compressed_body_is_refused(
    gateway: Gateway, upstream: StandIn, path: str, encoding: str
) -> None:
    answer = gateway.someone().post(
        path, gzip.compress(TEXT.encode()), headers={"content-encoding": encoding}
    )
    assert "uncompressed" in check_refusal(answer, 415)
    assert not upstream.requests


@pytest.mark.parametrize("path", PATHS)
def test_a_body_without_a_length_is_read_like_any_other(
    gateway: Gateway, upstream: StandIn, path: str
) -> None:
    sent = json.dumps({**CHAT, "stream": True}).encode()
    someone = gateway.someone(models=["smollm2"])
    answer = someone.ask("POST", path, content=iter([sent[:10], sent[10:]]))
    assert answer.status_code == 200
    row = gateway.row(answer)
    assert row["completion_tokens"] == gateway.seen(answer).emitted
    upstream.reset()
    hidden = sent.replace(b"smollm2", b"secret")
    assert someone.ask("POST", path, content=iter([hidden])).status_code == 404
    assert someone.ask("POST", path, content=iter([b"", b"{"])).status_code == 400
    assert not upstream.requests


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("length", [True, False], ids=["length told", "length not told"])
def test_a_body_of_33_mb_is_too_large(
    gateway: Gateway, upstream: StandIn, path: str, length: bool
) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"model":"smollm2","messages":["'
        for _ in range(33):
            yield b"x" * MB
        yield b'"]}'

    someone = gateway.someone(tokens=100_000_000)
    # The key is known: while it is being checked, Envoy stops reading a body without a length.
    assert someone.ask("GET", "/v1/models").status_code == 200
    upstream.reset()
    content = b"".join(pieces()) if length else pieces()
    answer = someone.ask("POST", path, content=content)
    assert "too large" in check_refusal(answer, 413)
    if path.startswith("/v1"):
        assert answer.json()["error"]["code"] == "request_too_large"
    assert not upstream.requests
    someone.expect_spent(0, limit=100_000_000)
    assert gateway.row(answer)["status_code"] == 413


@pytest.mark.parametrize("path", PATHS[:2])
def test_a_body_of_31_mb_passes_unchanged(gateway: Gateway, path: str) -> None:
    image = "A" * (31 * MB)
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}]
    body = json.dumps({**CHAT, "messages": [{"role": "user", "content": content}]}).encode()
    answer = gateway.someone().post(path, body)
    assert answer.status_code == 200
    assert gateway.seen(answer).body == body
    assert gateway.row(answer)["tokens_used"] > 0


def test_nobody_without_a_key_makes_the_gateway_hold_a_body(gateway: Gateway) -> None:
    """The refusal comes after the headers, not after 30 MB."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (
        30 * MB
    )
    with socket.create_connection(gateway.address, timeout=PATIENCE) as client:
        client.sendall(head + b"{")
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("path", PATHS[:2])
def test_a_client_that_leaves_in_the_middle_of_its_body_costs_nothing(
    gateway: Gateway, upstream: StandIn, path: str
) -> None:
    someone = gateway.someone(tokens=1000)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {someone.token}\r\n"
        "content-length: 1000\r\n\r\n{"
    )
    with socket.create_connection(gateway.address, timeout=PATIENCE) as client:
        client.sendall(head.encode())
    someone.expect_spent(0, limit=1000)
    assert not [seen for seen in upstream.requests if seen.path == path]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", CHAT), ("/api/generate", GENERATE), ("/api/embed", EMBED),
        ("/api/show", {"model": "smollm2"}), ("/v1/chat/completions", CHAT),
        ("/v1/completions", GENERATE), ("/v1/embeddings", EMBED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_curl_with_data_alone_works(
    gateway: Gateway, path: str, body: dict[str, object], kind: str | None
) -> None:
    """`curl -d` says that it sends a form."""
    headers = gateway.someone().headers | ({"content-type": kind} if kind else {})
    sent = json.dumps(body).encode()
    status, answered, _ = gateway.raw("POST", path, sent, headers)
    assert status == 200
    request_id = answered["x-request-id"]
    if path == "/api/show":
        return  # the catalog asks with a type of its own
    seen = gateway.upstream.wait(lambda seen: seen.header("x-request-id") == request_id)
    assert seen.header("content-type") == "application/json"
    assert seen.body == sent


UNKNOWN_PATHS = [
    ("GET", "/api/unknown"), ("POST", "/api/signout"), ("POST", "/api/me"), ("GET", "/v1/files"),
    ("POST", "/v1/audio/transcriptions"), ("GET", "/v1/models/"), ("GET", "/v1/responses/x"),
    ("POST", "/ollama/api/experimental/web_search"), ("GET", "/openai/v1/unknown"),
    ("DELETE", "/api/user/keys/x"), ("GET", "/api/"), ("GET", "/v1/"),
    ("POST", "/api/experimental/web_fetch"), ("GET", "/api/experimental/model-recommendations"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), UNKNOWN_PATHS)
def test_an_unknown_path_is_404(
    gateway: Gateway, upstream: StandIn, method: str, path: str
) -> None:
    answer = gateway.someone().ask(method, path)
    check_refusal(answer, 404)
    assert not upstream.requests


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/chat"), ("PUT", "/api/chat"), ("DELETE", "/v1/chat/completions"),
        ("POST", "/api/tags"), ("PATCH", "/v1/models"), ("OPTIONS", "/api/generate"),
        ("GET", "/api/delete"), ("POST", "/api/delete"), ("POST", "/api/version"),
    ],
)  # fmt: skip
def test_a_wrong_method_is_405(gateway: Gateway, upstream: StandIn, method: str, path: str) -> None:
    answer = gateway.someone().ask(method, path)
    check_refusal(answer, 405)
    assert not upstream.requests


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "BREW", "GET "])
def test_a_method_that_is_none_does_no_harm(
    gateway: Gateway, upstream: StandIn, method: str
) -> None:
    with socket.create_connection(gateway.address, timeout=PATIENCE) as client:
        client.sendall(f"{method} /api/tags HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        assert client.recv(65536).split(b" ")[1] in (b"400", b"401", b"403", b"404", b"405")
    assert not upstream.requests


NOT_HTTP = {
    "escaped slashes": ("%2e%2e%2fv1", {}),
    "a header with an underscore": ("version", {"x_user": "admin"}),
    "too many headers": ("version", {f"x-{n}": "1" for n in range(120)}),
    "too large a header": ("version", {"x": "y" * 100_000}),
}


@pytest.mark.parametrize("what", NOT_HTTP)
def test_what_envoy_itself_refuses_is_refused_in_the_dialect(
    gateway: Gateway, upstream: StandIn, what: str
) -> None:
    """Headers that are refused before the path is looked at get OpenAI's form everywhere."""
    tail, more = NOT_HTTP[what]
    headers = gateway.someone().headers | more
    for prefix, kind in (("/api/", str), ("/v1/", dict), ("/ollama/api/", str)):
        status, answered, body = gateway.raw("GET", prefix + tail, headers=headers)
        assert status in (400, 431)
        assert answered["content-type"] == "application/json"
        assert isinstance(json.loads(body)["error"], dict if more else kind)
    assert not upstream.requests


@pytest.mark.parametrize("what", NOT_HTTP)
def test_what_envoy_itself_refuses_has_a_request_id(gateway: Gateway, what: str) -> None:
    tail, more = NOT_HTTP[what]
    _, answered, _ = gateway.raw("GET", f"/v1/{tail}", headers=gateway.someone().headers | more)
    assert answered.get("x-request-id")


def test_many_wrong_and_right_calls_together_do_not_disturb_each_other(gateway: Gateway) -> None:
    someone = gateway.someone()

    def one(number: int) -> tuple[Someone, httpx.Response]:
        body = list(WRONG.values())[number % len(WRONG)] if number % 2 else TEXT.encode()
        return someone, someone.post("/v1/chat/completions", body)

    with ThreadPoolExecutor(10) as threads:
        answers = [answer for _, answer in threads.map(one, range(60))]
    assert [a.status_code for a in answers] == [200, 400] * 30
