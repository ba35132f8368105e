"""No spelling of a request reaches a model that its key may not use; lists show what it may."""

import gzip
import json
import socket
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from parallama.roles import Role
from tests.e2e.gateway import PATIENCE, Gateway, Json, Someone, free_port, running, until
from tests.standin import Behaviour, StandIn

ALLOWED = ["smollm2"]
TO_V1, TO_CHAT, TO_GENERATE = "/v1/chat/completions", "/api/chat", "/api/generate"
MESSAGES = b'"messages":[{"role":"user","content":"x"}],"prompt":"x","input":"x"'

# What the body says beside its messages; `secret` is forbidden.
SPELLINGS = {
    "the forbidden model": b'"model":"secret"',
    "another case": b'"Model":"secret"',
    "upper case": b'"MODEL":"secret"',
    "another case after": b'"model":"smollm2","Model":"secret"',
    "another case before": b'"Model":"secret","model":"smollm2"',
    "twice": b'"model":"smollm2","model":"secret"',
    "twice, the other way": b'"model":"secret","model":"smollm2"',
    "an escape in the key": b'"mo\\u0064el":"secret"',
    "an escape in a second key": b'"model":"smollm2","mo\\u0064el":"secret"',
    "an escape in an odd case": b'"model":"smollm2","\\u004dodel":"secret"',
    "an escape in the name": b'"model":"s\\u0065cret"',
    "a slash escaped": b'"model":"library\\/secret"',
    "a broken escape in a key": b'"model":"smollm2","\\ud800model":"secret"',
    "a zero in the name": b'"model":"smollm2\\u0000secret"',
    "a raw control character": b'"model":"smollm2\x01"',
    "a space behind": b'"model":"secret "',
    "the tag": b'"model":"secret:latest"',
    "the allowed one with its tag": b'"model":"smollm2:latest"',
    "the name's case": b'"model":"SECRET"',
    "the allowed one's case": b'"model":"SmolLM2"',
    "the namespace": b'"model":"library/secret"',
    "host and namespace": b'"model":"registry.ollama.ai/library/secret:latest"',
    "a scheme": b'"model":"https://registry.ollama.ai/library/secret"',
    "a path": b'"model":"smollm2/../secret"',
    "a comma": b'"model":"smollm2,secret"',
    "a star": b'"model":"*"',
    "an array": b'"model":["smollm2","secret"]',
    "a number": b'"model":1',
    "null and then the name": b'"model":null,"name":"secret"',
    "a name beside it": b'"model":"smollm2","name":"secret"',
    "a name alone": b'"name":"secret"',
    "a name in another case": b'"model":"smollm2","Name":"secret"',
    "an empty model and a name": b'"model":"","name":"secret"',
    "inside another object": b'"x":{"model":"smollm2"},"model":"secret"',
    "outside another object": b'"x":{"model":"secret"},"model":"smollm2"',
    "inside a string": b'"x":"\\",\\"model\\":\\"smollm2\\"","model":"secret"',
    "a string that ends in a backslash": b'"x":"\\\\","model":"secret","y":"\\\\"',
    "a comment": b'/*"model":"smollm2",*/"model":"secret"',
    "single quotes": b'\'model\':"smollm2","model":"secret"',
    "a member without quotes": b'model:"smollm2","model":"secret"',
    "a kelvin sign elsewhere": b'"model":"smollm2","\xe2\x84\xaa":1',
    "spaces in the key": b'" model":"smollm2","model":"secret"',
    "bytes that are no UTF-8": b'"model":"secret\xff"',
    "models, plural": b'"models":["smollm2"],"model":"secret"',
}

WHOLE_BODIES = {
    "two objects": b'{"model":"smollm2",%s}{"model":"secret",%s}',
    "two objects, the other way": b'{"model":"secret",%s}{"model":"smollm2",%s}',
    "a word behind": b'{"model":"smollm2",%s} x%.0s',
    "a zero behind": b'{"model":"smollm2",%s}\0%.0s',
    "a byte order mark": b'\xef\xbb\xbf{"model":"secret",%s}%.0s',
    "in an array": b'[{"model":"secret",%s}]%.0s',
    "a trailing comma": b'{"model":"secret",%s,}%.0s',
    "not closed": b'{"model":"secret",%s%.0s',
}

BODIES = {name: b"{" + text + b"," + MESSAGES + b"}" for name, text in SPELLINGS.items()} | {
    name: text % (MESSAGES, MESSAGES) for name, text in WHOLE_BODIES.items()
}
SECRET = b'{"model":"secret",' + MESSAGES + b"}"
HONEST = b'{"model":"smollm2",' + MESSAGES + b"}"


def check(upstream: StandIn, status: int) -> None:
    """Either it was refused and went nowhere, or it ran an allowed model."""
    asked = [seen for seen in upstream.asked if seen.method == "POST"]
    if status < 400:
        assert upstream.requests or asked
    for seen in upstream.requests:
        upstream.wait_ended(seen.id)
    for seen in (*upstream.requests, *asked):
        assert seen.model in (*ALLOWED, None)


@pytest.mark.parametrize(
    ("path", "flavour"),
    [
        *((path, "ollama") for path in (TO_V1, TO_CHAT, TO_GENERATE, "/api/embed", "/api/show")),
        *((path, "llamacpp") for path in (TO_V1, TO_CHAT, TO_GENERATE, "/api/embed")),
    ],
)
def test_no_spelling_of_a_body_reaches_a_forbidden_model(
    gateway: Gateway, upstream: StandIn, path: str, flavour: str
) -> None:
    someone = gateway.someone(models=ALLOWED)
    for name, body in BODIES.items():
        upstream.reset()
        told = {"x-standin": json.dumps({"flavour": flavour})}
        answer = someone.post(path, body, headers=told)
        try:
            check(upstream, answer.status_code)
        except AssertionError:
            raise AssertionError(f"{name}: {body!r}") from None
        assert answer.headers["x-request-id"]


COATS: dict[str, tuple[bytes, dict[str, str]]] = {
    "no content type": (SECRET, {"content-type": ""}),
    "plain text": (SECRET, {"content-type": "text/plain"}),
    "a form": (SECRET, {"content-type": "application/x-www-form-urlencoded"}),
    "a form in parts": (SECRET, {"content-type": "multipart/form-data; boundary=x"}),
    "another charset": (SECRET, {"content-type": "application/json; charset=utf-7"}),
    "UTF-16": (SECRET.decode().encode("utf-16"), {"content-type": "application/json"}),
    "UTF-16 without a mark": (
        SECRET.decode().encode("utf-16-le"),
        {"content-type": "application/json; charset=utf-16le"},
    ),
    "UTF-32": (SECRET.decode().encode("utf-32-be"), {"content-type": "application/json"}),
    "gzip": (gzip.compress(SECRET), {"content-encoding": "gzip"}),
    "gzip, not told": (gzip.compress(SECRET), {}),
    "told gzip": (HONEST, {"content-encoding": "gzip"}),
    "deflate": (zlib.compress(SECRET), {"content-encoding": "deflate"}),
    "zstd": (SECRET, {"content-encoding": "zstd"}),
    "two encodings": (SECRET, {"content-encoding": "identity, gzip"}),
    "another method": (SECRET, {"x-http-method-override": "GET"}),
    "another path": (SECRET, {"x-original-url": "/api/tags", "x-rewrite-url": "/api/tags"}),
    "a model in a header": (SECRET, {"x-model": "smollm2", "x-ai-eg-model": "smollm2"}),
    "metadata of ours": (SECRET, {"x-parallama-model": "smollm2", "check_model": "false"}),
}


@pytest.mark.parametrize("path", [TO_V1, TO_CHAT])
@pytest.mark.parametrize("coat", COATS)
def test_no_coding_or_header_carries_a_body_past_the_check(
    gateway: Gateway, upstream: StandIn, path: str, coat: str
) -> None:
    body, headers = COATS[coat]
    status, _, _ = gateway.raw(
        "POST", path, body, {**gateway.someone(models=ALLOWED).headers, **headers}
    )
    assert status >= 400
    assert not upstream.requests


@pytest.mark.parametrize(
    "target",
    [
        "//v1//chat/completions", "/v1/./chat/completions", "/api/../v1/chat/completions",
        "/v1/%63hat/completions", "/v1%2Fchat/completions", "/v1/chat%2fcompletions",
        "/V1/chat/completions", "/v1/chat/completions/", "/v1/chat/completions;x=1",
        "/v1/chat/completions?model=smollm2", "/v1/chat/completions?model=smollm2&model=secret",
        "/v1/chat/completions#/api/tags", "/v1/chat\\completions", "/v1/chat/completions%00",
        "/v1/chat/completions%20", "/v1/chat/completions%3Fx", "/ollama/v1/chat/completions",
        "/openai/v1/chat/completions", "/ollama//v1/chat/completions", "/ollama/ollama/v1/models/x",
        "/ollama/api/chat", "/api/chat", "/api//chat", "/api/./chat", "/api/CHAT", "/api/chat/",
        "/openai/api/chat", "/ollama/openai/v1/chat/completions", "/v1/responses", "/v1/messages",
        "/completion", "/completions", "/v1/../completion", "/infill", "/tokenize", "/props",
        "/v1/chat/completions/../../../completion", "/v1/..;/completion", "/slots", "/metrics",
        "http://elsewhere/v1/chat/completions", "*",
    ],
)  # fmt: skip
@pytest.mark.parametrize("flavour", ["ollama", "llamacpp"])
def test_no_spelling_of_a_path_goes_round_the_check(
    gateway: Gateway, upstream: StandIn, target: str, flavour: str
) -> None:
    told = {"x-standin": json.dumps({"flavour": flavour})}
    restricted = {**gateway.someone(models=ALLOWED).headers, **told}
    for body in (SECRET, b""):
        for method in ("POST", "GET", "PUT", "DELETE"):
            gateway.raw(method, target, body, restricted)
            gateway.raw(method, target, body, told)
    for seen in upstream.requests:
        assert seen.model is None
        assert seen.path in ("/v1/models", "/api/tags", "/api/version", "/api/ps")


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: %b\r\n"
GOODBYE = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        b"content-length: 0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"content-length: 0\r\ncontent-length: 5\r\n\r\n",
        b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"content-length: %d\r\n\r\n%b" % (len(HONEST), HONEST),
    ],
)
def test_no_framing_smuggles_a_second_request_past_the_check(
    gateway: Gateway, upstream: StandIn, framing: bytes
) -> None:
    head = HEAD % gateway.someone(models=ALLOWED).headers["authorization"].encode()
    inner = b"%bcontent-length: %d\r\n\r\n%b" % (head, len(SECRET), SECRET)
    got = b""
    with socket.create_connection(gateway.address, timeout=PATIENCE) as client:
        client.sendall(head + framing + inner + GOODBYE)
        # To the end, or to what Envoy says before it hangs up.
        while b"connection: close" not in got and (more := client.recv(65536)):
            got += more
    assert b"HTTP/1.1 " in got
    for seen in upstream.requests:
        upstream.wait_ended(seen.id)
        assert seen.model == "smollm2"


@pytest.mark.parametrize(
    ("patterns", "model", "allowed"),
    [
        (["smollm2"], "smollm2", True),
        (["smol*"], "smollm2", True),
        (["*"], "secret", True),
        (["smol*", "secret"], "secret", True),
        (["smollm2"], "secret", False),
        (["smol*"], "secret", False),
        (["SECRET"], "secret", False),
        (["secre"], "secret", False),
        (["ecret*"], "secret", False),
    ],
)
@pytest.mark.parametrize("path", [TO_V1, TO_CHAT])
def test_a_key_may_use_the_models_it_names(
    gateway: Gateway, path: str, patterns: list[str], model: str, allowed: bool
) -> None:
    body = SECRET.replace(b"secret", model.encode())
    answer = gateway.someone(models=patterns).post(path, body)
    assert answer.status_code == (200 if allowed else 404)


LISTS: Mapping[str, tuple[str, str]] = {
    "/v1/models": ("data", "id"),
    "/api/tags": ("models", "name"),
    "/api/ps": ("models", "model"),
    "/ollama/v1/models": ("data", "id"),
    "/openai/v1/models": ("data", "id"),
    "/ollama/api/tags": ("models", "name"),
}


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, {"smollm2", "secret"}),
        (["smollm2"], {"smollm2"}),
        (["sec*"], {"secret"}),
        (["other"], set()),
    ],
)
def test_lists_show_what_the_key_may_use(
    gateway: Gateway, path: str, patterns: list[str] | None, expected: set[str]
) -> None:
    """And nothing that a client says changes that."""
    claims = {"x-parallama-models": "*", "x-parallama-endpoint": path, "x-parallama-catalog": "1"}
    answer = gateway.someone(models=patterns).get(path, headers=claims)
    assert answer.status_code == 200
    key, name = LISTS[path]
    told = answer.json()
    assert {entry[name].removesuffix(":latest") for entry in told[key]} == expected
    assert patterns is None or "secret" in expected or "secret" not in answer.text


@pytest.mark.parametrize("path", [*LISTS, "/api/version"])
def test_with_nothing_to_hide_or_add_the_servers_own_bytes_pass(
    gateway: Gateway, upstream: StandIn, path: str
) -> None:
    someone = gateway.someone()
    alone = httpx.get(upstream.url + path.removeprefix("/ollama").removeprefix("/openai"))
    answer = someone.get(path)
    assert answer.content == alone.content
    assert answer.headers["content-type"] == alone.headers["content-type"]
    assert (answer.headers["age"], answer.headers["x-parallama-cache"]) == ("0", "fresh")
    if path in ("/api/tags", "/api/version"):
        head = someone.ask("HEAD", path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(alone.content))


def test_what_was_changed_is_seen_at_once(gateway: Gateway) -> None:
    someone = gateway.someone(role=Role.OPERATOR)
    for method, path, body, expected in (
        ("POST", "/api/copy", {"source": "smollm2", "destination": "mine"}, True),
        ("DELETE", "/api/delete", {"model": "mine"}, False),
    ):
        someone.get("/api/tags")
        assert someone.ask(method, path, json=body).status_code == 200
        until(lambda: ("mine" in someone.get("/api/tags").text) is expected, 1)  # noqa: B023


def test_mapped_names_are_listed_within_a_second(gateway: Gateway) -> None:
    someone, only = gateway.someone(), gateway.someone(models=["gpt-4"])

    def names(who: Someone, path: str) -> set[str]:
        key, name = LISTS[path]
        return {entry[name] for entry in who.get(path).json()[key]}

    gateway.cli("models", "map", "gpt-4", "secret", "--gateway", "openai")
    try:
        until(lambda: "gpt-4" in names(someone, "/v1/models"), 1)
        assert names(someone, "/v1/models") == {"smollm2:latest", "secret:latest", "gpt-4"}
        assert names(only, "/v1/models") == {"gpt-4"}
        assert "secret" not in only.get("/v1/models").text
        assert only.get("/v1/models/gpt-4").json()["id"] == "gpt-4"
        assert only.get("/v1/models/secret").status_code == 404
        assert names(only, "/api/tags") == set()
        assert "gpt-4" not in names(someone, "/ollama/v1/models")
    finally:
        gateway.cli("models", "unmap", "gpt-4", "--gateway", "openai")
    until(lambda: "gpt-4" not in names(someone, "/v1/models"), 1)


# A server that is slow, away, or lies

KEPT = (*LISTS, "/api/version")
_TROUBLES = {
    "hangs": Behaviour(hold_at=0),
    "fails": Behaviour(status=500),
    "is busy": Behaviour(status=503),
    "is broken": Behaviour(raw='{"models":[{"name":"secr'),
    "is no list": Behaviour(raw='{"models":{"secret":1},"data":"secret"}'),
    "is cut": Behaviour(cut_after=0),
    "is 10 MB": Behaviour(raw='{"models":[],"data":[],"version":"%s"}' % ("x" * 10_000_000)),
}


@pytest.mark.parametrize("trouble", _TROUBLES)
def test_lists_go_on_while_the_server_is_in_trouble(
    gateway: Gateway, upstream: StandIn, trouble: str
) -> None:
    someone = gateway.someone()
    before = {path: someone.get(path).content for path in KEPT}

    def look(path: str) -> tuple[str, int]:
        began = time.monotonic()
        answer = someone.get(path)
        assert time.monotonic() - began < 2
        assert (answer.status_code, answer.content) == (200, before[path])
        return answer.headers["x-parallama-cache"], int(answer.headers["age"])

    def all_stale() -> bool:
        with ThreadPoolExecutor(len(KEPT)) as threads:
            return all(cache == "stale" and age > 0 for cache, age in threads.map(look, KEPT))

    upstream.default = _TROUBLES[trouble]
    until(all_stale, 10)
    page = someone.get("/gateway/discovery").json()["gateways"]
    assert [(at["health"]["status"], at["cache"]["state"]) for at in page] == [
        ("away", "stale")
    ] * 2
    assert page[0]["models"]
    upstream.default = Behaviour()
    upstream.release()
    for path in KEPT:
        until(lambda: look(path) == ("fresh", 0), 10)  # noqa: B023


def test_what_a_model_is_goes_on_too(gateway: Gateway, upstream: StandIn) -> None:
    someone = gateway.someone()
    shown = someone.post("/api/show", {"model": "smollm2"})
    assert shown.headers["x-parallama-cache"] == "fresh"
    upstream.default = Behaviour(hold_at=0)
    time.sleep(0.3)
    again = someone.post("/api/show", {"model": "smollm2"})
    assert (again.content, again.headers["x-parallama-cache"]) == (shown.content, "stale")


def test_a_server_that_never_came_and_one_that_went_and_came_back(tmp_path: Path) -> None:
    server = StandIn(port=free_port())
    with running(tmp_path, server, complaints=True) as gateway:
        someone = gateway.someone()
        for path in KEPT:
            answer = someone.get(path)
            assert answer.status_code == 503
            assert "try again" in str(answer.json()["error"])
        assert someone.post("/api/show", {"model": "smollm2"}).status_code == 503
        with server:
            for path in KEPT:
                until(lambda: someone.get(path).status_code == 200)  # noqa: B023
        until(lambda: someone.get("/api/tags").headers["x-parallama-cache"] == "stale")
        assert someone.get("/v1/models").status_code == 200
        with server:
            until(lambda: someone.get("/api/tags").headers["x-parallama-cache"] == "fresh")


# Who reaches what


def test_the_page_of_gateways_is_for_whoever_is_known(gateway: Gateway) -> None:
    page = gateway.someone(models=ALLOWED).get("/gateway/discovery").json()["gateways"]
    assert [at["name"] for at in page] == ["ollama", "openai"]
    for at in page:
        assert {model["name"] for model in at["models"]} == {"smollm2:latest"}
        assert at["health"] == {
            "status": "well", "checked_by": "envoy", "servers": 1, "servers_well": 1
        }  # fmt: skip
    bound = gateway.someone(gateways=["openai"])
    (at,) = bound.get("/gateway/discovery").json()["gateways"]
    assert at["name"] == "openai"
    assert bound.get("/api/tags").status_code == 403
    claims = {"x-parallama-gateways": "ollama,openai", "x-parallama-models": "*"}
    refused = gateway.http.get("/gateway/discovery", headers=claims)
    assert (refused.status_code, refused.json()["code"]) == (401, "invalid_api_key")
    for path in ("/gateway/status", "/gateway/", "/gateway/discovery/x"):
        assert bound.get(path).status_code == 404


def test_status_says_what_the_page_says_and_why(gateway: Gateway) -> None:
    told = gateway.cli("status")["gateways"]
    assert [(at["name"], at["health"]["status"]) for at in told] == [
        ("ollama", "well"),
        ("openai", "well"),
    ]
    assert {model["name"] for model in told[0]["models"]} == {"smollm2:latest", "secret:latest"}
    assert {each["path"] for each in told[0]["lists"]} >= {"/api/tags", "/api/ps"}


def test_at_the_catalogs_own_door_there_is_nothing_but_its_questions(
    gateway: Gateway, upstream: StandIn
) -> None:
    transport = httpx.HTTPTransport(uds=str(gateway.config.run_dir / "catalog.sock"))
    ours = {"x-parallama-catalog": "1"}
    with httpx.Client(transport=transport, base_url="http://x", timeout=PATIENCE) as client:
        assert client.get("/api/tags", headers=ours).status_code == 200
        for method, path, headers in (
            ("GET", "/api/tags", {}),
            ("POST", "/api/chat", ours),
            ("DELETE", "/api/delete", ours),
            ("GET", "/api/tags/x", ours),
            ("POST", "/v1/chat/completions", ours),
            ("GET", "/admin/v1/users", ours),
        ):
            answer = client.request(method, path, headers=headers, json={"model": "smollm2"})
            assert answer.status_code == 403, path
    assert {seen.path for seen in upstream.requests} <= {"/api/tags"}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", TO_V1, {"model": "secret", "messages": [1]}),
        ("POST", TO_CHAT, {"model": "secret", "messages": [1]}),
        ("POST", "/api/embed", {"model": "secret", "input": "x"}),
        ("POST", "/api/show", {"model": "secret"}),
        ("GET", "/v1/models/secret", None),
    ],
)
def test_a_hidden_model_looks_like_one_that_does_not_exist(
    gateway: Gateway, upstream: StandIn, method: str, path: str, body: Json | None
) -> None:
    someone = gateway.someone(models=ALLOWED)

    def told(name: str) -> tuple[int, str, set[str]]:
        sent = json.dumps(body).replace("secret", name).encode() if body else b""
        answer = someone.ask(method, path.replace("secret", name), content=sent)
        return answer.status_code, answer.text.replace(name, "NAME"), {*answer.headers}

    hidden, unknown = told("secret"), told("nothing")
    assert hidden == unknown
    assert hidden[0] == 404
    assert "NAME" in hidden[1]
    assert not upstream.requests


def test_an_unknown_model_is_said_to_be_unknown(gateway: Gateway) -> None:
    someone = gateway.someone()
    for path in (TO_V1, TO_CHAT):
        answer = someone.post(path, {"model": "nothing", "messages": [1]})
        assert answer.status_code == 404
        assert "nothing" in answer.text
        assert gateway.row(answer)["tokens_used"] == 0


def test_a_restricted_key_manages_no_models(gateway: Gateway, upstream: StandIn) -> None:
    someone = gateway.someone(role=Role.OPERATOR, models=ALLOWED)
    copy = {"source": "secret", "destination": "smollm2"}
    for method, path, body in (
        ("POST", "/api/copy", copy),
        ("POST", "/api/create", {"model": "smollm2", "from": "secret"}),
        ("POST", "/api/pull", {"model": "smollm2"}),
        ("DELETE", "/api/delete", {"model": "smollm2"}),
    ):
        answer = someone.ask(method, path, json=body)
        assert answer.status_code == 403
    assert not upstream.requests
