"""facts.lua edits: a stream asks for its usage, and every other byte stays."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.envoy.lua_host import Filter, Passed, chat
from tests.examples import examples

FACTS = Filter("facts")


def through(body: bytes, **more: object) -> Passed:
    read = FACTS.request(body, chat(**more), {"content-length": str(len(body))})
    assert read.answer is None, read.answer
    return read


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            b'{"model":"a","stream":true}',
            b'{"stream_options":{"include_usage":true},"model":"a","stream":true}',
        ),
        (
            b' {\n "model":"a",  "stream":true,'
            b' "seed":9007199254740993, "x":1.0, "\\u00e9":"\xc3\xa9"}\n',
            b' {"stream_options":{"include_usage":true},\n "model":"a",  "stream":true,'
            b' "seed":9007199254740993, "x":1.0, "\\u00e9":"\xc3\xa9"}\n',
        ),
        (
            b'{"model":"a","stream":true,"stream_options": null }',
            b'{"model":"a","stream":true,"stream_options": {"include_usage":true} }',
        ),
        (
            b'{"stream_options":{ },"model":"a","stream":true}',
            b'{"stream_options":{"include_usage":true },"model":"a","stream":true}',
        ),
        (
            b'{"stream_options":{"x":1},"model":"a","stream":true}',
            b'{"stream_options":{"include_usage":true,"x":1},"model":"a","stream":true}',
        ),
        (
            b'{"stream_options":{"include_usage": false ,"x":1},"model":"a","stream":true}',
            b'{"stream_options":{"include_usage": true ,"x":1},"model":"a","stream":true}',
        ),
        (
            b'{"stream_options":{"include_usage":null},"model":"a","stream":true}',
            b'{"stream_options":{"include_usage":true},"model":"a","stream":true}',
        ),
    ],
)
def test_the_smallest_edit(before: bytes, after: bytes) -> None:
    passed = through(before)
    assert passed.body == after
    assert passed.facts["stream_usage"] == "ours"
    assert passed.headers["content-length"] == str(len(after))
    assert json.loads(after)["stream_options"]["include_usage"] is True


def test_a_client_that_asks_keeps_its_body() -> None:
    body = b'{"model":"a","stream":true,"stream_options":{"include_usage":true}}'
    passed = through(body)
    assert passed.body == body
    assert passed.facts["stream_usage"] == "client"


@pytest.mark.parametrize(
    ("body", "more"),
    [
        (b'{"model":"a"}', {}),
        (b'{"model":"a","stream":false,"stream_options":7}', {}),
        (b'{"model":"a","stream":true}', {"endpoint": "/v1/embeddings"}),
        (b'{"model":"a","stream":true}', {"metered": None}),
        (b'{"model":"a","stream":true}', {"dialect": "ollama", "endpoint": "/api/chat"}),
    ],
)
def test_other_calls_are_left_alone(body: bytes, more: dict[str, object]) -> None:
    passed = through(body, **more)
    assert passed.body == body
    assert "stream_usage" not in passed.facts


@pytest.mark.parametrize(
    "options",
    [
        b"true", b"[]", b'"x"', b"1", b'{"include_usage":1}', b'{"include_usage":"true"}',
        b'{"include_usage":true,"include_usage":false}', b'{"Include_Usage":true}',
        b'{"include_u\\u0073age":true}', b'{"include_u\xc5\xbfage":false}',
    ],
)  # fmt: skip
def test_what_cannot_be_edited_safely_is_refused(options: bytes) -> None:
    answer = FACTS.request(
        b'{"model":"a","stream":true,"stream_options":' + options + b"}", chat()
    ).answer
    assert answer
    assert answer.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=5,
)  # fmt: skip
OTHER = st.text(max_size=5).filter(lambda key: key.casefold() not in {"n", "model", "stream"})


@examples(100)
@given(
    st.dictionaries(OTHER, JSON, max_size=3),
    st.none() | st.dictionaries(OTHER, JSON, max_size=2),
    st.sampled_from([None, 0, 1, 3]),
)
def test_only_the_wish_for_usage_changes(
    extra: dict[str, object], options: dict[str, object] | None, indent: int | None
) -> None:
    body = {**extra, "model": "a", "stream": True, "stream_options": options}
    after = json.loads(through(json.dumps(body, indent=indent).encode()).body)
    assert after == {**body, "stream_options": {**(options or {}), "include_usage": True}}
