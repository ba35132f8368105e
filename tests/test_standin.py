"""The stand-in answers as the real servers do, misbehaves when told to, and counts its tokens."""

import base64
import contextlib
import gzip
import hashlib
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any, ClassVar

import httpx
import ollama
import openai
import pytest

from tests import standin_dialects as dialects
from tests.standin import Behaviour, Flavour, Seen, StandIn

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "smollm2", "messages": HELLO}


@pytest.fixture(scope="module")
def running() -> Iterator[StandIn]:
    with StandIn(models=("smollm2", "secret:7b")) as server:
        yield server


@pytest.fixture
def upstream(running: StandIn) -> StandIn:
    running.reset()
    return running


@pytest.fixture
def http(upstream: StandIn) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=upstream.url, timeout=10) as client:
        yield client


@pytest.fixture
def sdk(upstream: StandIn) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{upstream.url}/v1", api_key="k", max_retries=0) as client:
        yield client


@pytest.fixture
def native(upstream: StandIn) -> Iterator[ollama.Client]:
    with ollama.Client(upstream.url) as client:
        yield client


def sse(text: str) -> list[Any]:
    """The events of a stream; the last must be [DONE]."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(value) for value in data[:-1]]


def stream(http: httpx.Client, flavour: Flavour, *, usage: bool | None = None, **says: Any) -> Any:
    options = {} if usage is None else {"stream_options": {"include_usage": usage}}
    behaviour = {"flavour": flavour, "tokens": 3, "prompt_tokens": 5, **says}
    answer = http.post(
        "/v1/chat/completions",
        json={**CHAT, "stream": True, **options},
        headers={"x-standin": json.dumps(behaviour)},
    )
    return sse(answer.text)


def raw_call(upstream: StandIn, body: bytes, path: str = "/api/chat") -> socket.socket:
    """A connection on which a request has just been sent."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", upstream.port), timeout=10)
    connection.sendall(head.encode() + body)
    return connection


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    got = b""
    while mark not in got:
        more = connection.recv(65536)
        assert more, f"closed after {got!r}"
        got += more
    return got


class TestOpenAIClient:
    def test_chat(self, sdk: openai.OpenAI, upstream: StandIn) -> None:
        answer = sdk.chat.completions.create(model="smollm2", messages=HELLO)
        assert answer.choices[0].message.content == "w0 w1 w2 w3 w4 w5 w6 "
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 7)
        assert (upstream.last().model, upstream.last().emitted) == ("smollm2", 7)

    def test_stream_has_usage_only_where_asked(self, sdk: openai.OpenAI) -> None:
        plain = list(sdk.chat.completions.create(model="smollm2", messages=HELLO, stream=True))
        asked = list(
            sdk.chat.completions.create(
                model="smollm2", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        )
        assert [c.usage for c in plain] == [None] * 8
        assert asked[-1].usage is not None
        assert (asked[-1].choices, asked[-1].usage.total_tokens) == ([], 18)
        assert asked[-2].choices[0].finish_reason == "stop"

    def test_completions_embeddings_models(self, sdk: openai.OpenAI) -> None:
        assert sdk.completions.create(model="smollm2", prompt="x", max_tokens=2).choices[0].text
        embedded = sdk.embeddings.create(model="smollm2", input=["a", "b"])
        assert [e.embedding for e in embedded.data] == [[0.125, 0.25, 0.375, 0.5]] * 2
        assert embedded.usage.prompt_tokens == 11
        assert [m.id for m in sdk.models.list()] == ["smollm2:latest", "secret:7b"]

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (400, openai.BadRequestError),
            (404, openai.NotFoundError),
            (429, openai.RateLimitError),
            (503, openai.InternalServerError),
        ],
    )
    def test_errors(
        self, sdk: openai.OpenAI, upstream: StandIn, status: int, error: type[openai.APIStatusError]
    ) -> None:
        upstream.next(Behaviour(status=status, error="no"))
        with pytest.raises(error) as caught:
            sdk.chat.completions.create(model="smollm2", messages=HELLO)
        assert caught.value.body["message"] == "no"  # type: ignore[index]
        assert (upstream.last().status, upstream.last().emitted) == (status, 0)

    def test_unknown_model(self, sdk: openai.OpenAI, upstream: StandIn) -> None:
        with pytest.raises(openai.NotFoundError, match="model 'nope' not found"):
            sdk.chat.completions.create(model="nope", messages=HELLO)
        assert upstream.last().model is None


class TestOllamaClient:
    def test_chat_and_generate(self, native: ollama.Client) -> None:
        chat = native.chat("smollm2", HELLO)
        assert (chat.prompt_eval_count, chat.eval_count, chat.done_reason) == (11, 7, "stop")
        assert chat.message.content == "w0 w1 w2 w3 w4 w5 w6 "
        short = native.generate("smollm2", "hello", options={"num_predict": 2})
        assert (short.response, short.eval_count, short.done_reason) == ("w0 w1 ", 2, "length")
        assert short.context

    def test_streams_are_lines(self, native: ollama.Client, upstream: StandIn) -> None:
        parts = list(native.chat("smollm2", HELLO, stream=True))
        assert [p.message.content for p in parts[:2]] == ["w0 ", "w1 "]
        assert (parts[-1].done, parts[-1].eval_count, len(parts)) == (True, 7, 8)
        assert (upstream.last().emitted, upstream.last().chunks) == (7, 8)

    def test_models(self, native: ollama.Client, upstream: StandIn) -> None:
        assert [m.model for m in native.list().models] == ["smollm2:latest", "secret:7b"]
        assert native.ps().models[0].context_length == 4096
        assert native.show("SmolLM2:latest").details is not None
        native.copy("smollm2", "mine")
        assert native.delete("mine").status == "success"
        with pytest.raises(ollama.ResponseError, match='model "none" not found'):
            native.copy("none", "x")
        with pytest.raises(ollama.ResponseError, match="model 'mine' not found"):
            native.delete("mine")

    def test_pull_tells_its_progress(self, native: ollama.Client, upstream: StandIn) -> None:
        steps = list(native.pull("fresh", stream=True))
        assert [s.status for s in (steps[0], steps[-1])] == ["pulling manifest", "success"]
        assert [s.completed for s in steps if s.total] == [250, 500, 750, 1000]
        assert native.chat("fresh", HELLO).eval_count == 7

    def test_embeddings(self, native: ollama.Client) -> None:
        answer = native.embed("smollm2", ["a", "b"])
        assert (len(answer.embeddings), answer.prompt_eval_count) == (2, 11)
        assert len(native.embeddings("smollm2", "a").embedding) == 4

    def test_errors(self, native: ollama.Client, upstream: StandIn) -> None:
        with pytest.raises(ollama.ResponseError, match="model 'nope' not found") as caught:
            native.chat("nope", HELLO)
        assert caught.value.status_code == 404
        upstream.next(Behaviour(error_after=2, error="out of memory"))
        with pytest.raises(ollama.ResponseError, match="out of memory"):
            list(native.chat("smollm2", HELLO, stream=True))
        assert (upstream.last().status, upstream.last().emitted) == (200, 2)


class TestOllamaServer:
    def test_streams_unless_told_not_to(self, http: httpx.Client) -> None:
        lines = http.post("/api/chat", json=CHAT)
        assert lines.headers["content-type"] == "application/x-ndjson"
        whole = http.post("/api/chat", json={**CHAT, "stream": False})
        assert whole.headers["content-type"] == "application/json; charset=utf-8"
        last = json.loads(lines.text.splitlines()[-1])
        assert last["eval_duration"] == whole.json()["eval_duration"] == 70_000_000

    def test_plain_calls(self, http: httpx.Client) -> None:
        assert http.get("/").text == "Ollama is running"
        assert http.head("/api/version").status_code == 200
        assert "version" in http.get("/api/version").json()

    @pytest.mark.parametrize(
        ("method", "path", "body", "status", "text"),
        [
            ("POST", "/api/chat", b"", 400, "missing request body"),
            ("POST", "/api/chat", b'{"messages":[]}', 400, "model is required"),
            ("POST", "/api/generate", b'{"model":"x"}', 404, "model 'x' not found"),
            ("POST", "/api/chat", b'{"model":5}', 400, "cannot unmarshal number"),
            ("POST", "/api/chat", b'{"model":', 400, "Expecting value"),
            ("POST", "/api/chat", b"[" * 100_000, 400, "error"),
            ("GET", "/api/chat", b"", 405, "405 method not allowed"),
            ("GET", "/api/nothing", b"", 404, "404 page not found"),
        ],
    )
    def test_refusals(
        self, http: httpx.Client, method: str, path: str, body: bytes, status: int, text: str
    ) -> None:
        answer = http.request(method, path, content=body)
        assert answer.status_code == status
        assert text in answer.text

    def test_no_prompt_loads_and_unloads(self, http: httpx.Client) -> None:
        load = http.post("/api/chat", json={"model": "smollm2"}).json()
        unload = http.post("/api/generate", json={"model": "smollm2", "keep_alive": 0}).json()
        assert (load["done_reason"], unload["done_reason"]) == ("load", "unload")

    def test_foreign_host_and_origin_are_refused(self, http: httpx.Client) -> None:
        for headers in ({"host": "example.com"}, {"origin": "https://example.com"}):
            assert http.get("/api/tags", headers=headers).status_code == 403
        for host in ("localhost:1", "192.168.1.7", "[::1]:80", "box.local"):
            assert http.get("/api/tags", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        "body",
        [
            '{"model":"smollm2","Model":"secret:7b"}',
            '{"model":"smollm2","model":"secret:7b"}',
            '{"MODEL":"SECRET:7B","model":null}',
            '{"model":"registry.ollama.ai/library/secret:7b"} trailing',
            '{"m\\u006fdel":"https://registry.ollama.ai/Library/secret:7b"}',
        ],
    )
    def test_the_model_that_go_would_run(
        self, http: httpx.Client, upstream: StandIn, body: str
    ) -> None:
        for path in ("/api/generate", "/v1/completions"):
            http.post(path, content=body)
            assert upstream.last().model == "secret:7b"

    def test_fields_that_go_would_read(self) -> None:
        body = (
            '{"mode\u017f":1, "STREAM":true, "stream":null, "Options":{"num_predict":9},'
            ' "options":{"Num_Predict":1}, "stream_option\u017f":{"Include_Usage":true}}'
        )
        found = dialects.parse(body.encode(), go=True)
        assert "modes" in found
        assert "stream" not in found
        assert dialects.inner(found, "options") == {"num_predict": 9, "Num_Predict": 1}
        assert dialects.inner(found, "stream_options", go=True) == {"include_usage": True}

    def test_only_its_own_maximum_counts(self, http: httpx.Client, upstream: StandIn) -> None:
        http.post("/v1/chat/completions", json={**CHAT, "max_completion_tokens": 2})
        assert upstream.last().emitted == 7
        http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2})
        assert upstream.last().emitted == 2


TOOL = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}
CALLED = {"city": "w0", "days": 1}
PIXEL = base64.b64encode(b"a picture").decode()


def typed_events(text: str) -> list[Any]:
    """The events of a stream in which each says its own name."""
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    found = [json.loads(lines[-1].removeprefix("data: ")) for lines in blocks]
    assert [lines[0] for lines in blocks] == [f"event: {event['type']}" for event in found]
    return found


class TestResponses:
    def test_sdk(self, sdk: openai.OpenAI, upstream: StandIn) -> None:
        answer = sdk.responses.create(model="smollm2", input="hello")
        assert answer.output_text == "w0 w1 w2 w3 w4 w5 w6 "
        assert answer.usage is not None
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (11, 7)
        with sdk.responses.stream(model="smollm2", input="hello") as events:
            assert "".join(e.delta for e in events if e.type == "response.output_text.delta")
            assert events.get_final_response().usage == answer.usage
        assert (upstream.last().emitted, upstream.last().finished) == (7, True)

    @pytest.mark.parametrize("flavour", ["ollama", "llamacpp", "openai"])
    def test_stream(self, http: httpx.Client, upstream: StandIn, flavour: str) -> None:
        says = {"flavour": flavour, "tokens": 5, "cached_tokens": 4, "reasoning_tokens": 2}
        body = {"model": "smollm2", "input": "hello", "stream": True, "max_output_tokens": 4}
        answer = http.post("/v1/responses", json=body, headers={"x-standin": json.dumps(says)})
        first, *_, last = typed_events(answer.text)
        assert first["type"] == "response.created"
        assert ("model" in first["response"]) == (flavour != "llamacpp")
        assert last["type"] == f"response.{'incomplete' if flavour == 'openai' else 'completed'}"
        usage = last["response"]["usage"]
        assert (usage["input_tokens"], usage["output_tokens"]) == (11, 4)
        assert usage["input_tokens_details"]["cached_tokens"] == (0 if flavour == "ollama" else 4)
        assert upstream.last().emitted == 4

    def test_tool(self, sdk: openai.OpenAI) -> None:
        tool: Any = {"type": "function", **TOOL}
        for streamed in (False, True):
            if streamed:
                with sdk.responses.stream(model="smollm2", input="x", tools=[tool]) as events:
                    answer: Any = events.get_final_response()
            else:
                answer = sdk.responses.create(model="smollm2", input="x", tools=[tool])
            (called,) = answer.output
            assert (called.name, json.loads(called.arguments)) == ("weather", CALLED)

    @pytest.mark.parametrize(
        ("flavour", "ends"),
        [("ollama", "response.content_part.added"), ("llamacpp", None), ("openai", "error")],
    )
    def test_error_in_the_middle(self, http: httpx.Client, flavour: str, ends: str | None) -> None:
        says = {"flavour": flavour, "error_after": 4, "error": "no memory"}
        body = {"model": "smollm2", "input": "hello", "stream": True}
        text = http.post("/v1/responses", json=body, headers={"x-standin": json.dumps(says)}).text
        last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
        assert last.get("type") == ends
        assert ("no memory" in text) == (flavour != "ollama")


def counts(**tokens: int) -> dict[str, int]:
    return {f"{name}_tokens": count for name, count in tokens.items()}


class TestMessages:
    BODY: ClassVar = {"model": "smollm2", "messages": HELLO, "max_tokens": 4}

    @pytest.mark.parametrize(
        ("flavour", "first", "last"),
        [
            ("ollama", counts(input=5, output=0), counts(input=11, output=4)),
            ("llamacpp", counts(input=8, cache_read_input=3, output=0), counts(output=4)),
            (
                "openai",
                counts(input=8, cache_read_input=3, cache_creation_input=0, output=1),
                counts(output=4),
            ),
            ("bare", None, None),
        ],
    )
    def test_usage(
        self, http: httpx.Client, upstream: StandIn, flavour: str, first: Any, last: Any
    ) -> None:
        headers = {"x-standin": json.dumps({"flavour": flavour, "cached_tokens": 3})}
        answer = http.post("/v1/messages", json={**self.BODY, "stream": True}, headers=headers)
        events = typed_events(answer.text)
        assert events[0]["message"].get("usage") == first
        assert events[-2].get("usage") == last
        assert events[-2]["delta"]["stop_reason"] == "max_tokens"
        assert events[-1] == {"type": "message_stop"}
        assert upstream.last().emitted == 4
        whole = http.post("/v1/messages", json=self.BODY, headers=headers).json()
        assert whole["content"] == [{"type": "text", "text": "w0 w1 w2 w3 "}]
        assert whole.get("usage", {}).get("output_tokens") == (4 if first else None)

    def test_thinking_and_tool(self, http: httpx.Client, upstream: StandIn) -> None:
        tools = [{"name": "weather", "input_schema": TOOL["parameters"]}]
        body = {**self.BODY, "max_tokens": 50, "tools": tools}
        headers = {"x-standin": '{"reasoning_tokens": 2}'}
        blocks = http.post("/v1/messages", json=body, headers=headers).json()["content"]
        assert [block["type"] for block in blocks] == ["thinking", "tool_use"]
        assert blocks[1]["input"] == CALLED
        events = typed_events(
            http.post("/v1/messages", json={**body, "stream": True}, headers=headers).text
        )
        deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
        assert json.loads("".join(d.get("partial_json", "") for d in deltas)) == CALLED
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        assert upstream.last().emitted == 7

    def test_refusals(self, http: httpx.Client) -> None:
        def refused(**more: Any) -> tuple[int, str, str]:
            body = {name: value for name, value in {**self.BODY, **more}.items() if value}
            answer = http.post("/v1/messages", json=body)
            told = answer.json()
            assert told["type"] == "error"
            return answer.status_code, told["error"]["type"], told["error"]["message"]

        wrong = (400, "invalid_request_error")
        assert refused(model="nope") == (404, "not_found_error", "model 'nope' not found")
        assert refused(model=None) == (*wrong, "model is required")
        assert refused(max_tokens=0) == (*wrong, "max_tokens is required and must be positive")
        assert refused(messages=None) == (*wrong, "messages is required")

    def test_tokens_are_counted_but_not_by_ollama(self, http: httpx.Client) -> None:
        path = "/v1/messages/count_tokens"
        assert http.post(path, json=self.BODY).status_code == 404
        answer = http.post(path, json=self.BODY, headers={"x-standin": '{"flavour":"llamacpp"}'})
        assert answer.json() == {"input_tokens": 11}

    def test_cut_before_and_after_the_end_is_told(
        self, http: httpx.Client, upstream: StandIn
    ) -> None:
        body = json.dumps({**self.BODY, "stream": True}).encode()
        whole = len(typed_events(http.post("/v1/messages", content=body).text))
        for after, told in ((whole - 1, False), (whole, True)):
            upstream.next(Behaviour(cut_after=after))
            with (
                contextlib.closing(raw_call(upstream, body, "/v1/messages")) as connection,
                connection.makefile("rb") as file,
            ):
                got = file.read()
            assert not got.endswith(b"0\r\n\r\n")
            assert (b"message_stop" in got) == told
            assert not upstream.last().finished


class TestAsked:
    """Tools, JSON and images."""

    @pytest.mark.parametrize("flavour", ["ollama", "llamacpp", "openai"])
    def test_a_tool_is_called_in_every_chat(
        self, http: httpx.Client, upstream: StandIn, flavour: str
    ) -> None:
        headers = {"x-standin": json.dumps({"flavour": flavour})}
        body = {**CHAT, "tools": [{"type": "function", "function": TOOL}]}
        choice = http.post("/v1/chat/completions", json=body, headers=headers).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        (called,) = choice["message"]["tool_calls"]
        assert json.loads(called["function"]["arguments"]) == CALLED
        events = sse(http.post(
            "/v1/chat/completions", json={**body, "stream": True}, headers=headers
        ).text)  # fmt: skip
        parts = [c["delta"].get("tool_calls") for e in events for c in e["choices"]]
        named = [part[0]["function"] for part in parts if part]
        assert [f["name"] for f in named if "name" in f] == ["weather"]
        assert json.loads("".join(f["arguments"] for f in named)) == CALLED
        assert (len(named) == 1) == (flavour == "ollama")
        assert upstream.last().emitted == 7

    def test_ollama_calls_with_an_object(self, native: ollama.Client) -> None:
        tools = [{"type": "function", "function": TOOL}]
        answer = native.chat("smollm2", HELLO, tools=tools)
        assert answer.message.tool_calls is not None
        assert answer.message.tool_calls[0].function.arguments == CALLED
        parts = list(native.chat("smollm2", HELLO, tools=tools, stream=True))
        assert [bool(part.message.tool_calls) for part in parts] == [True, False]
        told: Any = [*HELLO, answer.message, {"role": "tool", "content": "sun"}]
        assert native.chat("smollm2", told, tools=tools).message.content == "w0 w1 w2 w3 w4 w5 w6 "

    @pytest.mark.parametrize(
        ("path", "asks"),
        [
            ("/api/chat", {"format": "json"}),
            ("/api/chat", {"format": {"type": "object"}}),
            ("/api/generate", {"format": "json", "prompt": "x"}),
            ("/v1/chat/completions", {"response_format": {"type": "json_object"}}),
            ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_schema"}}}),
        ],
    )
    def test_json(self, http: httpx.Client, path: str, asks: Any) -> None:
        told = http.post(path, json={**CHAT, "stream": False, **asks}).text
        assert '{\\"words\\": \\"w0 w1 w2 w3 w4 w5 w6 \\"}' in told

    @pytest.mark.parametrize(
        ("path", "more"),
        [
            ("/api/generate", {"prompt": "x", "images": [PIXEL]}),
            ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": [PIXEL]}]}),
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": [
                    {"type": "text", "text": "x"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
                ]}]},
            ),
            (
                "/v1/responses",
                {"input": [{"role": "user", "content": [
                    {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}"},
                ]}]},
            ),
            (
                "/v1/messages",
                {"max_tokens": 9, "messages": [{"role": "user", "content": [
                    {"type": "image", "source": {"type": "base64", "data": PIXEL}},
                ]}]},
            ),
        ],
    )  # fmt: skip
    def test_images(self, http: httpx.Client, upstream: StandIn, path: str, more: Any) -> None:
        body = {"model": "smollm2", "stream": False, **more}
        assert http.post(path, json=body).status_code == 200
        assert upstream.last().images == 1
        broken = json.dumps(body).replace(PIXEL, "*")
        assert http.post(path, content=broken).status_code == 400

    def test_embeddings_in_all_forms(self, http: httpx.Client, sdk: openai.OpenAI) -> None:
        def count(text: Any, flavour: str) -> int:
            answer = http.post(
                "/v1/embeddings",
                json={"model": "smollm2", "input": text},
                headers={"x-standin": json.dumps({"flavour": flavour})},
            )
            return len(answer.json()["data"]) if answer.status_code == 200 else 0

        texts = ["a", ["a", "b"], [1, 2, 3], [[1], [2]]]
        assert [count(text, "ollama") for text in texts] == [1, 2, 0, 0]
        assert [count(text, "openai") for text in texts] == [1, 2, 1, 2]
        short = sdk.embeddings.create(model="smollm2", input="a", dimensions=2)
        assert short.data[0].embedding == [0.125, 0.25]

    def test_one_model(self, http: httpx.Client, sdk: openai.OpenAI) -> None:
        assert sdk.models.retrieve("smollm2").id == "smollm2"
        with pytest.raises(openai.NotFoundError, match="model 'nope' not found"):
            sdk.models.retrieve("nope")
        as_llama = {"x-standin": '{"flavour":"llamacpp"}'}
        assert http.get("/v1/models/smollm2", headers=as_llama).status_code == 404

    def test_heads_and_status(self, http: httpx.Client) -> None:
        told = {
            path: http.head(path).status_code
            for path in ("/", "/api/tags", "/api/ps", "/v1/models")
        }
        assert told == {"/": 200, "/api/tags": 200, "/api/ps": 405, "/v1/models": 405}
        assert http.head("/v1/models", headers={"x-standin": '{"flavour":"llamacpp"}'}).is_success
        assert http.get("/api/status").json() == {"cloud": {"disabled": True, "source": "env"}}

    def test_blobs(self, http: httpx.Client, upstream: StandIn) -> None:
        content = b"weights" * 100_000
        path = f"/api/blobs/sha256:{hashlib.sha256(content).hexdigest()}"
        assert http.head(path).status_code == 404
        assert http.post(path, content=b"others").status_code == 400
        assert http.post(path, content=iter([content[:9], content[9:]])).status_code == 201
        assert (upstream.last().received, upstream.last().body) == (700_000, b"")
        assert (http.head(path).status_code, http.post(path, content=content).status_code) == (
            200,
            200,
        )

    def test_progress(self, native: ollama.Client) -> None:
        assert native.push("smollm2", stream=False).status == "success"
        told = [part.status or "" for part in native.push("smollm2", stream=True)]
        assert [told[0], told[1], told[-1]] == [
            "retrieving manifest",
            "pushing abababababab",
            "success",
        ]
        made = [part.status or "" for part in native.create("made", from_="smollm2", stream=True)]
        assert made[1].startswith("using existing layer sha256:")
        assert native.chat("made", HELLO).done


class TestFlavours:
    def test_llamacpp_without_include_usage_ends_in_timings(self, http: httpx.Client) -> None:
        *_, last = stream(http, "llamacpp", cached_tokens=2)
        assert "usage" not in last
        timings = last["timings"]
        assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (2, 3, 3)
        assert last["choices"][0]["finish_reason"] == "stop"

    def test_llamacpp_with_include_usage(self, http: httpx.Client) -> None:
        first, *_, finish, last = stream(http, "llamacpp", usage=True, cached_tokens=2)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
        assert "timings" not in finish
        assert last["choices"] == []
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
        assert last["timings"]["predicted_n"] == 3

    def test_llamacpp_has_no_ollama_api(self, http: httpx.Client) -> None:
        as_llama = {"x-standin": '{"flavour":"llamacpp"}'}
        answer = http.post("/api/chat", json=CHAT, headers=as_llama)
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, "File Not Found")
        unknown = http.post("/v1/chat/completions", json={"model": "no"}, headers=as_llama)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, 400)
        assert http.get("/health", headers=as_llama).json() == {"status": "ok"}

    def test_openai_says_null_until_the_last(self, http: httpx.Client) -> None:
        events = stream(http, "openai", usage=True, reasoning_tokens=1)
        assert [e["usage"] for e in events[:-1]] == [None] * 5
        details = events[-1]["usage"]["completion_tokens_details"]
        assert (events[-1]["choices"], details) == ([], {"reasoning_tokens": 1})
        assert all("usage" not in e for e in stream(http, "openai"))

    def test_bare_never_tells(self, http: httpx.Client) -> None:
        assert all("usage" not in e for e in stream(http, "bare", usage=True))
        as_bare = {"x-standin": '{"flavour":"bare"}'}
        assert "usage" not in http.post("/v1/chat/completions", json=CHAT, headers=as_bare).json()

    def test_cumulative_tells_every_time(self, http: httpx.Client) -> None:
        events = stream(http, "cumulative")
        assert events[0]["usage"] is None
        assert [e["usage"]["completion_tokens"] for e in events[1:]] == [1, 2, 3, 3]

    def test_other_servers_read_json_exactly(self, http: httpx.Client, upstream: StandIn) -> None:
        headers = {"x-standin": '{"flavour":"openai"}'}
        twice = '{"model":"smollm2","Model":"secret:7b","messages":[1]}'
        http.post("/v1/chat/completions", content=twice, headers=headers)
        assert upstream.last().model == "smollm2"
        answer = http.post("/v1/chat/completions", content=twice + " x", headers=headers)
        assert answer.status_code == 400

    def test_several_choices(self, http: httpx.Client, upstream: StandIn) -> None:
        body = {**CHAT, "n": 3, "max_tokens": 2}
        http.post("/v1/chat/completions", json=body, headers={"x-standin": '{"flavour":"openai"}'})
        assert upstream.last().emitted == 6


class TestMisbehaviour:
    def test_lies_and_gaps(self, http: httpx.Client, upstream: StandIn) -> None:
        upstream.next(Behaviour(report={"eval_count": -5}, omit=("prompt_eval_count",)))
        answer = http.post("/api/chat", json={**CHAT, "stream": False}).json()
        assert answer["eval_count"] == -5
        assert "prompt_eval_count" not in answer
        assert upstream.last().emitted == 7

    def test_every_shape_of_the_same_stream(self, http: httpx.Client, upstream: StandIn) -> None:
        expected = stream(http, "ollama", usage=True)
        for shape in (
            {"write_size": 1},
            {"chunks_per_write": 4},
            {"crlf": True, "comments": True},
            {"spaces": True},
            {"gzip": True},
            {"final_newline": False},
            {"framing": "close"},
        ):
            events = stream(http, "ollama", usage=True, **shape)
            assert [e["choices"] for e in events] == [e["choices"] for e in expected], shape
            assert events[-1]["usage"] == expected[-1]["usage"]
            assert (upstream.last().emitted, upstream.last().chunks) == (3, 6)

    def test_shapes_on_the_wire(self, upstream: StandIn) -> None:
        upstream.next(Behaviour(tokens=1, write_size=1, crlf=True, comments=True, spaces=True))
        body = json.dumps({**CHAT, "stream": True}).encode()
        with raw_call(upstream, body, "/v1/chat/completions") as connection:
            got = read_until(connection, b"\r\n0\r\n\r\n")
        head, _, chunks = got.partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        assert chunks.startswith(b"1\r\n:\r\n1\r\n \r\n1\r\nk\r\n")
        body = b"".join(chunks.split(b"\r\n1\r\n"))
        assert b'data: {"id": ' in body

    def test_huge_usage_event(self, http: httpx.Client) -> None:
        last = stream(http, "ollama", usage=True, usage_padding=300_000, write_size=1024)[-1]
        assert (len(last["usage"]["padding"]), last["usage"]["total_tokens"]) == (300_000, 8)

    def test_gzip_only_where_accepted(self, http: httpx.Client, upstream: StandIn) -> None:
        upstream.default = Behaviour(gzip=True, content_type="text/plain")
        call = {"url": "/api/chat", "json": {**CHAT, "stream": False}}
        plain = http.post(**call, headers={"accept-encoding": "identity"})
        assert "content-encoding" not in plain.headers
        with http.stream("POST", **call) as packed:
            body = b"".join(packed.iter_raw())
        assert json.loads(gzip.decompress(body))["eval_count"] == 7
        assert packed.headers["content-type"] == "text/plain"

    @pytest.mark.parametrize("cut", ["close", "reset", "clean"])
    def test_cut(self, http: httpx.Client, upstream: StandIn, cut: Any) -> None:
        upstream.next(Behaviour(cut_after=2, cut=cut))
        if cut == "clean":
            assert len(http.post("/api/chat", json=CHAT).text.splitlines()) == 2
        else:
            with pytest.raises(httpx.TransportError):
                http.post("/api/chat", json=CHAT)
        seen = upstream.last()
        assert (seen.emitted, seen.finished, seen.client_gone) == (2, False, False)

    def test_cut_in_one_piece(self, http: httpx.Client, upstream: StandIn) -> None:
        upstream.next(Behaviour(cut_after=0))
        with pytest.raises(httpx.RemoteProtocolError):
            http.post("/api/chat", json={**CHAT, "stream": False})
        assert upstream.last().emitted == 0

    def test_an_answer_that_makes_no_sense(self, http: httpx.Client, upstream: StandIn) -> None:
        upstream.next(Behaviour(raw="{", content_type="text/html"))
        answer = http.post("/api/chat", json=CHAT)
        assert (answer.text, answer.headers["content-type"]) == ("{", "text/html")

    def test_an_error_in_an_ollama_sse_stream_is_lost(self, http: httpx.Client) -> None:
        headers = {"x-standin": '{"error_after":1}'}
        text = http.post(
            "/v1/chat/completions", json={**CHAT, "stream": True}, headers=headers
        ).text
        assert "[DONE]" not in text
        assert "error" not in text


class TestControl:
    def test_held_stream_goes_on_when_released(self, upstream: StandIn) -> None:
        upstream.next(Behaviour(hold_at=3))
        with raw_call(upstream, json.dumps(CHAT).encode()) as connection:
            before = read_until(connection, b"w2 ")
            seen = upstream.wait(lambda seen: seen.held)
            assert (seen.emitted, seen.chunks, b"w3" in before) == (3, 3, False)
            upstream.release()
            read_until(connection, b"0\r\n\r\n")
        assert upstream.wait_ended(seen.id).finished

    def test_held_before_the_first_byte(self, upstream: StandIn) -> None:
        upstream.next(Behaviour(hold_at=0, gate="mine"))
        with raw_call(upstream, json.dumps(CHAT).encode()) as connection:
            seen = upstream.wait(lambda seen: seen.held)
            assert seen.status == 0
            upstream.release("mine")
            assert read_until(connection, b"0\r\n\r\n").startswith(b"HTTP/1.1 200 ")

    def test_hang_up_while_held_counts_what_was_written(self, upstream: StandIn) -> None:
        upstream.next(Behaviour(tokens=100, hold_at=40))
        with raw_call(upstream, json.dumps(CHAT).encode()) as connection:
            read_until(connection, b"w39 ")
        seen = upstream.wait(lambda seen: seen.ended)
        assert (seen.emitted, seen.client_gone, seen.finished) == (40, True, False)

    def test_a_reader_that_stalls_stops_the_count(self, upstream: StandIn) -> None:
        """Nothing waits in the server's own buffer, so what is counted is with the kernel."""
        upstream.next(Behaviour(tokens=200_000, tokens_per_chunk=20))
        with raw_call(upstream, json.dumps(CHAT).encode()) as connection:
            read_until(connection, b"w0 ")
            connection.settimeout(0.5)
            stalled = upstream.wait(lambda seen: seen.emitted > 2000)
            connection.shutdown(socket.SHUT_RDWR)
        seen = upstream.wait_ended(stalled.id)
        assert seen.client_gone
        assert seen.emitted < 200_000

    def test_a_waiting_client_may_leave(self, upstream: StandIn) -> None:
        upstream.next(Behaviour(delay=3600))
        raw_call(upstream, json.dumps(CHAT).encode()).close()
        assert upstream.wait(lambda seen: seen.ended).client_gone

    def test_next_waits_for_its_path(self, http: httpx.Client, upstream: StandIn) -> None:
        upstream.next(Behaviour(tokens=1))
        upstream.next(Behaviour(status=503, error="busy"), path="/api/tags")
        assert http.get("/api/version").status_code == 200
        assert http.get("/api/tags").json() == {"error": "busy"}
        http.post("/api/chat", json=CHAT)
        assert upstream.last().emitted == 1

    def test_everything_is_recorded(self, http: httpx.Client, upstream: StandIn) -> None:
        body = b'{ "model":"smollm2" , "prompt": "\xc3\xa9" }'
        chunks = iter([body[:9], body[9:]])
        http.post("/api/generate?a=1", content=chunks, headers={"X-Twice": "1", "x-key": "s"})
        seen = upstream.last()
        assert (seen.method, seen.target, seen.body) == ("POST", "/api/generate?a=1", body)
        assert ("X-Twice", "1") in seen.headers
        assert (seen.header("X-KEY"), seen.prompt_tokens, seen.emitted) == ("s", 11, 7)

    def test_over_http(self, http: httpx.Client) -> None:
        assert http.post("/__standin__/next", json={"tokens": 2}).json() == {"ok": True}
        assert http.post("/__standin__/next", json={"tokns": 2}).status_code == 400
        http.post("/api/chat", json=CHAT)
        [entry] = http.get("/__standin__/log").json()
        assert (entry["emitted"], entry["body"]) == (2, json.dumps(CHAT, separators=(",", ":")))
        waited = http.get("/__standin__/wait", params={"state": "ended", "id": entry["id"]})
        assert waited.json() == entry
        late = http.get("/__standin__/wait", params={"state": "held", "timeout": "0"})
        assert late.status_code == 504

    def test_a_mistake_in_the_header_is_told(self, http: httpx.Client) -> None:
        answer = http.post("/api/chat", json=CHAT, headers={"x-standin": '{"tokns":1}'})
        assert (answer.status_code, "tokns" in answer.text) == (500, True)

    def test_nothing_met_the_check(self, upstream: StandIn) -> None:
        with pytest.raises(TimeoutError):
            upstream.wait(lambda seen: seen.held, timeout=0)

    def test_a_taken_port_is_an_error(self, upstream: StandIn) -> None:
        with pytest.raises(OSError, match="in use"):
            StandIn(port=upstream.port).__enter__()

    def test_as_a_process(self) -> None:
        command = [sys.executable, "-m", "tests.standin", "--models", "a,b", "--flavour", "openai"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            with urllib.request.urlopen(f"{url}/v1/models") as answer:  # noqa: S310
                assert [m["id"] for m in json.load(answer)["data"]] == ["a", "b"]
            process.terminate()
            assert process.wait(10) == 0


def test_seen_is_complete_as_json() -> None:
    seen = Seen(1, "POST", "/x", [("a", "b")], b"\xff")
    assert json.loads(json.dumps(seen.as_dict()))["body_base64"] == "/w=="
