"""texts.lua: the text of requests and answers goes into a namespace of its own, in bounds."""

import json
from base64 import b64decode, b64encode
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama import contract as c
from tests.envoy.lua_host import Filter, Passed, chat, ollama
from tests.examples import examples

FACTS, USAGE = Filter("facts"), Filter("usage")
SSE, NDJSON, JSON = "text/event-stream", "application/x-ndjson", "application/json"
COUNTED = {c.COUNT_TEXT: True}
PASSED_ON: dict[str, dict[str, object]] = {c.LUA: {c.TOTAL_TOKENS: 0, c.TEXT_COUNTED: True}}
MOST = 65536


def text(passed: Passed) -> dict[str, Any]:
    return passed.metadata.get(c.TEXT, {})


def prompt(passed: Passed) -> list[bytes]:
    found = text(passed).get(c.PROMPT)
    return b64decode(found).split(b"\n") if found else []


def answer(passed: Passed) -> list[bytes]:
    found, pieces, number = text(passed), [], 1
    while found.get(str(number)):
        pieces.append(b64decode(found[str(number)]))
        number += 1
    return b"".join(pieces).split(b"\n") if pieces else []


def asked(
    body: object, *, dialect: str = "openai", endpoint: str = "/v1/chat/completions"
) -> Passed:
    raw = body if isinstance(body, bytes) else json.dumps({"model": "m", **body}).encode()  # type: ignore[dict-item]
    passed = FACTS.request(raw, chat(dialect=dialect, endpoint=endpoint, **COUNTED))
    assert passed.answer is None, passed.answer
    assert passed.logs == []
    return passed


def told(
    chunks: list[bytes], kind: str, authz: dict[str, dict[str, object]] | None = None, **more: Any
) -> Passed:
    before = {**(authz or chat(**COUNTED)), **PASSED_ON, c.TEXT: {c.PROMPT: "aGk="}}
    passed = USAGE.response(chunks, before, kind, **more)
    assert passed.body == b"".join(chunks)
    assert not c.TEXT_KEYS & passed.facts.keys()
    return passed


def delta(index: int = 0, **members: object) -> bytes:
    said = {"model": "m", "choices": [{"index": index, "delta": members}]}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


# When.


def test_without_count_text_nothing_is_passed_on() -> None:
    body = json.dumps({"model": "m", "prompt": "hi"}).encode()
    assert c.TEXT not in FACTS.request(body, chat()).metadata
    before = {**chat(), c.LUA: {c.TOTAL_TOKENS: 0}}
    assert c.TEXT not in USAGE.response([delta(content="hi")], before, SSE).metadata
    plain = json.dumps({"choices": [{"message": {"content": "hi"}}]}).encode()
    assert c.TEXT not in USAGE.response([plain], before).metadata


def test_counting_text_adds_one_write_a_chunk() -> None:
    plain: dict[str, dict[str, object]] = {**chat(), c.LUA: {c.TOTAL_TOKENS: 0}}
    for metadata, sets in ((plain, 2), ({**chat(**COUNTED), **PASSED_ON}, 3)):
        stream = USAGE.open_response(metadata, SSE)
        stream.feed(delta(content="first"))
        before = stream.sets
        stream.feed(delta(content="a") + delta(content="b"))
        assert stream.sets - before == sets - 1


# Requests.


@pytest.mark.parametrize(
    ("body", "strings"),
    [
        ({"prompt": "one"}, ["one"]),
        ({"prompt": ["one", "two"]}, ["one", "two"]),
        ({"input": ["one", "two"]}, ["one", "two"]),
        ({"prompt": "one", "system": "two", "suffix": "three"}, ["one", "two", "three"]),
        ({"messages": [{"role": "user", "content": "one"}]}, ["one"]),
        (
            {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": "one"}]},
                    {"role": "user", "content": "two", "images": ["AAAA"]},
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "data:AAAA"}},
                            {"type": "text", "text": "three"},
                        ],
                    },
                    {"tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "four"}}]},
                    {"role": "tool", "content": "five", "tool_call_id": "x"},
                ]
            },
            ["one", "two", "three", "four", "five"],
        ),
        (
            {"messages": [{"tool_calls": [{"function": {"arguments": {"a": "one"}}}]}]},
            ['{"a": "one"}'],
        ),
        ({"tools": [{"type": "function"}], "prompt": ""}, ['[{"type": "function"}]']),
        (
            {"messages": [{"content": [{"type": "tool_use", "input": {"a": "one"}}]}]},
            ['{"a": "one"}'],
        ),
        ({"input": [{"type": "function_call_output", "output": "one"}]}, ["one"]),
        (
            {"system": [{"type": "text", "text": "one"}], "messages": [{"content": "two"}]},
            ["one", "two"],
        ),
        ({"instructions": "one", "input": [{"content": [{"text": "two"}]}]}, ["one", "two"]),
        ({"user": "nobody", "stop": ["x"], "format": "json"}, []),
        ({"prompt": [1, 2, 3]}, []),
        ({"prompt": None, "messages": {}, "input": 7}, []),
    ],
)
def test_the_text_of_a_request(body: dict[str, object], strings: list[str]) -> None:
    assert prompt(asked(body)) == [each.encode() for each in strings]


def test_strings_pass_as_they_were_written() -> None:
    raw = rb'{"model":"m","prompt":"\u00e9 \"\n\ud800 ' + b'\xff\xc3\x00"}'
    assert prompt(asked(raw)) == [rb"\u00e9 \"\n\ud800 " + b"\xff\xc3\x00"]


def test_a_long_request_is_passed_on_to_a_bound_and_the_rest_is_a_number() -> None:
    passed = asked(
        {"messages": [{"content": "x" * 50_000}, {"content": "y" * 50_000}, {"content": "z"}]}
    )
    assert b"\n".join(prompt(passed)) == b"x" * 50_000 + b"\n" + b"y" * (MOST - 50_001)
    assert text(passed)[c.PROMPT_MORE] == 100_001 - MOST + 1


def test_many_strings_are_looked_at_to_a_bound() -> None:
    passed = asked({"input": ["ab"] * 20_000})
    assert prompt(passed)[:10_000] == [b"ab"] * 10_000
    assert text(passed)[c.PROMPT_MORE] + len(b64decode(text(passed)[c.PROMPT])) > 20_000 * 3


def test_what_is_nested_deep_is_not_looked_into() -> None:
    deep = b"[" * 2000 + b'"x"' + b"]" * 2000
    assert prompt(asked(b'{"model":"m","input":' + deep + b',"prompt":"one"}')) == [b"one"]


# Answers.


@pytest.mark.parametrize(
    ("chunks", "kind", "authz", "strings"),
    [
        (
            [delta(role="assistant", content=""), delta(content="a"), delta(content=" b")],
            SSE,
            {},
            ["a b"],
        ),
        (
            [delta(reasoning_content="a"), delta(reasoning_content="b"), delta(content="c")],
            SSE,
            {},
            ["ab", "c"],
        ),
        (
            [delta(0, content="a"), delta(1, content="b"), delta(0, content="c")],
            SSE,
            {},
            ["a", "b", "c"],
        ),
        (
            [b'data: {"choices":[{"text":"a"}]}\n\n', b'data: {"choices":[{"text":"b"}]}\n\n'],
            SSE,
            {},
            ["ab"],
        ),
        (
            [
                delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": "{"}}]),
                delta(tool_calls=[{"index": 0, "function": {"arguments": "}"}}]),
            ],
            SSE,
            {},
            ["{}"],
        ),
        (
            [b'{"message":{"content":"a"}}\n{"message":{"content":"b"}}\n'],
            NDJSON,
            {"dialect": "ollama"},
            ["ab"],
        ),
        (
            [b'{"message":{"thinking":"a"}}\n{"response":"b"}\n'],
            NDJSON,
            {"dialect": "ollama"},
            ["a", "b"],
        ),
        (
            [b'{"message":{"content":"","tool_calls":[{"function":{"arguments":{"a":1}}}]}}\n'],
            NDJSON,
            {"dialect": "ollama"},
            ['{"a":1}'],
        ),
        (
            [
                b'{"choices":[{"message":{"content":"a","reasoning":"b"}},{"message":{"content":"c"}}]}'
            ],
            JSON,
            {},
            ["a", "c", "b"],
        ),
        ([b'{"data":[{"embedding":[0.1]}]}'], JSON, {"endpoint": "/v1/embeddings"}, []),
        (
            [b'event: content_block_delta\ndata: {"delta":{"type":"text_delta","text":"a"}}\n\n'],
            SSE,
            {"endpoint": "/v1/messages"},
            ["a"],
        ),
        (
            [
                b'data: {"content_block":{"type":"tool_use","input":{}}}\n\n',
                b'data: {"delta":{"type":"input_json_delta","partial_json":"{\\"a\\":"}}\n\n',
                b'data: {"delta":{"type":"input_json_delta","partial_json":"1}"}}\n\n',
            ],
            SSE,
            {"endpoint": "/v1/messages"},
            [r"{\"a\":1}"],
        ),
        (
            [
                b'{"content":[{"type":"thinking","thinking":"a"},{"type":"text","text":"b"},'
                b'{"type":"tool_use","input":{"c":1}}]}'
            ],
            JSON,
            {"endpoint": "/v1/messages"},
            ["b", "a", '{"c":1}'],
        ),
        (
            [
                b'{"instructions":"x","text":{"format":{"type":"text"}},"output":[{"content":'
                b'[{"type":"output_text","text":"a"}]},{"type":"function_call","arguments":"{}"}]}'
            ],
            JSON,
            {"endpoint": "/v1/responses"},
            ["a", "{}"],
        ),
        (
            [
                b'data: {"type":"response.output_text.delta","delta":"a"}\n\n',
                b'data: {"type":"response.output_text.done","text":"a"}\n\n',
            ],
            SSE,
            {"endpoint": "/v1/responses"},
            ["a"],
        ),
    ],
)
def test_the_text_of_an_answer(
    chunks: list[bytes], kind: str, authz: dict[str, object], strings: list[str]
) -> None:
    for sent in (chunks, [b"".join(chunks)], [bytes([at]) for at in b"".join(chunks)]):
        passed = told(sent, kind, chat(**{**COUNTED, **authz}))
        assert answer(passed) == [each.encode() for each in strings]
        assert prompt(passed) == [b"hi"]


def test_each_chunk_leaves_what_was_delivered_behind() -> None:
    """A client that leaves ends the stream without another word to Lua."""
    stream = USAGE.open_response({**chat(**COUNTED), **PASSED_ON}, SSE)
    for n in range(1000):
        stream.feed(delta(content=f"{n:04}"))
        if n % 50 == 0:
            assert answer(stream.passed(b"")) == [b"".join(b"%04d" % m for m in range(n + 1))]
    pieces = text(stream.passed(b""))
    assert len(pieces) == 4
    assert max(len(b64decode(piece)) for piece in pieces.values()) < 1100


@pytest.mark.parametrize("kind", [SSE, NDJSON, JSON])
def test_a_long_answer_is_passed_on_to_a_bound(kind: str) -> None:
    authz = ollama(**COUNTED) if kind == NDJSON else chat(**COUNTED)
    if kind == SSE:
        chunks = [delta(content="x" * 1000)] * 100
    elif kind == NDJSON:
        chunks = [json.dumps({"response": "x" * 1000}).encode() + b"\n"] * 100
    else:
        chunks = [json.dumps({"choices": [{"message": {"content": "x" * 100_000}}]}).encode()]
    passed = told(chunks, kind, authz)
    assert answer(passed) == [b"x" * MOST]
    assert text(passed)[c.ANSWER_MORE] == 100_000 - MOST


USED = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
USED_OLLAMA = b'"done":true,"prompt_eval_count":7,"eval_count":2}'


@pytest.mark.parametrize(
    ("chunks", "kind", "authz", "status"),
    [
        (
            [
                delta(content="a"),
                b"data: " + json.dumps({"choices": [], "usage": USED}).encode() + b"\n\n",
            ],
            SSE,
            chat,
            200,
        ),
        ([b'{"response":"a"}\n{' + USED_OLLAMA + b"\n"], NDJSON, ollama, 200),
        ([b'{"response":"a",' + USED_OLLAMA], JSON, ollama, 200),
        ([json.dumps({"choices": [{"text": "a"}], "usage": USED}).encode()], JSON, chat, 200),
        ([b'{"error":"no"}'], JSON, ollama, 200),
        ([b'{"error":"no"}'], JSON, chat, 500),
        ([b"pixels"], "image/png", chat, 200),
        ([b"data: [DONE]\n\n"], SSE, chat, 200),
        ([], JSON, chat, 200),
    ],
    ids=[
        "SSE",
        "NDJSON",
        "JSON, Ollama",
        "JSON",
        "an error",
        "500",
        "a picture",
        "nothing",
        "no body",
    ],
)
def test_text_that_is_not_needed_is_taken_back(
    chunks: list[bytes], kind: str, authz: Any, status: int
) -> None:
    passed = told(chunks, kind, authz(**COUNTED), status=status)
    assert not any(value for value in text(passed).values())


@examples(100)
@given(st.lists(st.binary(max_size=60), max_size=6), st.sampled_from([SSE, NDJSON, JSON]))
def test_bytes_of_any_kind_pass_and_break_nothing(chunks: list[bytes], kind: str) -> None:
    passed = told(chunks, kind)
    for value in text(passed).values():
        assert (
            isinstance(value, bool | float | int) or b64encode(b64decode(value)).decode() == value
        )


@examples(50)
@given(st.binary(max_size=40))
def test_an_answer_that_is_cut_anywhere_is_text_up_to_there(noise: bytes) -> None:
    line = delta(content="hello") + b'data: {"choices":[{"delta":{"content":"' + noise
    passed = told([line], SSE)
    assert b"".join(answer(passed)).startswith(b"hello")
