"""facts.lua: what a request's body says, or a refusal: never what some server reads otherwise."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama import contract
from tests.envoy.lua_host import Filter, Passed, authz, chat, ollama
from tests.examples import examples

FACTS = Filter("facts")


def read(body: bytes, **more: object) -> Passed:
    return FACTS.request(body, chat(**more))


def read_ollama(body: bytes, **more: object) -> Passed:
    return FACTS.request(body, ollama(**more))


def refusal(passed: Passed) -> tuple[int, str]:
    """Status and code of a refusal in the OpenAI dialect."""
    assert passed.answer, passed.facts
    assert passed.answer.headers == {"content-type": "application/json"}
    error = json.loads(passed.answer.body)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] is None
    assert error["message"]
    assert set(passed.facts) <= {"total_tokens"}
    return passed.answer.status, error["code"]


def test_facts_of_a_usual_body() -> None:
    body = b'{"messages":[{"role":"user","content":"hi"}],"model":"a","max_tokens":5}'
    assert read(body).facts == {
        "model": "a",
        "stream": False,
        "max_tokens": "5",
        "body_bytes": str(len(body)),
        "total_tokens": 0,
    }
    assert set(read(body).facts) <= contract.LUA_KEYS


def test_does_nothing_where_authz_does_not_ask() -> None:
    assert FACTS.request(b"not json", authz(dialect="openai")).facts == {}
    assert FACTS.request(b"not json", authz(read_body="true")).facts == {}
    assert FACTS.request(b"not json", {}).facts == {}
    assert FACTS.request(b"not json", authz(metered="1")).facts == {"total_tokens": 0}


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_the_upstream_is_told_that_it_is_json(content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    assert FACTS.request(b'{"model":"a"}', chat(), headers).headers == {
        "content-type": "application/json"
    }


def test_a_charset_cannot_give_the_body_another_meaning() -> None:
    headers = {"content-type": "application/json; charset=utf-7"}
    passed = FACTS.request(b'{"model":"a"}', chat(), headers)
    assert passed.headers == {"content-type": "application/json"}


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "identity, gzip", "GZIP"])
def test_compressed_bodies_are_refused(encoding: str) -> None:
    passed = FACTS.request(b"\x1f\x8b", chat(), {"content-encoding": encoding})
    assert refusal(passed) == (415, "unsupported_encoding")
    assert not FACTS.request(b'{"model":"a"}', chat(), {"content-encoding": "Identity"}).answer


def test_a_body_announced_too_large_is_refused_before_it_is_waited_for() -> None:
    passed = FACTS.request(b"{}", chat(), {"content-length": str(33554433)})
    assert refusal(passed) == (413, "request_too_large")


def test_an_empty_body_is_refused_in_both_dialects() -> None:
    for body in (None, b""):
        assert refusal(FACTS.request(body, chat())) == (400, "missing_body")
        answer = FACTS.request(body, ollama()).answer
        assert answer
        assert (answer.status, answer.body) == (400, b'{"error":"missing request body"}')


@pytest.mark.parametrize(
    "body",
    [
        b" ", b"[]", b'"model"', b"null", b"{", b'{"model"', b'{"model":', b'{"model":"a"',
        b'{"model":"a",', b'{"model":"a",}', b'{"model":"a"}}', b'{"model":"a"} {"model":"b"}',
        b'{"model":"a"}\0', b'\0{"model":"a"}', b'\xef\xbb\xbf{"model":"a"}',
        '{"model":"a"}'.encode("utf-16"), '{"model":"a"}'.encode("utf-16-le"),
        b'{"model":"a"}\x0b', b'\xc2\xa0{"model":"a"}', b'{"model" "a"}', b'{model:"a"}',
        b"{'model':'a'}", b'{"model":"a" "b":1}', b'{"model":"a","x":[[1,2}', b'{"x":"a',
        b'{"model":"a","x":"\\', b'{"\\x":1,"model":"a"}', b'{"\\ud800":1,"model":"a"}',
        b'{/**/"model":"a"}', b'{"model":,"x":1}', b'{"model":"a"}//',
    ],
)  # fmt: skip
def test_what_is_not_one_json_object_is_refused(body: bytes) -> None:
    assert refusal(read(body)) in {(400, "invalid_json"), (400, "invalid_model")}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"model":"a","model":"a"}', "duplicate_key"),
        (b'{"model":"a","Model":"b"}', "ambiguous_key"),
        (b'{"MODEL":"b"}', "ambiguous_key"),
        (b'{"model":"a","mode\\u006c":"b"}', "ambiguous_key"),
        (b'{"\\u004dodel":"b","model":"a"}', "ambiguous_key"),
        ('{"model":"a","\u017ftream":true}'.encode(), "ambiguous_key"),
        (b'{"model":"a","\\u017ftream":true}', "ambiguous_key"),
        ('{"model":"a","max_to\u212aens":9}'.encode(), "ambiguous_key"),
        (b'{"model":"a","stream":true,"stream":false}', "duplicate_key"),
        (b'{"model":"a","max_tokens":1,"Max_Tokens":9}', "ambiguous_key"),
        (b'{"model":"a","n":1,"N":9}', "ambiguous_key"),
    ],
)
def test_a_watched_key_is_spelled_in_one_way_and_once(body: bytes, code: str) -> None:
    assert refusal(read(body)) == (400, code)


def test_other_keys_may_repeat() -> None:
    passed = read(b'{"messages":1,"model":"a","messages":2,"seed":1,"Seed":2,"m\\u00f6del":3}')
    assert passed.facts["model"] == "a"


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b'"llama3.2:1b"', "llama3.2:1b"),
        (b'"a\\/b"', "a/b"),
        (b'"\\u0061\\"\\\\"', 'a"\\'),
        (b'"\\u00e9\\u20ac\\ud83d\\ude00"', "é€😀"),
        ('"é€😀"'.encode(), "é€😀"),
        (b'"' + b"\\u0061" * 256 + b'"', "a" * 256),
    ],
)
def test_model_names_are_decoded(raw: bytes, name: str) -> None:
    assert read(b'{ "model" :\t' + raw + b"\r\n}").facts["model"] == name
    assert json.loads(raw) == name


@pytest.mark.parametrize(
    "raw",
    [
        b'""', b"null", b"1", b"true", b"[]", b'{"a":"b"}', b'["a"]', b'"a\\u0000"', b'"a\\n"',
        b'"a\nb"', b'"a\x7f"', b'"\xc2\x85"', b'"\\u0085"', b'"\\ud800"', b'"\\ude00\\ude00"',
        b'"\\ud83d"', b'"\\ud83dx"', b'"\xff"', b'"\xc0\xad"',
        b'"\xf4\x90\x80\x80"', b'"\xed\xa0\x80"',
        b'"\xf5\x80\x80\x80"',
        b'"\xe2\x82"', b'"\\x"', b'"\\u00g0"', b'"' + b"a" * 257 + b'"',
        b'"' + b"a" * 100_000 + b'"',
    ],
)  # fmt: skip
def test_names_that_servers_read_differently_are_refused(raw: bytes) -> None:
    assert refusal(read(b'{"model":' + raw + b"}")) == (400, "invalid_model")


def test_metered_calls_need_a_model() -> None:
    assert refusal(read(b"{}")) == (400, "model_required")
    free = FACTS.request(b"{}", authz(read_body=True, dialect="openai"))
    assert free.facts == {"stream": False, "body_bytes": "2"}


def test_ollama_takes_the_old_name_for_the_model() -> None:
    assert read_ollama(b'{"name":"a"}').facts["model"] == "a"
    assert read_ollama(b'{"name":"a","model":"a"}').facts["model"] == "a"
    for body in (
        b'{"name":"a","model":"b"}',
        b'{"Name":"b","model":"a"}',
        b'{"name":"","model":"a"}',
    ):
        answer = read_ollama(body).answer
        assert answer
        assert answer.status == 400
        assert isinstance(json.loads(answer.body)["error"], str)
    assert read(b'{"name":"b","model":"a"}').facts["model"] == "a"


@pytest.mark.parametrize(
    ("endpoint", "body", "stream"),
    [
        ("/api/chat", b'{"model":"a"}', True),
        ("/api/generate", b'{"model":"a","stream":null}', True),
        ("/api/generate", b'{"model":"a","stream":false}', False),
        ("/api/embed", b'{"model":"a"}', False),
    ],
)
def test_ollama_streams_unless_told_not_to(endpoint: str, body: bytes, stream: bool) -> None:
    assert read_ollama(body, endpoint=endpoint).facts["stream"] is stream


@pytest.mark.parametrize("raw", [b"1", b'"true"', b"True", b"[]", b"{}", b"0"])
def test_stream_is_true_or_false(raw: bytes) -> None:
    assert refusal(read(b'{"model":"a","stream":' + raw + b"}")) == (400, "invalid_value")


@pytest.mark.parametrize(
    ("members", "most"),
    [
        ('"max_tokens":7', "7"),
        ('"max_tokens":7.0', "7"),
        ('"max_tokens":1e2', "100"),
        ('"max_tokens":7,"max_completion_tokens":9,"n_predict":8', "9"),
        ('"max_tokens":7,"n":3', "21"),
        ('"max_tokens":7,"n":2,"best_of":4', "28"),
        ('"max_tokens":7,"n":null,"best_of":0', "7"),
        ('"max_tokens":7,"n_predict":-1', None),
        ('"max_tokens":-1', None),
        ('"max_tokens":0', None),
        ('"max_tokens":null', None),
        ('"max_completion_tokens":7', None),
        ('"n_predict":7', None),
        ('"max_tokens":99999999999999999999', "1000000000"),
        ('"max_tokens":1e400', "1000000000"),
        ('"max_tokens":5,"n":1e300', "1000000000"),
        ('"options":{"num_predict":7}', None),
        ('"options":5', None),
    ],
)
def test_the_bound_of_openai_calls(members: str, most: str | None) -> None:
    assert read(b'{"model":"a",' + members.encode() + b"}").facts.get("max_tokens") == most


@pytest.mark.parametrize("raw", ["0.5", "-0.5", '"7"', "true", "[7]", "NaN", "Infinity", "0x10"])
def test_a_bound_is_an_integer(raw: str) -> None:
    for body in (b'{"model":"a","max_tokens":%s}', b'{"model":"a","max_tokens":1,"n":%s}'):
        assert refusal(read(body % raw.encode())) == (400, "invalid_value")


@pytest.mark.parametrize(
    ("prompt", "most"),
    [
        ('"hi"', "5"), ('["a","b","c"]', "15"), ("[[1,2],[3]]", "10"), ("[1,2,3]", "5"),
        ('[1,"a"]', "10"), ("[]", "5"), ('"[1,2]"', "5"),
    ],
)  # fmt: skip
def test_each_prompt_of_an_array_may_use_the_bound(prompt: str, most: str) -> None:
    body = b'{"model":"a","max_tokens":5,"prompt":%s}' % prompt.encode()
    assert read(body, endpoint="/v1/completions").facts["max_tokens"] == most


@pytest.mark.parametrize(
    ("members", "most"),
    [
        ('"options":{"num_predict":7}', "7"),
        ('"options":{"temperature":0,"num_predict":-1}', None),
        ('"options":{"num_predict":0}', None),
        ('"options":{}', None),
        ('"options":null', None),
        ('"max_tokens":7', None),
    ],
)
def test_the_bound_of_ollama_calls(members: str, most: str | None) -> None:
    assert read_ollama(b'{"model":"a",' + members.encode() + b"}").facts.get("max_tokens") == most


@pytest.mark.parametrize(
    "options",
    ['{"num_predict":1,"num_predict":9}', '{"Num_Predict":9}', "[]", '"x"', '{"num_predict":"7"}'],
)
def test_ollama_options_are_watched_too(options: str) -> None:
    answer = read_ollama(b'{"model":"a","options":%s}' % options.encode()).answer
    assert answer
    assert answer.status == 400


def test_absurd_shapes_are_read_or_refused_quickly() -> None:
    assert read(b'{"model":"a","x":' + b"[" * 50_000 + b"]" * 50_000 + b"}").facts["model"] == "a"
    assert read(b'{"x":"' + b'\\"' * 50_000 + b'","model":"a"}').facts["model"] == "a"
    assert read(b'{"x":"' + b"\\\\" * 50_000 + b'","model":"a"}').facts["model"] == "a"
    many = b"".join(b',"k%d":1' % i for i in range(20_000))
    assert refusal(read(b'{"model":"a"' + many + b"}")) == (400, "invalid_json")


def test_a_mistake_of_ours_refuses() -> None:
    broken = Filter("facts")
    broken.lua.execute(b"string.format = nil")
    passed = broken.request(b'{"model":"a"}', chat())
    assert passed.answer
    assert passed.answer.status == 500
    assert passed.logs


# What servers make of a JSON text.


def _pairs(text: str) -> list[tuple[str, Any]]:
    decoder = json.JSONDecoder(object_pairs_hook=list)
    pairs: list[tuple[str, Any]] = decoder.raw_decode(text.lstrip(" \t\r\n"))[0]
    return pairs


def go_sees(text: str, field: str) -> object:
    """Go's json.Decoder: keys without case, last one wins, null and what follows are skipped."""
    seen = None
    for key, value in _pairs(text):
        if key.casefold() == field and value is not None:
            seen = value
    return seen


def python_sees(text: str, field: str) -> object:
    """json.loads, and nlohmann::json for what both accept: exact keys, last one wins."""
    value = json.loads(text)
    return value.get(field) if isinstance(value, dict) else None


WORDS = ["model", "stream", "max_tokens", "messages", "x"]


@st.composite
def keys(draw: st.DrawFn) -> str:
    """A key's spelling in JSON: other case, letters that fold, escapes."""
    word = draw(st.sampled_from(WORDS))
    if draw(st.integers(0, 3)):
        return f'"{word}"'
    spelled = ""
    for letter in word:
        other = {"s": "\u017f", "k": "\u212a"}.get(letter, letter)
        letter = draw(st.sampled_from([letter, letter, letter, letter.upper(), other]))
        spelled += draw(st.sampled_from([letter, letter, f"\\u{ord(letter):04x}"]))
    return f'"{spelled}"'


VALUES = st.one_of(
    st.sampled_from(
        [
            '"a"', '"b"', '"\\u0061"', '"\\ud83d\\ude00"', '"\\ud800"', '"a\\u0000"', '""',
            "null", "true", "false",
            "1", "-1", "2.5", "1e2", "NaN", '"}"', '"\\\\"', '"\\""', '{"model":"z"}', "[]",
            '[{"model":"z"}]', '"\u00e9"',
        ]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
        ),
        max_leaves=6,
    ).map(json.dumps),
)  # fmt: skip
GAPS = st.sampled_from(["", "", "", " ", "\n", "\t\r\n", "\u00a0", "\x0b", ",", "}"])


@st.composite
def texts(draw: st.DrawFn) -> str:
    members = []
    for _ in range(draw(st.integers(0, 5))):
        key, value = draw(keys()), draw(VALUES)
        members.append(f"{draw(GAPS)}{key}{draw(GAPS)}:{draw(GAPS)}{value}{draw(GAPS)}")
    tail = draw(st.sampled_from(["", "", "", " ", "\n", "x", '{"model":"b"}', "\0"]))
    return draw(GAPS) + "{" + ",".join(members) + "}" + tail


def accepted(see: Any, text: str, field: str) -> tuple[bool, object]:
    try:
        return True, see(text, field)
    except ValueError:
        return False, None


@examples(300)
@given(texts())
def test_servers_see_what_we_see_or_are_not_asked(text: str) -> None:
    passed = read(text.encode())
    if passed.answer:
        assert passed.answer.status == 400
        return
    for see in (go_sees, python_sees):
        ok, model = accepted(see, text, "model")
        if ok:
            assert model == passed.facts["model"]
            assert (see(text, "stream") or False) == passed.facts["stream"]


@examples(150)
@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8), max_size=5))
def test_usual_bodies_are_never_refused(extra: dict[str, object]) -> None:
    watched = {*WORDS, "prompt", "n", "best_of", "options", "n_predict"}
    extra = {k: v for k, v in extra.items() if k.casefold() not in watched}
    for ascii_only in (True, False):
        body = {**extra, "model": "a", "stream": True}
        try:
            raw = json.dumps(body, ensure_ascii=ascii_only).encode()
        except UnicodeEncodeError:
            continue
        assert read(raw).facts.get("model") == "a"
