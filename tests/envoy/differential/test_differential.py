"""No body is read in one way by facts.lua and in another by the server that it is sent to."""

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from time import process_time
from typing import Any

import pytest

from parallama.contract import LUA
from tests.envoy.differential import readers
from tests.envoy.differential.readers import FIELDS, MODELS, Real
from tests.envoy.differential.texts import Text, Texts
from tests.envoy.differential.trial import lua, tried, unfaithful, views
from tests.envoy.lua_host import Answer, Filter, Passed, chat, ollama
from tests.examples import TIMES

SEED = 1 if TIMES == 1 else random.SystemRandom().randrange(1 << 32)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[Real]:
    folder = tmp_path_factory.mktemp("readers")
    made = (make(folder) for make in (readers.real_go, readers.real_nlohmann))
    return [each for each in made if each]


def test_no_text_is_read_in_two_ways(real: list[Real]) -> None:
    count = 4000 * TIMES
    told = tried(islice(Texts(SEED), count), lua(), real)
    assert not told.wrong, (SEED, told.wrong[:3])
    assert told.texts == count
    assert told.read > count / 3, "most are refused: that shows nothing"
    assert told.edited > count / 8
    assert told.refused > count / 8


def test_the_models_are_true_to_what_they_stand_for(real: list[Real]) -> None:
    """Of texts that are refused, too."""
    if not real:
        pytest.skip("neither Go nor nlohmann/json is here")
    bodies = [text.body for text in islice(Texts(SEED + 1), 3000 * TIMES)]
    for each in real:
        for body, models, seen in zip(
            bodies, views(bodies, (), []), each.read(bodies), strict=True
        ):
            assert not [*unfaithful(body, models, seen)]


# The trial itself: whoever is careless is found out.


def _careless(read: Callable[[bytes], dict[str, Any]]) -> Callable[[Text], Passed]:
    """A filter that believes some parser."""

    def facts(text: Text) -> Passed:
        try:
            body = read(text.body)
            model, stream = body["model"], body.get("stream", text.endpoint in _STREAM)
        except (ValueError, KeyError, TypeError, RecursionError):
            return Passed({}, text.body, {}, Answer(400, {}, b""))
        told = {"model": model, "stream": stream, "body_bytes": str(len(text.body))}
        return Passed({}, text.body, {LUA: told}, None)

    return facts


_STREAM = ("/api/chat", "/api/generate")


def _first(body: bytes) -> dict[str, Any]:
    pairs = json.loads(body, object_pairs_hook=list)
    return dict(reversed(pairs))


def _without_case(body: bytes) -> dict[str, Any]:
    return {key.lower(): value for key, value in json.loads(body).items()}


def _found(text: bytes) -> dict[str, Any]:
    name = text.partition(b'"model":')[2].partition(b'"')[2].partition(b'"')[0]
    return {"model": name.decode()}


@pytest.mark.parametrize("read", [json.loads, _first, _without_case, _found])
def test_a_careless_reader_is_found_out(read: Callable[[bytes], dict[str, Any]]) -> None:
    texts = (
        text
        for text in islice(Texts(1), 4000)
        if not (
            text.table
            or text.usual
            or text.shape
            or text.cap
            or text.plain
            or b"stream" in text.body
        )
    )
    wrong = tried(texts, _careless(read)).wrong
    assert [line for line in wrong if "asked for" in line]


def _edited_by(change: Callable[[bytes], bytes]) -> Iterator[str]:
    facts = lua()

    def broken(text: Text) -> Passed:
        passed = facts(text)
        if passed.body != text.body:
            passed.body = change(passed.body)
        return passed

    yield from tried(islice(Texts(1), 500), broken).wrong


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda body: body.replace(b" ", b""), id="a space less"),
        pytest.param(lambda body: body.replace(b"{", b"{ ", 1), id="a space more"),
        pytest.param(lambda body: body.replace(b"7.0", b"7"), id="a number in another form"),
        pytest.param(lambda body: body.replace(b"\\u0061", b"a"), id="an escape less"),
        pytest.param(lambda body: body.replace(b"}", b"},", 1), id="a comma more"),
        pytest.param(lambda body: body[:-1], id="a byte less"),
        pytest.param(lambda body: body.replace(b'"model"', b'"Model"'), id="a letter"),
    ],
)
def test_an_edit_that_touches_more_is_found_out(change: Callable[[bytes], bytes]) -> None:
    assert [*_edited_by(change)]


# What servers do that is not what one expects.


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (b'{"model":"a","model":"b"}', {"python": "b", "nlohmann": "b", "go": "b"}),
        (b'{"model":"a","MODEL":"b"}', {"python": "a", "nlohmann": "a", "go": "b"}),
        (b'{"model":"a","mode\\u006c":"b"}', {"python": "b", "nlohmann": "b", "go": "b"}),
        (b'{"model":"a"} {"model":"b"}', {"go": "a"}),
        (b'{"model":"a"}\0{', {"nlohmann": "a", "go": "a"}),
        (b'\xef\xbb\xbf{"model":"a"}', {"python": "a", "nlohmann": "a"}),
        ('{"model":"a"}'.encode("utf-16"), {"python": "a"}),
        (b'{"model":"a","x":NaN}', {"python": "a"}),
        (b'{"model":"a","x":1e400}', {"python": "a", "go": "a"}),
        (b'{"model":"a","x":"\xff"}', {"go": "a"}),
        (b'{"model":"a","x":"\\ud800"}', {"python": "a", "go": "a"}),
        (b'{"model":"a","model":null}', {"python": None, "nlohmann": None, "go": "a"}),
        (b'{"model":"a",}', {}),
        (b'[{"model":"a"}]', {}),
    ],
)
def test_what_the_models_say(body: bytes, seen: dict[str, str | None]) -> None:
    sees = {name.partition(",")[0]: read(body) for name, read in reversed(MODELS.items())}
    sees["go"] = readers.go_typed(body)
    assert {name: view["model"] for name, view in sees.items() if view is not None} == seen


@pytest.mark.parametrize("key", ["\u017ftream", "STREAM", "\\u017Ftream", "s\\u0054ream"])
def test_go_takes_other_spellings_of_a_key(key: str) -> None:
    body = f'{{"model":"a","{key}":true}}'.encode()
    assert {name: view["stream"] for name, read in MODELS.items() if (view := read(body))} == {
        "python": None,
        "nlohmann": None,
        "go, typed": True,
        "go, untyped": True,
    }


def test_a_view_has_all_fields() -> None:
    for name, read in MODELS.items():
        view = read(b"{}")
        assert view is not None, name
        assert set(view) == set(FIELDS)


# What it costs. The machine may be busy: times are compared, never measured.

FACTS = Filter("facts")
MB = 1 << 20


def cost(call: Callable[[], object]) -> float:
    """CPU seconds of the cheapest of some calls."""
    spent = []
    for _ in range(3):
        began = process_time()
        call()
        spent.append(process_time() - began)
    return min(spent)


def test_an_image_of_10_mb_costs_less_than_to_parse_it() -> None:
    """2 ms where Python's parser in C takes 7."""
    image = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,%b"}}' % (
        b"A" * 10 * MB
    )
    body = b'{"model":"a","messages":[{"role":"user","content":[%b]}]}' % image
    assert FACTS.request(body, chat()).facts["model"] == "a"
    assert cost(lambda: FACTS.request(body, chat())) < cost(lambda: json.loads(body))


HOSTILE: dict[str, Callable[[int], bytes]] = {
    "keys": lambda n: b'{"model":"a"%b}' % (b',"x":1' * (n // 6)),
    "keys inside": lambda n: b'{"model":"a","x":{%b"y":1}}' % (b'"x":1,' * (n // 6)),
    "one long key": lambda n: b'{"model":"a","%b":1}' % (b"x" * n),
    "one long key of escapes": lambda n: b'{"model":"a","%b":1}' % (b"\\u0061" * (n // 6)),
    "long keys of escapes": lambda n: (
        b'{"model":"a"%b}' % (b',"%b":1' % (b"\\u0061" * 200) * (n // 1205))
    ),
    "a long name": lambda n: b'{"model":"%b"}' % (b"\\u0061" * (n // 6)),
    "arrays in arrays": lambda n: b'{"model":"a","x":%b%b}' % (b"[" * (n // 2), b"]" * (n // 2)),
    "objects in objects": lambda n: (
        b'{"model":"a","x":%b1%b}' % (b'{"":' * (n // 5), b"}" * (n // 5))
    ),
    "never closed": lambda n: b'{"model":"a","x":' + b"[" * n,
    "quotes": lambda n: b'{"model":"a","x":"%b"}' % (b'\\"' * (n // 2)),
    "backslashes": lambda n: b'{"model":"a","x":"%b"}' % (b"\\\\" * (n // 2)),
    "backslashes, never closed": lambda n: b'{"model":"a","x":"' + b"\\" * n + b'"',
    "empty strings": lambda n: b'{"model":"a","x":[%b""]}' % (b'"",' * (n // 3)),
    "numbers": lambda n: b'{"model":"a","x":[%b1]}' % (b"1," * (n // 2)),
    "one long number": lambda n: b'{"model":"a","max_tokens":%b}' % (b"1" * n),
    "one long word": lambda n: b'{"model":"a","stream":%b}' % (b"t" * n),
    "space": lambda n: b'{"model":"a"%b}' % (b" " * n),
    "prompts": lambda n: b'{"model":"a","max_tokens":1,"prompt":[%b1]}' % (b"1," * (n // 2)),
    "options": lambda n: b'{"model":"a","options":{%b"x":1}}' % (b'"x":1,' * (n // 6)),
    "keep_alive": lambda n: b'{"model":"a","keep_alive":"%b"}' % (b"1h" * (n // 2)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_a_hostile_body_costs_grows_no_faster_than_it(what: str) -> None:
    def read(body: bytes) -> Callable[[], object]:
        calls = (
            chat(endpoint="/v1/completions", shape="\nmax_tokens max=5"),
            ollama(shape="\nnum_ctx max=5\nkeep_alive max=5"),
        )
        return lambda: [FACTS.request(body, call) for call in calls]

    small, large = HOSTILE[what](MB // 8), HOSTILE[what](2 * MB)
    assert cost(read(large)) < 4 * 16 * max(cost(read(small)), 0.0005)  # its square would be 256
