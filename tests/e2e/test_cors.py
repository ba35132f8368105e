"""Web pages that call the gateway from a browser, and headers that browsers heed."""

from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.gateway import CHAT, Gateway, running
from tests.standin import StandIn

HOME = "https://chat.example.org"
ALLOWED = [HOME, "http://localhost:5173", "chrome-extension://abcdefgh"]
FOREIGN = [
    "https://evil.example.org",
    "https://chat.example.org.evil.net",
    "http://chat.example.org",
    "http://localhost:5173.evil.net",
    "null",
]
PATHS = ["/v1/chat/completions", "/api/chat", "/v1/messages", "/openai/v1/models", "/me/quota"]
PLAIN = {**CHAT, "stream": False}

OWN_HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that some pages may call."""
    environ = {
        "PARALLAMA_SERVER__CORS__ORIGINS": f"[{HOME}, 'http://localhost:*', 'chrome-extension://*']",
        "PARALLAMA_SERVER__CORS__HEADERS": "[X-Mine]",
        "PARALLAMA_SERVER__CORS__MAX_AGE": "77",
    }
    folder = tmp_path_factory.mktemp("cors")
    with StandIn() as upstream, running(folder, upstream, environ=environ) as gateway:
        yield gateway


@pytest.fixture
def home(shared_home: Gateway) -> Gateway:
    shared_home.upstream.reset()
    return shared_home


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that every page may call."""
    environ = {"PARALLAMA_SERVER__CORS__ORIGINS": "['*']"}
    folder = tmp_path_factory.mktemp("star")
    with StandIn() as upstream, running(folder, upstream, environ=environ) as gateway:
        yield gateway


def preflight(gateway: Gateway, path: str, origin: str, method: str = "POST") -> httpx.Response:
    """As a browser asks before it sends a key."""
    asked = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    return gateway.http.options(path, headers=asked)


def words(answer: httpx.Response, name: str) -> set[str]:
    return {word.strip().lower() for word in answer.headers[name].split(",")}


def about_origins(answer: httpx.Response) -> list[str]:
    return [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origin", ALLOWED)
@pytest.mark.parametrize("path", PATHS)
def test_a_preflight_needs_no_credential(home: Gateway, path: str, origin: str) -> None:
    answer = preflight(home, path, origin)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert answer.headers["access-control-max-age"] == "77"
    assert {"post", "get", "delete"} <= words(answer, "access-control-allow-methods")
    may_send = words(answer, "access-control-allow-headers")
    assert {"authorization", "content-type", "x-api-key", "x-stainless-os", "anthropic-version",
            "x-mine"} <= may_send  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_a_page_calls_and_reads_what_it_needs(home: Gateway, path: str) -> None:
    someone = home.someone(tokens=1000, requests=2)
    for status in (200, 200, 429):
        answer = someone.post(path, PLAIN, headers={"origin": HOME})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == HOME
        assert answer.headers["access-control-allow-credentials"] == "true"
        may_read = words(answer, "access-control-expose-headers")
        told = {name for name in answer.headers if name.startswith(("x-r", "retry-after"))}
        assert told <= may_read
    assert "retry-after" in told


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/chat/completions", 401), ("/api/chat", 401), ("/me/quota", 401)]
)
def test_a_page_can_read_why_it_is_refused(home: Gateway, path: str, status: int) -> None:
    answer = home.http.get(path, headers={"origin": HOME})
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == HOME


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_foreign_page_is_told_nothing(home: Gateway, origin: str) -> None:
    asked = preflight(home, "/v1/chat/completions", origin)
    assert not about_origins(asked)
    assert not home.upstream.requests
    # Who is no browser sends what he likes, and is let in by his key.
    answer = home.someone().post("/api/chat", PLAIN, headers={"origin": origin})
    assert answer.status_code == 200
    assert not about_origins(answer)


@pytest.mark.parametrize("origin", [*ALLOWED, *FOREIGN])
def test_the_upstream_hears_of_no_origin_and_of_its_own_name(home: Gateway, origin: str) -> None:
    """Ollama refuses foreign ones of both."""
    mine = {"origin": origin, "host": "gateway.example.org", "referer": f"{origin}/page"}
    answer = home.someone().post("/api/chat", PLAIN, headers=mine)
    assert answer.status_code == 200
    seen = home.seen(answer)
    assert seen.header("origin") is None
    assert seen.header("host") == "127.0.0.1"


@pytest.mark.parametrize("origin", [*ALLOWED, *FOREIGN])
def test_every_page_may_call_but_not_with_its_visitors_cookies(
    everywhere: Gateway, origin: str
) -> None:
    answer = preflight(everywhere, "/v1/chat/completions", origin)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert "access-control-allow-credentials" not in answer.headers
    called = everywhere.someone().get("/api/version", headers={"origin": origin})
    assert called.headers["access-control-allow-origin"] == origin
    assert "access-control-allow-credentials" not in called.headers


def test_without_origins_nothing_is_said_about_them(gateway: Gateway) -> None:
    assert preflight(gateway, "/v1/chat/completions", HOME).status_code == 401
    answer = gateway.someone().post("/api/chat", PLAIN, headers={"origin": HOME})
    assert answer.status_code == 200
    assert not about_origins(answer)


def test_what_we_say_ourselves_is_no_page(gateway: Gateway) -> None:
    """And is not taken for one, whatever stands in it."""
    someone = gateway.someone()
    ours = [
        gateway.http.get("/"),
        gateway.http.get("/healthz"),
        gateway.http.get("/nothing"),
        gateway.http.get("/api/tags"),
        someone.post("/v1/chat/completions", b"{"),
        someone.get("/v1/nothing"),
        someone.get("/admin/nothing"),
        gateway.http.get("/auth/.well-known/jwks.json"),
    ]
    for answer in ours:
        told = {name: answer.headers.get(name) for name in OWN_HEADERS}
        assert told == OWN_HEADERS, (answer.request.url, answer.status_code)
    status, headers, _ = gateway.raw("GET", "/v1/%2e%2e%2fv1")
    assert status == 400
    assert OWN_HEADERS.items() <= headers.items()


def test_what_the_upstream_says_stays_as_it_is(gateway: Gateway) -> None:
    answer = gateway.someone().post("/api/chat", PLAIN)
    assert not OWN_HEADERS.keys() & answer.headers.keys()
