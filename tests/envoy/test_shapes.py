"""facts.lua and shapes.lua: what an operator makes of parameters, told in the answer."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama.contract import SHAPE
from parallama.shapes import Shape, written
from tests.envoy.lua_host import Filter, Passed, chat, ollama
from tests.examples import examples

FACTS = Filter("facts")


def shape(**rules: Any) -> str:
    return written({"user": Shape.model_validate(rules)})["user"]


def through(body: bytes, metadata: dict[str, dict[str, object]]) -> Passed:
    passed = FACTS.request(body, metadata, {"content-length": str(len(body))})
    assert passed.logs == []
    assert passed.answer or passed.headers["content-length"] == str(len(passed.body))
    return passed


def openai(body: bytes, rules: str, **more: object) -> Passed:
    return through(body, chat(**{SHAPE: rules, **more}))


def local(body: bytes, rules: str, **more: object) -> Passed:
    return through(body, ollama(**{SHAPE: rules, **more}))


BOUND = shape(max_tokens={"max": 100, "default": 20})


@pytest.mark.parametrize(
    ("before", "after", "changed", "most"),
    [
        (b'{"model":"a"}', b'{"max_tokens":20,"model":"a"}', "max_tokens=20", "20"),
        (b'{"model":"a","max_tokens": 90 }', None, None, "90"),
        (b'{"model":"a","max_tokens":100}', None, None, "100"),
        (
            b'{"model":"a","max_tokens": 101 }', b'{"model":"a","max_tokens": 100 }',
            "max_tokens=100", "100",
        ),
        (b'{"model":"a","max_tokens":0}', b'{"model":"a","max_tokens":100}', "max_tokens=100",
         "100"),
        (b'{"model":"a","max_tokens":-1}', b'{"model":"a","max_tokens":100}', "max_tokens=100",
         "100"),
        (b'{"model":"a","max_tokens":null}', b'{"model":"a","max_tokens":20}', "max_tokens=20",
         "20"),
        (
            b'{"model":"a","max_completion_tokens":30}',
            b'{"max_tokens":30,"model":"a","max_completion_tokens":30}', "max_tokens=30", "30",
        ),
        (
            b'{"model":"a","max_tokens":7,"n_predict":-1}',
            b'{"model":"a","max_tokens":7,"n_predict":100}', "n_predict=100", "100",
        ),
        (b'{"model":"a","max_tokens":7,"n":3}', None, None, "21"),
    ],
)  # fmt: skip
def test_the_bound_of_openai_calls(
    before: bytes, after: bytes | None, changed: str | None, most: str
) -> None:
    passed = openai(before, BOUND)
    assert passed.body == (before if after is None else after)
    assert passed.facts.get("changed") == changed
    assert passed.facts["max_tokens"] == most


@pytest.mark.parametrize(
    ("before", "after", "changed", "most"),
    [
        (b'{"model":"a"}', b'{"options":{"num_predict":20},"model":"a"}', 20, "20"),
        (b'{"model":"a","options":null}', b'{"model":"a","options":{"num_predict":20}}', 20, "20"),
        (b'{"model":"a","options":{ }}', b'{"model":"a","options":{"num_predict":20 }}', 20, "20"),
        (
            b'{"model":"a","options":{"seed":1}}',
            b'{"model":"a","options":{"num_predict":20,"seed":1}}', 20, "20",
        ),
        (b'{"model":"a","options":{"num_predict":5}}', None, None, "5"),
        (
            b'{"model":"a","options":{"num_predict":-1}}',
            b'{"model":"a","options":{"num_predict":100}}', 100, "100",
        ),
        (
            b'{"model":"a","options":{"num_predict":-2}}',
            b'{"model":"a","options":{"num_predict":100}}', 100, "100",
        ),
        (
            b'{"model":"a","options":{"num_predict":1e9}}',
            b'{"model":"a","options":{"num_predict":100}}', 100, "100",
        ),
    ],
)  # fmt: skip
def test_the_bound_of_ollama_calls(
    before: bytes, after: bytes | None, changed: int | None, most: str
) -> None:
    passed = local(before, BOUND)
    assert passed.body == (before if after is None else after)
    assert passed.facts.get("changed") == (changed and f"num_predict={changed}")
    assert passed.facts["max_tokens"] == most
    assert local(before, shape(num_predict={"max": 100, "default": 20})).body == passed.body


def test_a_maximum_is_what_an_unbounded_answer_gets_without_a_default() -> None:
    rules = shape(max_tokens={"max": 100})
    assert openai(b'{"model":"a"}', rules).body == b'{"max_tokens":100,"model":"a"}'
    responses = openai(b'{"model":"a"}', rules, endpoint="/v1/responses")
    assert responses.body == b'{"max_output_tokens":100,"model":"a"}'
    messages = openai(
        b'{"model":"a","max_tokens":101}', rules, dialect="anthropic", endpoint="/v1/messages"
    )
    assert messages.body == b'{"model":"a","max_tokens":100}'


def test_a_default_alone_bounds_only_who_names_nothing() -> None:
    rules = shape(max_tokens={"default": 20})
    assert openai(b'{"model":"a"}', rules).body == b'{"max_tokens":20,"model":"a"}'
    for body in (b'{"model":"a","max_tokens":9000}', b'{"model":"a","max_completion_tokens":5}'):
        assert openai(body, rules).body == body


def test_what_is_set_is_always_so() -> None:
    rules = shape(max_tokens={"set": 50})
    assert openai(b'{"model":"a","max_tokens":9}', rules).body == b'{"model":"a","max_tokens":50}'
    assert openai(b'{"model":"a","max_tokens":50}', rules).facts.get("changed") is None
    rules = shape(num_gpu={"set": -1}, use_mmap={"set": True})
    passed = local(b'{"model":"a","options":{"num_gpu":3,"use_mmap":true}}', rules)
    assert passed.body == b'{"model":"a","options":{"num_gpu":-1,"use_mmap":true}}'
    assert passed.facts["changed"] == "num_gpu=-1"
    passed = local(b'{"model":"a"}', rules)
    assert passed.body == b'{"options":{"num_gpu":-1,"use_mmap":true},"model":"a"}'
    assert passed.facts["changed"] == "num_gpu=-1, use_mmap=true"


def test_what_is_dropped_is_sent_as_nothing() -> None:
    rules = shape(num_gpu={"drop": True}, keep_alive={"drop": True}, max_tokens={"drop": True})
    passed = local(
        b'{"keep_alive":0,"model":"a","options":{"num_gpu":3,"num_predict":5,"seed":1}}', rules
    )
    assert passed.body == (
        b'{"keep_alive":null,"model":"a","options":{"num_gpu":null,"num_predict":null,"seed":1}}'
    )
    assert passed.facts["changed"] == "num_predict=null, num_gpu=null, keep_alive=null"
    assert "max_tokens" not in passed.facts
    body = b'{"model":"a","options":{"num_gpu":null}}'
    assert local(body, rules).body == body
    passed = openai(b'{"model":"a","max_tokens":5,"n_predict":6}', rules)
    assert passed.body == b'{"model":"a","max_tokens":null,"n_predict":null}'


KEEP = shape(keep_alive={"max": "30m", "default": "5m"})
TOO_LONG = b'"1800s"'


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b"1800", None), (b"0", None), (b'"30m"', None), (b'"0.5h"', None), (b'"1800s"', None),
        (b'"29m60s"', None), (b'"0"', None), (b'"+5m"', None), (b'"1800000ms"', None),
        (b'"1\\u006d"', None), ('"5µs"'.encode(), None), ('"5μs"'.encode(), None), (b'"5us"', None),
        (b"1.5", None),
        (b"-1", TOO_LONG), (b'"-1"', TOO_LONG), (b'"-1m"', TOO_LONG), (b'"-1s"', TOO_LONG),
        (b"-0.5", TOO_LONG), (b"1801", TOO_LONG), (b'"30m1s"', TOO_LONG), (b'"24h"', TOO_LONG),
        (b"1e300", TOO_LONG), (b'"forever"', TOO_LONG), (b'"5"', TOO_LONG), (b'"5x"', TOO_LONG),
        (b'" 5m"', TOO_LONG), (b'"5m "', TOO_LONG), (b'""', TOO_LONG), (b'"1.2.3s"', TOO_LONG),
        (b'"m"', TOO_LONG), (b'"9' + b"9" * 200 + b's"', TOO_LONG), (b'"\\x"', TOO_LONG),
        (b"true", TOO_LONG), (b"[]", TOO_LONG), (b'{"a":1}', TOO_LONG), (b"NaN", TOO_LONG),
        (b"null", b'"300s"'),
    ],
)  # fmt: skip
def test_how_long_a_model_stays(sent: bytes, kept: bytes | None) -> None:
    body = b'{"keep_alive": %s ,"model":"a"}'
    passed = local(body % sent, KEEP)
    assert passed.body == body % (sent if kept is None else kept)
    said = None if kept is None else "keep_alive=" + kept.decode().strip('"')
    assert passed.facts.get("changed") == said


def test_keep_alive_is_nothing_in_openais_dialect() -> None:
    body = b'{"model":"a","keep_alive":-1}'
    assert openai(body, KEEP).body == body
    assert local(b'{"model":"a"}', KEEP).body == b'{"keep_alive":"300s","model":"a"}'
    forever = shape(keep_alive={"set": "forever"})
    assert local(b'{"model":"a"}', forever).body == b'{"keep_alive":-1,"model":"a"}'
    body = b'{"model":"a","keep_alive":"-5m"}'
    assert local(body, forever).body == body


@pytest.mark.parametrize(
    ("name", "sent", "after"),
    [
        ("num_ctx", b"8192", None), ("num_ctx", b"8193", 8192), ("num_ctx", b"1e9", 8192),
        ("num_ctx", b"0", 8192), ("num_ctx", b"-1", 8192), ("num_ctx", b'"9000"', 8192),
        ("num_ctx", b"true", 8192), ("num_ctx", b"[]", 8192), ("num_ctx", b"null", None),
        ("num_gpu", b"0", None), ("num_gpu", b"-1", 8192), ("main_gpu", b"0", None),
        ("num_thread", b"0", 8192), ("num_batch", b"512", None),
    ],
)  # fmt: skip
def test_numbers_above_a_maximum(name: str, sent: bytes, after: int | None) -> None:
    body = b'{"model":"a","options":{"%s":%s}}'
    passed = local(body % (name.encode(), sent), shape(**{name: {"max": 8192}}))
    expected = sent if after is None else str(after).encode()
    assert passed.body == body % (name.encode(), expected)
    assert passed.facts.get("changed") == (None if after is None else f"{name}={after}")


def test_a_maximum_is_no_default_but_for_answers() -> None:
    rules = shape(num_ctx={"max": 8192}, keep_alive={"max": "1h"})
    assert local(b'{"model":"a"}', rules).body == b'{"model":"a"}'


def test_what_computes_embeddings_writes_nothing() -> None:
    rules = shape(max_tokens={"max": 5}, num_ctx={"max": 10}, keep_alive={"max": 60})
    passed = local(
        b'{"model":"a","keep_alive":-1,"options":{"num_ctx":11}}', rules, endpoint="/api/embed"
    )
    assert passed.body == b'{"model":"a","keep_alive":"60s","options":{"num_ctx":10}}'
    assert openai(b'{"model":"a"}', rules, endpoint="/v1/embeddings").body == b'{"model":"a"}'


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","keep_alive":1,"keep_alive":-1}',
        b'{"model":"a","Keep_Alive":-1}',
        '{"model":"a","\u212aeep_alive":-1}'.encode(),
        b'{"model":"a","keep_al\\u0069ve":-1}',
        b'{"model":"a","options":{"num_ctx":1,"num_ctx":9000}}',
        b'{"model":"a","options":{"Num_Ctx":9000}}',
        b'{"model":"a","options":{"num_ct\\u0078":9000}}',
        b'{"model":"a","options":[]}',
        b'{"model":"a","options":{"num_predict":"7"}}',
    ],
)
def test_no_spelling_gets_round_a_rule(body: bytes) -> None:
    rules = shape(keep_alive={"max": 60}, num_ctx={"max": 8192}, max_tokens={"max": 5})
    passed = local(body, rules)
    assert passed.answer
    assert passed.answer.status == 400


def test_a_parameter_without_a_rule_is_nobodys_affair() -> None:
    body = b'{"model":"a","Keep_Alive":-1,"options":{"Num_Ctx":9,"num_ctx":8,"num_ctx":7}}'
    assert local(body, shape(num_batch={"max": 60})).body == body


def test_all_edits_of_one_request() -> None:
    rules = shape(max_tokens={"max": 9}, num_ctx={"max": 8}, keep_alive={"default": 60})
    passed = local(
        b'{ "model" : "gpt-4","options":{"num_ctx":9}}', rules, aliases="\ngpt-4\tllama2\n"
    )
    assert passed.body == (
        b'{"keep_alive":"60s", "model" : "llama2","options":{"num_predict":9,"num_ctx":8}}'
    )
    assert passed.facts["changed"] == "num_predict=9, num_ctx=8, keep_alive=60s"
    passed = openai(b'{"stream":true,"model":"gpt-4"}', rules, aliases="\ngpt-4\tllama2\n")
    assert passed.body == (
        b'{"max_tokens":9,"stream_options":{"include_usage":true},"stream":true,"model":"llama2"}'
    )


NUMBERS = st.one_of(st.none(), st.integers(-3, 20), st.just(1e9))
OPTIONS = ("num_ctx", "num_batch", "num_gpu", "num_thread", "num_predict", "seed")
RULES = st.one_of(
    st.builds(dict, max=st.integers(1, 10)),
    st.builds(lambda n: {"max": n, "default": max(1, n - 1)}, st.integers(1, 10)),
    st.builds(dict, set=st.integers(1, 10)),
    st.just({"drop": True}),
)


@examples(300)
@given(
    st.dictionaries(st.sampled_from(OPTIONS[:4]), RULES), st.none() | RULES,
    st.none() | st.dictionaries(st.sampled_from(OPTIONS), NUMBERS), st.sampled_from([None, 0, 2]),
)  # fmt: skip
def test_whatever_is_sent_what_goes_on_keeps_the_rules(
    rules: dict[str, Any], bound: Any, options: dict[str, Any] | None, indent: int | None
) -> None:
    if bound:
        rules = {**rules, "num_predict": bound}
    body = {"model": "a", **({} if options is None else {"options": options}), "x": [1]}
    passed = local(json.dumps(body, indent=indent).encode(), shape(**rules))
    sent, done = options or {}, json.loads(passed.body)
    after = done.get("options") or {}
    for name, rule in rules.items():
        value = after.get(name)
        least = 0 if name == "num_gpu" else 1
        if "drop" in rule:
            assert value is None
        elif "set" in rule:
            assert value == rule["set"]
        elif sent.get(name) is None:
            usual = rule.get("default", rule["max"] if name == "num_predict" else None)
            assert value == usual
        else:
            fits = least <= sent[name] <= rule["max"]
            assert value == (sent[name] if fits else rule["max"])
    untouched = {k: v for k, v in sent.items() if k not in rules}
    assert {k: v for k, v in after.items() if k not in rules} == untouched
    assert {**done, "options": None} == {**body, "options": None}
    told = passed.facts.get("changed")
    assert (told is None) == (after == sent)
