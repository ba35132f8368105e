"""cap.lua where limits are hard: no answer may be longer than what was granted."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama.contract import CAP, RATELIMIT
from tests.envoy.lua_host import Filter, chat, ollama
from tests.examples import examples

FACTS, CAP_FILTER = Filter("facts"), Filter("cap")


def capped(body: bytes, cap: int | None, asked: dict[str, dict[str, object]]) -> bytes:
    read = FACTS.request(body, asked, {"content-length": str(len(body))})
    assert read.answer is None, read.answer
    limits = {RATELIMIT: {} if cap is None else {CAP: str(cap)}}
    passed = CAP_FILTER.request(read.body, {**read.metadata, **limits}, read.headers)
    assert passed.logs == []
    assert passed.headers["content-length"] == str(len(passed.body))
    return passed.body


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"a"}', b'{"max_tokens":50,"model":"a"}'),
        (b'{"model":"a","max_tokens": 9 }', b'{"model":"a","max_tokens": 9 }'),
        (b'{"model":"a","max_tokens": 90 }', b'{"model":"a","max_tokens": 50 }'),
        (b'{"model":"a","max_tokens":null}', b'{"model":"a","max_tokens":50}'),
        (b'{"model":"a","max_tokens":-1}', b'{"model":"a","max_tokens":50}'),
        (b'{"model":"a","max_tokens":0}', b'{"model":"a","max_tokens":50}'),
        (
            b'{"model":"a","max_completion_tokens":90}',
            b'{"max_tokens":50,"model":"a","max_completion_tokens":50}',
        ),
        (
            b'{"model":"a","n_predict":-1,"max_tokens":7}',
            b'{"model":"a","n_predict":50,"max_tokens":7}',
        ),
        (b'{"model":"a","n":4}', b'{"max_tokens":12,"model":"a","n":4}'),
        (
            b'{"model":"a","stream":true}',
            b'{"max_tokens":50,"stream_options":{"include_usage":true},"model":"a","stream":true}',
        ),
    ],
)
def test_openai(before: bytes, after: bytes) -> None:
    done = capped(before, 50, chat())
    assert json.loads(done) == json.loads(after)
    assert len(done) == len(after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"a"}', b'{"options":{"num_predict":50},"model":"a"}'),
        (b'{"model":"a","options":null}', b'{"model":"a","options":{"num_predict":50}}'),
        (b'{"model":"a","options":{ }}', b'{"model":"a","options":{"num_predict":50 }}'),
        (
            b'{"model":"a","options":{"seed":1}}',
            b'{"model":"a","options":{"num_predict":50,"seed":1}}',
        ),
        (
            b'{"model":"a","options":{"num_predict":-2}}',
            b'{"model":"a","options":{"num_predict":50}}',
        ),
        (
            b'{"model":"a","options":{"num_predict":7}}',
            b'{"model":"a","options":{"num_predict":7}}',
        ),
    ],
)
def test_ollama(before: bytes, after: bytes) -> None:
    assert capped(before, 50, ollama()) == after


def test_prompts_in_an_array_share_what_was_granted() -> None:
    body = b'{"model":"a","prompt":["x","y","z"],"max_tokens":100}'
    asked = chat(endpoint="/v1/completions")
    assert json.loads(capped(body, 50, asked))["max_tokens"] == 16
    tokens = b'{"model":"a","prompt":[1,2,3],"max_tokens":100}'
    assert json.loads(capped(tokens, 50, asked))["max_tokens"] == 50


def test_without_a_cap_nothing_is_touched() -> None:
    assert capped(b'{"model":"a","max_tokens":9}', None, chat()) == b'{"model":"a","max_tokens":9}'


BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
bound = st.one_of(st.none(), st.integers(-2, 3000))
others = st.dictionaries(
    st.text(alphabet='abcxyz é"\\', max_size=5).map(lambda name: "x" + name),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
        lambda inner: st.lists(inner, max_size=3),
    ),
    max_size=3,
)


@examples(300)
@given(
    st.dictionaries(st.sampled_from(BOUNDS), bound), others, st.integers(1, 5),
    st.booleans(), st.integers(1, 5000), st.sampled_from([None, 1]),
)  # fmt: skip
def test_whatever_is_asked_for_no_bound_passes_the_cap(
    bounds: dict[str, int | None], rest: dict[str, Any], n: int, stream: bool, cap: int,
    indent: int | None,
) -> None:  # fmt: skip
    asked = {**rest, "model": "a", **bounds, "n": n, "stream": stream}
    done = json.loads(capped(json.dumps(asked, indent=indent).encode(), cap, chat()))
    most = max(1, cap // n)
    assert 0 < done["max_tokens"] <= most
    for name in BOUNDS:
        if done.get(name) is not None:
            assert 0 < done[name] <= most
            if bounds.get(name) is not None and 0 < bounds[name] <= most:
                assert done[name] == bounds[name]
    changed = {*BOUNDS, "stream_options"}
    assert {k: v for k, v in done.items() if k not in changed} == {
        k: v for k, v in asked.items() if k not in changed
    }
