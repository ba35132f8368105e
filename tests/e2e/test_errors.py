"""Every refusal, in every dialect, as its clients meet it: on the wire, and as their exception."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPResponse
from typing import Any

import httpx
import ollama
import openai
import pytest

from parallama.limits import Window
from parallama.roles import Role
from parallama.supervisor.envoy_files import packaged
from tests.e2e.gateway import PATIENCE, Gateway, Json, Someone, free_port, running, says, until
from tests.standin import StandIn

MODELS = ("smollm2", "secret")
PARALLEL = 2
MB = 1 << 20

OLLAMA, OPENAI, ANTHROPIC = "ollama", "openai", "anthropic"
PATHS = {
    OLLAMA: ["/api/chat", "/ollama/api/chat"],
    OPENAI: ["/v1/chat/completions", "/ollama/v1/chat/completions", "/v1/responses"],
    ANTHROPIC: ["/v1/messages", "/openai/v1/messages", "/ollama/v1/messages"],
}
WHERE = [(dialect, path) for dialect, paths in PATHS.items() for path in paths]

ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 405: "invalid_request_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "rate_limit_error", 431: "invalid_request_error",
    503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
OPENAI_TYPES = {403: "permission_error", 503: "server_error", 504: "server_error"}


def body_of(path: str, model: str = "smollm2") -> Json:
    asked: Json = {"model": model, "stream": False, "max_tokens": 5}
    if path.endswith("/responses"):
        return {**asked, "input": "hi"}
    return {**asked, "messages": [{"role": "user", "content": "hi"}]}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


Ask = Callable[[Gateway, str], Answer]


@dataclass(frozen=True)
class Refusal:
    """
    How it is provoked, and what has to come of it. `code` is OpenAI's. `early`: before Envoy gave
    the request an id; `blind`: before it knows its path, whose dialect is taken for OpenAI's then;
    `slow`: tried at one path of each dialect.
    """

    name: str
    ask: Ask = field(repr=False)
    status: int
    code: str
    retry_after: bool = False
    early: bool = False
    blind: bool = False
    slow: bool = False


def plain(answer: httpx.Response) -> Answer:
    return Answer(answer.status_code, dict(answer.headers), answer.content)


def post(someone: Someone, path: str, **more: Any) -> Answer:
    return plain(someone.post(path, body_of(path), **more))


def with_key(token: str) -> Ask:
    def ask(gateway: Gateway, path: str) -> Answer:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return plain(gateway.http.post(path, json=body_of(path), headers=headers))

    return ask


def by(**someone: Any) -> Ask:
    """A call of somebody new, who is like that."""
    return lambda gateway, path: post(gateway.someone(**someone), path)


def of_model(name: str, **someone: Any) -> Ask:
    return lambda gateway, path: plain(gateway.someone(**someone).post(path, body_of(path, name)))


def sending(body: bytes, **headers: str) -> Ask:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda gateway, path: plain(gateway.someone().post(path, body, headers=named))


def the_second_time(**someone: Any) -> Ask:
    def ask(gateway: Gateway, path: str) -> Answer:
        whoever = gateway.someone(**someone)
        assert post(whoever, path).status == 200
        return post(whoever, path)

    return ask


def elsewhere(method: str, tail: str) -> Ask:
    return lambda gateway, path: plain(gateway.someone().ask(method, path + tail))


def raw(tail: str = "", **headers: str) -> Ask:
    named = {name.replace("__", "-"): value for name, value in headers.items()}

    def ask(gateway: Gateway, path: str) -> Answer:
        return Answer(*gateway.raw("GET", path + tail, headers=gateway.someone().headers | named))

    return ask


def upstream(**behaviour: Any) -> Ask:
    return lambda gateway, path: post(gateway.someone(), path, headers=says(**behaviour))


def when_full(gateway: Gateway, path: str) -> Answer:
    server, gate = gateway.upstream, f"full {path}"
    someone = gateway.someone()
    with ThreadPoolExecutor(PARALLEL) as threads:
        held = says(hold_at=0, gate=gate)
        busy = [threads.submit(post, someone, path, headers=held) for _ in range(PARALLEL)]
        until(lambda: sum(seen.held for seen in server.requests) == PARALLEL)
        answer = post(someone, path)
        server.release(gate)
        assert [each.result().status for each in busy] == [200] * PARALLEL
    return answer


def too_large(gateway: Gateway, path: str) -> Answer:
    someone = gateway.someone()
    body = json.dumps(body_of(path)).encode()
    return plain(someone.post(path, body[:-1] + b',"x":"' + b"x" * (33 * MB) + b'"}'))


def of_another_gateway(gateway: Gateway, path: str) -> Answer:
    """A prefix says which it is; what has none is Ollama's under /api, else OpenAI's."""
    ollamas = path.startswith(("/ollama/", "/api/"))
    return post(gateway.someone(gateways=["openai" if ollamas else "ollama"]), path)


REFUSALS = [
    Refusal("no key", with_key(""), 401, "invalid_api_key"),
    Refusal("a word as key", with_key("hello"), 401, "invalid_api_key"),
    Refusal("an unknown key", with_key("plm_" + "A" * 12 + "_" + "B" * 49), 401, "invalid_api_key"),
    Refusal("an expired key", by(expired=True), 401, "invalid_api_key"),
    Refusal("a role that may not", by(role=Role.READONLY), 403, "permission_denied"),
    Refusal("another network", by(networks=["10.9.9.9/32"]), 403, "permission_denied"),
    Refusal("another gateway", of_another_gateway, 403, "permission_denied"),
    Refusal("a hidden model", of_model("secret", models=["smollm2"]), 404, "model_not_found"),
    Refusal("no such endpoint", elsewhere("POST", "/nothing"), 404, "unknown_endpoint"),
    Refusal("no such method", elsewhere("PUT", ""), 405, "method_not_allowed"),
    Refusal("no body", sending(b""), 400, "missing_body"),
    Refusal("no JSON", sending(b"{"), 400, "invalid_json"),
    Refusal("no model", sending(b'{"messages":[]}'), 400, "model_required"),
    Refusal("gzip", sending(b"x", content_encoding="gzip"), 415, "unsupported_encoding"),
    Refusal("too large", too_large, 413, "request_too_large", slow=True),
    Refusal("too fast", the_second_time(requests=1, window=Window.MINUTE), 429,
            "rate_limit_exceeded", retry_after=True),
    Refusal("nothing left", the_second_time(requests=1, window=Window.DAY), 429,
            "insufficient_quota", retry_after=True),
    Refusal("too many headers", raw(**{f"x__{n}": "1" for n in range(120)}), 431,
            "headers_too_large", blind=True),
    Refusal("underscores", raw(x_user="admin"), 400, "bad_request", blind=True),
    Refusal("escaped slashes", raw("/%2e%2e%2f"), 400, "bad_request", early=True),
    Refusal("it broke off", upstream(cut_before=True), 503, "upstream_unavailable",
            retry_after=True),
    Refusal("it is silent", upstream(hold_at=0, gate="never"), 504, "upstream_timeout", slow=True),
    Refusal("it is full", when_full, 503, "upstream_busy", retry_after=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose patience is short."""
    folder = tmp_path_factory.mktemp("errors")
    own = folder / "own"
    shutil.copytree(packaged(), own)
    text = (own / "envoy.yaml").read_text()
    (own / "envoy.yaml").write_text(text.replace("timeout: 5s", "timeout: 1s"))
    environ = {
        "PARALLAMA_API_GATEWAYS__OLLAMA__MAX_PARALLEL": str(PARALLEL),
        "PARALLAMA_API_GATEWAYS__OLLAMA__SILENCE_SECONDS": "1",
    }
    with (
        StandIn(port=free_port(), models=MODELS) as server,
        running(
            folder, server, environ=environ, settings=f"envoy: {{dir: {own}}}\n", complaints=True
        ) as gateway,
    ):
        yield gateway


@pytest.fixture
def gateway(shared: Gateway) -> Gateway:
    shared.upstream.reset()
    return shared


def check(answer: Answer, dialect: str, wanted: Refusal) -> str:
    """Everything about its form; returns what it says."""
    assert answer.status == wanted.status, answer.body
    assert answer.headers["content-type"] == "application/json"
    request_id = answer.headers["x-request-id"]
    assert request_id
    assert ("retry-after" in answer.headers) is wanted.retry_after
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert ("www-authenticate" in answer.headers) is (wanted.status == 401)
    assert b"\n" not in answer.body.strip()
    told = json.loads(answer.body)
    if dialect == OLLAMA:
        assert told.keys() == {"error"}
        return str(told["error"])
    error = told["error"]
    if dialect == OPENAI:
        assert told.keys() == {"error"}
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == wanted.code
        odd = wanted.code == "bad_request"
        kind = OPENAI_TYPES.get(wanted.status * (not odd), "invalid_request_error")
        assert error["type"] == (wanted.code if wanted.status == 429 else kind)
        return str(error["message"])
    assert told["type"] == "error"
    assert error.keys() == {"type", "message"}
    assert error["type"] == ANTHROPIC_TYPES[wanted.status]
    if not wanted.early:
        assert told["request_id"] == request_id == answer.headers["request-id"]
    return str(error["message"])


@pytest.mark.parametrize("wanted", REFUSALS, ids=lambda wanted: wanted.name)
def test_a_refusal_in_every_dialect(gateway: Gateway, wanted: Refusal) -> None:
    everywhere = [(dialect, paths[0]) for dialect, paths in PATHS.items()]
    for dialect, path in everywhere if wanted.slow else WHERE:
        heard = OPENAI if wanted.blind else dialect
        sentence = check(wanted.ask(gateway, path), heard, wanted)
        assert len(sentence) > 10


# Parts of the gateway, and the server behind, that are away.


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def away(server: StandIn) -> Iterator[None]:
    server.__exit__(None, None, None)
    try:
        yield
    finally:
        server.__enter__()


@pytest.mark.parametrize("service", ["authz", "ratelimit"])
def test_a_service_that_is_away(gateway: Gateway, service: str) -> None:
    someone = gateway.someone()
    wanted = Refusal(service, by(), 503, "service_unavailable", retry_after=True)
    with stopped(gateway.child(service)), ThreadPoolExecutor(len(WHERE)) as threads:
        answers = list(threads.map(lambda at: post(someone, at[1]), WHERE))
    for answer, (dialect, _) in zip(answers, WHERE, strict=True):
        assert "cannot check" in check(answer, dialect, wanted)
    until(lambda: post(someone, "/api/chat").status == 200)


def test_a_server_that_is_away(gateway: Gateway) -> None:
    someone = gateway.someone()
    wanted = Refusal("away", by(), 503, "upstream_unavailable", retry_after=True)
    with away(gateway.upstream):
        for dialect, path in WHERE:
            assert "cannot be reached" in check(post(someone, path), dialect, wanted)
    until(lambda: post(someone, "/api/chat").status == 200)


@pytest.mark.parametrize("path", ["/nothing", "/v2/x", "/api", "/V1/models"])
def test_what_is_nowhere(gateway: Gateway, path: str) -> None:
    wanted = Refusal("nowhere", by(), 404, "unknown_endpoint")
    answer = plain(gateway.http.get(path))
    assert "/api/" in check(answer, OPENAI, wanted)


NO_REQUESTS = {
    "HTTP/1.0": ("GET /v1/models HTTP/1.0\r\nhost: x\r\n\r\n", 426),
    "another coding": ("POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: x\r\n\r\n", 501),
    "an upgrade": (
        "GET /v1/x HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 403
    ),
    "a tunnel": ("CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n", 404),
    "no HTTP": ("HELLO\r\n\r\n", 400),
    "no host": ("GET /v1/models HTTP/1.1\r\n\r\n", 400),
    "two lengths": (
        "POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n"
        "transfer-encoding: chunked\r\n\r\n", 400,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_REQUESTS)
def test_what_is_no_request_is_told_so(gateway: Gateway, what: str) -> None:
    sent, status = NO_REQUESTS[what]
    with socket.create_connection(gateway.address, timeout=PATIENCE) as client:
        client.sendall(sent.encode())
        with HTTPResponse(client) as answer:
            answer.begin()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            found = Answer(answer.status, headers, answer.read())
    check(found, OPENAI, Refusal(what, by(), status, "bad_request"))


# What people see who use an SDK.


SENTENCES = {
    "a word as key": ("AuthenticationError", "API key"),
    "a role that may not": ("PermissionDeniedError", "readonly"),
    "a hidden model": ("NotFoundError", "secret"),
    "no such model": ("NotFoundError", "nobody"),
    "too fast": ("RateLimitError", "per minute"),
    "nothing left": ("RateLimitError", "per day"),
    "it broke off": ("InternalServerError", "cannot be reached"),
}


def somebody(gateway: Gateway, name: str) -> tuple[str, str, dict[str, str]]:
    """A key, a model and headers for which this will happen."""
    match name:
        case "a word as key":
            return "hello", "smollm2", {}
        case "a role that may not":
            return gateway.someone(role=Role.READONLY).token, "smollm2", {}
        case "a hidden model":
            return gateway.someone(models=["smollm2"]).token, "secret", {}
        case "no such model":
            return gateway.someone().token, "nobody", {}
        case "too fast":
            return gateway.someone(requests=0, window=Window.MINUTE).token, "smollm2", {}
        case "nothing left":
            return gateway.someone(requests=0, window=Window.DAY).token, "smollm2", {}
    return gateway.someone().token, "smollm2", says(cut_before=True)


@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("stream", [False, True])
def test_openais_sdk(gateway: Gateway, name: str, stream: bool) -> None:
    kind, said = SENTENCES[name]
    key, model, headers = somebody(gateway, name)
    with (
        openai.OpenAI(
            api_key=key, base_url=f"{gateway.url}/v1", max_retries=0, default_headers=headers
        ) as client,
        pytest.raises(getattr(openai, kind)) as caught,
    ):
        client.chat.completions.create(
            model=model, stream=stream, messages=[{"role": "user", "content": "hi"}]
        )
    assert said in caught.value.message
    assert caught.value.request_id


@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_sdk(gateway: Gateway, name: str, stream: bool) -> None:
    import anthropic  # more than a second, which who only collects need not wait

    kind, said = SENTENCES[name]
    key, model, headers = somebody(gateway, name)
    with (
        anthropic.Anthropic(
            api_key=key, base_url=gateway.url, max_retries=0, default_headers=headers
        ) as client,
        pytest.raises(getattr(anthropic, kind)) as caught,
    ):
        client.messages.create(
            model=model, max_tokens=5, stream=stream, messages=[{"role": "user", "content": "hi"}]
        )
    assert said in str(caught.value)
    assert caught.value.request_id


@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("stream", [False, True])
def test_ollamas_sdk(gateway: Gateway, name: str, stream: bool) -> None:
    _, said = SENTENCES[name]
    key, model, headers = somebody(gateway, name)
    client = ollama.Client(
        host=gateway.url, headers={"authorization": f"Bearer {key}", **headers}, timeout=PATIENCE
    )
    with ExitStack() as stack:
        stack.callback(client._client.close)
        caught = stack.enter_context(pytest.raises(ollama.ResponseError))
        answer = client.chat(model, [{"role": "user", "content": "hi"}], stream=stream)
        list(answer)
    assert said in caught.value.error
