"""facts.lua: a name that is mapped becomes the model that it means, and no other byte changes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama.contract import ALIASES, AUTHZ, LUA_KEYS, SHAPE
from parallama.mappings import LONGEST_NAME, MOST, aliases, merged, target_of
from tests.envoy.lua_host import Filter, Passed, authz, chat, ollama
from tests.examples import examples

FACTS = Filter("facts")

TABLE = merged(
    {"gpt-4": "llama2:70b", "Org/Model:Q4": "hf.co/org/model:q4", "größe": "größer"},
    {"quo": 'a"b\\c'},
)
MAPPED = aliases(TABLE)


def read(body: bytes, table: str = MAPPED, **more: object) -> Passed:
    passed = FACTS.request(
        body, chat(**{ALIASES: table, **more}), {"content-length": str(len(body))}
    )
    assert passed.answer or passed.headers["content-length"] == str(len(passed.body))
    assert set(passed.facts) <= LUA_KEYS
    return passed


def read_ollama(body: bytes, table: str = MAPPED, **more: object) -> Passed:
    return read(body, table, **{"dialect": "ollama", "endpoint": "/api/chat", **more})


def asked(passed: Passed) -> tuple[object, object]:
    return passed.facts.get("model"), passed.facts.get("requested_model")


def test_a_name_becomes_what_it_means_and_other_bytes_stay() -> None:
    passed = read(b' {"x": 1.0,\n "model" : "gpt-4" , "seed":9007199254740993,"m":"gpt-4"}\n')
    assert (
        passed.body
        == b' {"x": 1.0,\n "model" : "llama2:70b" , "seed":9007199254740993,"m":"gpt-4"}\n'
    )
    assert asked(passed) == ("llama2:70b", "gpt-4")
    assert passed.facts["body_bytes"] == str(len(passed.body) - 5)


@pytest.mark.parametrize(
    ("said", "target"),
    [
        ("GPT-4", "llama2:70b"),
        ("gpt-4:latest", "llama2:70b"),
        ("Gpt-4:LATEST", "llama2:70b"),
        ("org/model:q4", "hf.co/org/model:q4"),
        ("größe", "größer"),
        ("quo", 'a"b\\c'),
        ("gpt-4:latest:latest", None),
        ("gpt-4:other", None),
        ("xgpt-4", None),
        ("gpt-4 ", None),
        ("llama2:70b", None),
        ("GRÖSSE", None),
        ("GRÖẞE", None),
        (":latest", None),
    ],
)
def test_names_are_found_as_ollama_finds_them(said: str, target: str | None) -> None:
    body = json.dumps({"model": said}).encode()
    passed = read(body)
    assert asked(passed) == ((target, said) if target else (said, None))
    assert json.loads(passed.body) == {"model": target or said}
    assert target is not None or passed.body == body
    assert target_of(TABLE, said) == target


def test_an_escaped_name_is_the_same_name() -> None:
    passed = read(b'{"model":"\\u0067pt\\u002d4"}')
    assert passed.body == b'{"model":"llama2:70b"}'
    assert asked(passed) == ("llama2:70b", "gpt-4")


def test_ollamas_old_name_is_mapped_with_the_new_one() -> None:
    for body, after in (
        (b'{"name":"gpt-4"}', b'{"name":"llama2:70b"}'),
        (
            b'{"name":"gpt-4","model":"gpt-4"}',
            b'{"name":"llama2:70b","model":"llama2:70b"}',
        ),
        (b'{"model":"gpt-4"}', b'{"model":"llama2:70b"}'),
    ):
        passed = read_ollama(body)
        assert passed.body == after
        assert asked(passed) == ("llama2:70b", "gpt-4")
    other = read(b'{"name":"gpt-4","model":"gpt-4"}')  # no name of a model in OpenAI's dialect
    assert other.body == b'{"name":"gpt-4","model":"llama2:70b"}'


def test_two_spellings_of_one_name_are_two_models_as_before() -> None:
    answer = read_ollama(b'{"name":"gpt-4","model":"GPT-4"}').answer
    assert answer
    assert answer.status == 400


def test_one_step_and_no_more() -> None:
    passed = read(b'{"model":"a"}', aliases({"a": "b", "b": "c"}))
    assert asked(passed) == ("b", "a")


def test_a_call_that_names_no_model_gets_the_default() -> None:
    table = aliases(TABLE, "smollm2")
    for body, after in (
        (b"{}", b'{"model":"smollm2"}'),
        (b'{ "x":1}', b'{"model":"smollm2", "x":1}'),
    ):
        passed = read_ollama(body, table)
        assert passed.body == after
        assert asked(passed) == ("smollm2", None)
    assert asked(read_ollama(b'{"model":":latest"}', table)) == (":latest", None)
    assert asked(read_ollama(b'{"model":"gpt-4"}', table)) == ("llama2:70b", "gpt-4")
    for body in (b'{"model":""}', b'{"model":null}', b'{"name":""}'):
        answer = read_ollama(body, table).answer
        assert answer
        assert answer.status == 400
    shown = FACTS.request(b"{}", authz(read_body=True, dialect="ollama", aliases=table))
    assert shown.body == b"{}"  # what shows a model is told which


def test_without_mappings_nothing_is_touched() -> None:
    for table in ("", aliases({})):
        assert read(b'{"model":"gpt-4"}', table).body == b'{"model":"gpt-4"}'


def test_what_shows_a_model_follows_the_mapping() -> None:
    told = authz(read_body=True, dialect="ollama", endpoint="/api/show", aliases=MAPPED)
    passed = FACTS.request(b'{"name":"gpt-4"}', told)
    assert passed.body == b'{"name":"llama2:70b"}'
    assert asked(passed) == ("llama2:70b", "gpt-4")


def test_the_table_leaves_the_metadata_with_the_request() -> None:
    """It would be in each line of the trail otherwise, of refused requests as well."""
    for body in (b'{"model":"gpt-4"}', b"no json", b""):
        passed = read(body, shape="\nnum_ctx max=1")
        assert passed.metadata[AUTHZ][ALIASES] == ""
        assert passed.metadata[AUTHZ][SHAPE] == ""
    gzip = FACTS.request(b"x", chat(aliases=MAPPED), {"content-encoding": "gzip"})
    assert gzip.metadata[AUTHZ][ALIASES] == ""


def test_the_wish_for_usage_is_made_in_the_same_pass() -> None:
    passed = read(b'{"model":"gpt-4","stream":true}')
    assert passed.body == (
        b'{"stream_options":{"include_usage":true},"model":"llama2:70b","stream":true}'
    )


def test_the_largest_table_there_can_be() -> None:
    table = {f"{n:03}" + "x" * (LONGEST_NAME - 3): f"{n:03}" + "y" * 253 for n in range(MOST)}
    for name in ("000", "199"):
        said = name + "X" * (LONGEST_NAME - 3)
        assert asked(read(json.dumps({"model": said}).encode(), aliases(table))) == (
            name + "y" * 253, said,
        )  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [b'{"model":"gpt-4","model":"x"}', b'{"model":"gpt-4","Model":"x"}', b'{"model":"gpt-4"', b"[]",
     b'{"mode\\u006c":"gpt-4"}', b'{"model":"' + b"g" * 10_000 + b'"}'],
)  # fmt: skip
def test_what_is_refused_without_a_mapping_is_refused_with_one(body: bytes) -> None:
    passed = read(body)
    assert passed.answer
    assert passed.answer.status == 400
    assert passed.body == body


# Refusals in Anthropic's words.


def test_a_refusal_in_anthropics_dialect() -> None:
    told = chat(dialect="anthropic", endpoint="/v1/messages")
    passed = FACTS.request(b'{"max_tokens":5}', told, {"x-request-id": "r-1"})
    assert passed.answer
    assert passed.answer.status == 400
    assert passed.answer.headers == {"content-type": "application/json"}
    assert json.loads(passed.answer.body) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "model is required"},
        "request_id": "r-1",
    }


def test_the_bound_of_messages_and_responses() -> None:
    messages = chat(dialect="anthropic", endpoint="/v1/messages")
    passed = FACTS.request(b'{"model":"a","max_tokens":7,"stream":true}', messages)
    assert passed.body == b'{"model":"a","max_tokens":7,"stream":true}'
    assert passed.facts["max_tokens"] == "7"
    assert "stream_usage" not in passed.facts
    responses = chat(endpoint="/v1/responses")
    for body, most in (
        (b'{"model":"a","max_output_tokens":7}', "7"),
        (b'{"model":"a","max_tokens":7}', None),
    ):
        assert FACTS.request(body, responses).facts.get("max_tokens") == most


NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="*"), min_size=1)
SHORT = NAMES.filter(lambda name: len(name.encode()) <= 60)
REST = st.dictionaries(
    st.text(max_size=5).filter(lambda key: key.casefold() not in {"n", "model", "stream", "name"}),
    st.none() | st.integers() | st.text(max_size=8),
    max_size=4,
)


@examples(200)
@given(
    st.dictionaries(SHORT, SHORT, max_size=5), SHORT, REST, st.booleans(), st.booleans(),
    st.sampled_from([None, 0, 2]),
)  # fmt: skip
def test_facts_and_python_agree_on_what_a_name_means(
    table: dict[str, str],
    said: str,
    rest: dict[str, object],
    mapped: bool,
    ascii_only: bool,
    indent: int | None,
) -> None:
    if mapped and table:
        said = next(iter(table)).swapcase() if said < "m" else next(iter(table))
    known = merged(table, {})
    body = {**rest, "model": said}
    passed = read(json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode(), aliases(known))
    if passed.answer:
        assert len(said.encode()) > LONGEST_NAME
        return
    target = target_of(known, said)
    assert json.loads(passed.body) == {**body, "model": target or said}
    assert asked(passed) == ((target, said) if target is not None else (said, None))


def test_ollama_reads_as_it_does_elsewhere() -> None:
    assert FACTS.request(b'{"model":"gpt-4"}', ollama()).facts["model"] == "gpt-4"
