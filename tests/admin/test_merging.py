"""What a caller sees of lists of models: no more than they may use, and no less."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama.admin.catalog.merging import (
    ALL,
    Alias,
    Listed,
    Unreadable,
    View,
    models,
    one,
    read_list,
    shown,
    text,
)
from tests.examples import examples

GPT = Alias("gpt-4", "llama3")


def body(*names: str, key: str = "models", field: str = "name") -> bytes:
    return text({key: [{field: name, "size": 1} for name in names]})


def view(*allowed: str, aliases: Sequence[Alias] = ()) -> View:
    return View(allowed or ALL, tuple(aliases))


def names(answer: bytes, key: str = "models", field: str = "name") -> list[Any]:
    return [entry.get(field) for entry in json.loads(answer)[key]]


@pytest.mark.parametrize(
    "raw",
    [
        b'{ "models" : [ {"name":"a","n":1.0,"big":12345678901234567890} ] }\n',
        b'{"object":"list","data":[{"id":"\\u0061"}]}',
        b'{"models":null}',
        b'{"models":[1,[],"a"]}',
    ],
)
@pytest.mark.parametrize("seen", [view(), view(aliases=[Alias("gpt-4", "not there")])])
def test_what_changes_nothing_leaves_every_byte(raw: bytes, seen: View) -> None:
    assert shown(raw, seen) is raw


@pytest.mark.parametrize(
    ("allowed", "left"),
    [
        (["a"], ["a:latest"]),
        (["b*"], ["b1", "b2:7b"]),
        (["a", "b2*"], ["a:latest", "b2:7b"]),
        (["c"], []),
        (["A"], []),
        ([""], []),
    ],
)
@pytest.mark.parametrize(
    ("key", "field"), [("models", "name"), ("models", "model"), ("data", "id")]
)
def test_a_restricted_key_sees_what_it_may_use(
    allowed: list[str], left: list[str], key: str, field: str
) -> None:
    raw = body("a:latest", "b1", "b2:7b", "x", key=key, field=field)
    assert names(shown(raw, view(*allowed)), key, field) == left


def test_what_has_no_name_is_hidden_from_a_restricted_key() -> None:
    raw = b'{"models":[{"size":1},{"name":7},1,[],null,{"name":"a"},{"name":"\\ud800"}]}'
    assert json.loads(shown(raw, view("a"))) == {"models": [{"name": "a"}]}


def test_both_lists_of_llama_cpp_are_cut() -> None:
    raw = b'{"models":[{"name":"x"},{"model":"b"}],"data":[{"id":"x"},{"id":"b"}],"object":"list"}'
    assert json.loads(shown(raw, view("b"))) == {
        "models": [{"model": "b"}],
        "data": [{"id": "b"}],
        "object": "list",
    }


def test_a_mapped_name_is_an_entry_of_its_own_with_the_details_of_what_it_means() -> None:
    entry = {"name": "llama3:latest", "model": "llama3:latest", "digest": "d", "details": {"x": 1}}
    (first, second) = json.loads(shown(text({"models": [entry]}), view(aliases=[GPT])))["models"]
    assert first == entry
    assert second == {**entry, "name": "gpt-4", "model": "gpt-4"}


def test_a_mapped_name_says_the_name_of_what_it_means_nowhere() -> None:
    """As vLLM does: `root` and `parent`."""
    raw = text({"data": [{"id": "llama3", "root": "llama3", "owned_by": "vllm"}]})
    seen = shown(raw, view("gpt-4", aliases=[GPT]))
    assert json.loads(seen) == {"data": [{"id": "gpt-4", "root": "gpt-4", "owned_by": "vllm"}]}


@pytest.mark.parametrize(
    ("allowed", "left"),
    [
        ([], ["llama3:latest", "x", "gpt-4"]),
        (["gpt-4"], ["gpt-4"]),
        (["GPT-4:latest"], ["gpt-4"]),
        (["llama3"], ["llama3:latest", "gpt-4"]),
        (["x"], ["x"]),
    ],
)
def test_a_mapped_name_is_seen_by_who_may_use_it_or_what_it_means(
    allowed: list[str], left: list[str]
) -> None:
    assert names(shown(body("llama3:latest", "x"), view(*allowed, aliases=[GPT]))) == left


def test_a_mapping_whose_model_is_gone_is_not_shown() -> None:
    assert names(shown(body("x"), view("gpt-4", "x", aliases=[GPT]))) == ["x"]


def test_a_model_that_nobody_reaches_because_its_name_is_mapped_is_not_shown() -> None:
    raw = text({"models": [{"name": "GPT-4:latest", "size": 1}, {"name": "llama3", "size": 2}]})
    assert json.loads(shown(raw, view(aliases=[GPT])))["models"] == [
        {"name": "llama3", "size": 2},
        {"name": "gpt-4", "size": 2},
    ]


@pytest.mark.parametrize("spelled", ["LLAMA3", "library/llama3:latest"])
def test_a_mapping_finds_its_model_in_any_spelling(spelled: str) -> None:
    seen = shown(body("llama3:latest"), view(aliases=[Alias("a", spelled)]))
    assert names(seen) == ["llama3:latest", "a"]


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"<html>", b"[]", b"1", b'{"error":1}', b'{"models":{}}', b'{"models":[', b"\xff",
        b'{"data":1,"models":[]}', b'{"models":[NaN]}', b'{"models":[1e999]}', b"[" * 100_000,
        b'{"models":' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_list_is_not_shown(raw: bytes) -> None:
    with pytest.raises(Unreadable):
        read_list(raw)
    with pytest.raises(Unreadable):
        shown(raw, view("a"))


def test_text_that_is_no_unicode_can_be_shown() -> None:
    raw = b'{"models":[{"name":"a","x":"\\ud800"},{"name":"b"}]}'
    assert json.loads(shown(raw, view("a"))) == {"models": [{"name": "a", "x": "\ud800"}]}


@pytest.mark.parametrize(
    ("allowed", "asked", "found"),
    [
        ([], "a:latest", {"id": "a:latest", "n": 1}),
        ([], "a", {"id": "a", "n": 1}),
        ([], "A", {"id": "A", "n": 1}),
        ([], "B", {"id": "B", "n": 3}),
        ([], "gpt-4", {"id": "gpt-4", "n": 4}),
        ([], "GPT-4:latest", {"id": "GPT-4:latest", "n": 4}),
        ([], "c", None),
        ([], "", None),
        (["a"], "b", None),
        (["a"], "gpt-4", None),
        (["gpt-4"], "gpt-4", {"id": "gpt-4", "n": 4}),
        (["gpt-4"], "llama3", None),
    ],
)
def test_one_model(allowed: list[str], asked: str, found: Any) -> None:
    entries = [{"id": name, "n": n} for n, name in enumerate(("a:latest", "b", "B", "llama3"), 1)]
    assert one(text({"data": entries}), view(*allowed, aliases=[GPT]), asked) == found


def test_what_may_be_used_by_name() -> None:
    raw = b'{"models":[{"name":"llama3"},{"name":"x"}],"data":[{"id":"llama3"},{"id":"x"}]}'
    assert models(raw, view("llama3", "gpt-4", aliases=[GPT])) == (
        Listed("llama3", False),
        Listed("gpt-4", True),
    )


NAME = st.sampled_from(["a", "A", "a:latest", "b", "b:1", "secret", "SECRET", "secret:latest"])
OPEN = NAME.filter(lambda name: "secret" not in name.lower())
ENTRY = st.none() | st.integers() | st.dictionaries(st.sampled_from(("id", "model", "name")), NAME)


@given(
    st.lists(ENTRY, max_size=6),
    st.lists(OPEN | st.just("a*"), min_size=1, max_size=2).map(tuple),
    st.dictionaries(OPEN, NAME, max_size=2),
)
@examples(300)
def test_who_may_not_use_a_model_does_not_hear_of_it(
    entries: list[Any], allowed: tuple[str, ...], table: dict[str, str]
) -> None:
    raw = json.dumps({"models": entries, "data": entries}).encode()
    aliases = tuple(Alias(name, model) for name, model in table.items())
    assert b"secret" not in shown(raw, View(allowed, aliases)).lower()
    assert "secret" not in str(models(raw, View(allowed, aliases))).lower()
