"""lists.lua: a key sees only the models it may use, and nothing where a list cannot be read."""

import json

import pytest

from tests.envoy.lua_host import Filter, Passed, authz

LISTS = Filter("lists")


def cut(body: bytes | list[bytes], allowed: str = "a,b*", **more: object) -> Passed:
    chunks = body if isinstance(body, list) else [body]
    headers = {"content-length": str(sum(map(len, chunks)))}
    metadata = authz(list_models=allowed, dialect=more.pop("dialect", "ollama"))
    return LISTS.response(chunks, metadata, headers=headers, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"models":[{"name":"a"}, {"name":"x"}]}', b'{"models":[{"name":"a"}]}'),
        (b'{"models":[ {"name":"x"}, {"name":"a"} ]}', b'{"models":[ {"name":"a"} ]}'),
        (b'{"models":[{"name":"x"},{"name":"y"}]}', b'{"models":[]}'),
        (
            b'{"models":[{"name":"x"},{"name":"b1"},\n{"name":"x"},\n {"name":"b2"}]}',
            b'{"models":[{"name":"b1"},\n {"name":"b2"}]}',
        ),
        (b'{"x":"list","data":[{"id":"a"},{"id":"aa"}]}', b'{"x":"list","data":[{"id":"a"}]}'),
        (
            b'{"models":[{"name":"x"},{"model":"b"}],"x":"list","data":[{"id":"x"},{"id":"b"}]}',
            b'{"models":[{"model":"b"}],"x":"list","data":[{"id":"b"}]}',
        ),
        (b'{"models":[{"name":"a:latest"},{"name":"a:7b"}]}', b'{"models":[{"name":"a:latest"}]}'),
        (b'{"models":[{"id":"x","name":"a"}]}', b'{"models":[]}'),
        (b'{"data":[{"name":"\\u0061"},{"size":1},"a",1,[]]}', b'{"data":[{"name":"\\u0061"}]}'),
        (b'{"models":null}', b'{"models":null}'),
        (b'{"data":[ ]}', b'{"data":[ ]}'),
    ],
)  # fmt: skip
def test_only_allowed_entries_are_left(before: bytes, after: bytes) -> None:
    passed = cut(before)
    assert passed.body == after
    assert passed.headers["content-length"] == str(len(after))
    assert passed.headers[":status"] == "200"


def test_a_list_in_many_chunks() -> None:
    whole = b'{"models":[{"name":"x"},{"name":"a"}]}'
    passed = cut([whole[i : i + 1] for i in range(len(whole))])
    assert passed.body == b'{"models":[{"name":"a"}]}'


@pytest.mark.parametrize(
    "body",
    [
        b'{"models":[{"name":"x"}',
        b"<html>",
        b"[]",
        b'{"error":1}',
        b'{"models":{"name":"x"}}',
        b" ",
    ],
)
def test_what_cannot_be_read_is_not_passed_on(body: bytes) -> None:
    passed = cut(body)
    assert passed.headers[":status"] == "502"
    assert isinstance(json.loads(passed.body)["error"], str)
    openai = cut(body, dialect="openai", content_type="text/html")
    assert json.loads(openai.body)["error"]["type"] == "server_error"
    assert openai.headers["content-type"] == "application/json"


def test_a_compressed_list_is_not_passed_on() -> None:
    passed = LISTS.response(
        [b'{"models":[]}'], authz(list_models="a"), headers={"content-encoding": "gzip"}
    )
    assert passed.headers[":status"] == "502"
    assert "content-encoding" not in passed.headers


def test_nobody_may_see_anything_with_an_empty_list() -> None:
    assert cut(b'{"models":[{"name":"a"}]}', allowed="").body == b'{"models":[]}'


def test_other_answers_pass() -> None:
    assert LISTS.response([b"x"], authz(dialect="ollama")).body == b"x"
    assert LISTS.response([b"x"], {}).body == b"x"
    assert cut(b"not found", status=404).body == b"not found"
    assert LISTS.response([], authz(list_models="a"), end_with_last=True).body == b""
