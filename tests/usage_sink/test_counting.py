"""Counting text: as tiktoken counts it, whatever the text is, and without a trace of it."""

import asyncio
import gzip
import hashlib
import json
import logging
import time
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from parallama import contract as c
from parallama.finished import Finished
from tests.examples import examples
from tests.usage_sink.make import STREAM, an_entry
from usage_sink import wire
from usage_sink.counting import Counting, Text, count_text, load, o200k_base

vocabulary = cache(o200k_base)  # loaded by the process that counts, not by all that collect


def tokens(text: str) -> int:
    return vocabulary()(text)


FACTS = {**STREAM, c.USAGE_SOURCE: "counted", c.TOTAL_TOKENS: 20, c.PROMPT_TOKENS: None}


def a_request(**limits: Any) -> Finished:
    entry = an_entry(lua={key: value for key, value in FACTS.items() if value}, limits=limits)
    finished = wire.parse(entry)
    assert finished is not None
    return finished


def counted(strings: bytes, more: int = 0) -> int:
    record = count_text(Text(None, strings, 0, more), a_request(), tokens).record
    assert record.completion_tokens is not None
    return record.completion_tokens


# The vocabulary.


def test_the_vocabulary_is_tiktokens_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words are cut by the same expression, and its file has the digest that tiktoken wants."""
    asked: dict[str, Any] = {}

    def instead_of_fetching(_: str, expected_hash: str) -> dict[bytes, int]:
        asked["digest"] = expected_hash
        return {}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", instead_of_fetching)
    told = openai_public.o200k_base()
    packed = files("usage_sink").joinpath("vocabulary", "o200k_base.tiktoken.gz").read_bytes()
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == asked["digest"]
    from usage_sink import counting

    assert told["pat_str"] == counting._WORDS


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("hello world", 2),
        ("<|endoftext|>", 7),
        ("The quick brown fox jumps over the lazy dog.", 10),
        ("漢字かな", 3),
    ],
)
def test_known_counts(text: str, count: int) -> None:
    assert tokens(text) == count


@pytest.mark.parametrize(
    "text",
    ["a", "A", " ", "\n", "1", "!", "'", "ก", "e\u0301", "\U0001f999", " \n\t ", "aA", "^0", "\0"],
)
def test_no_text_holds_the_sink_up(text: str) -> None:
    """Such runs were quadratic in some tokenizers; all that Lua passes on takes milliseconds."""
    text = text * (65536 // len(text.encode()))
    began = time.monotonic()
    assert 0 < counted(json.dumps(text, ensure_ascii=False)[1:-1].encode()) <= 65536
    assert time.monotonic() - began < 2


# Strings as Lua passes them on.


@pytest.mark.parametrize(
    ("strings", "meant"),
    [
        (b"hello world", ["hello world"]),
        (b"hello\nworld", ["hello", "world"]),
        (rb"one\ntwo \"three\" \\ \/ \u00e9", ['one\ntwo "three" \\ / é']),
        (rb"\ud83e\udd99", ["🦙"]),
        (rb"half \ud83e of it", ["half \ufffd of it"]),
        (rb"cut \u00", ["cut "]),
        (b"cut \\", ["cut "]),
        (rb"\x is no escape", [r"\x is no escape"]),
        (b"cut \xc3", ["cut \ufffd"]),
        (b'[{"type": "function"}]', ['[{"type": "function"}]']),
        (b"\n\n", []),
        (b"", []),
    ],
)
def test_what_is_counted_is_what_the_string_means(strings: bytes, meant: list[str]) -> None:
    assert counted(strings) == sum(map(tokens, meant))


@examples(200)
@given(st.text())
def test_every_json_string_is_counted_as_its_text(text: str) -> None:
    for ascii_only in (True, False):
        strings = json.dumps(text, ensure_ascii=ascii_only)[1:-1].encode(errors="replace")
        assert counted(strings) == tokens(text)


@examples(200)
@given(st.binary(), st.integers(0, 2**40))
def test_no_bytes_are_too_odd(strings: bytes, more: int) -> None:
    assert 0 <= counted(strings, more) <= 10**9


def test_the_rest_has_as_many_tokens_a_byte() -> None:
    text = b"a word and another " * 100
    assert counted(text, more=3 * len(text)) == 4 * counted(text)
    assert counted(b"", more=1000) == 0
    assert counted(b"x" * 100_000) == counted(b"x" * 65536)  # nobody sends so much


# Rows.


def test_a_row_is_marked_and_its_numbers_are_consistent() -> None:
    was = a_request(granted=150, tokens_left=850)
    now = count_text(Text(b"hello world", b"hello"), was, tokens)
    assert now.record == replace(
        was.record,
        prompt_tokens=2,
        completion_tokens=1,
        tokens_used=3,
        token_source="estimated",
    )
    assert (was.tokens_left, now.tokens_left) == (850 + 150 - 20, 850 + 150 - 3)


@pytest.mark.parametrize(
    ("text", "prompt", "completion"),
    [(Text(b"hello", None), 1, 20), (Text(None, b"hello"), None, 1), (Text(b"", b""), 0, 0)],
)
def test_what_no_text_was_passed_on_for_stays(
    text: Text, prompt: int | None, completion: int
) -> None:
    record = count_text(text, a_request(), tokens).record
    assert (record.prompt_tokens, record.completion_tokens) == (prompt, completion)


@pytest.mark.parametrize("size", [10, 10_000])
def test_a_text_that_cannot_be_counted_costs_no_row_and_is_not_told(
    size: int, caplog: pytest.LogCaptureFixture
) -> None:
    def count(text: str) -> int:
        raise ValueError(f"cannot count {text}")

    was = a_request()
    text = Text(b"secret" * size, b"secret" * size)
    assert asyncio.run(Counting(count).counted(text, was)) is was
    (said,) = caplog.records
    assert (said.message, said.cause) == ("text not counted", "ValueError")  # type: ignore[attr-defined]
    assert "secret" not in caplog.text
    assert "secret" not in f"{text} {text!r}"


@pytest.mark.parametrize("size", [10, 10_000])
def test_short_and_long_texts_are_counted_alike(size: int) -> None:
    text = Text(b"a word " * size, b"another " * size)
    told = asyncio.run(Counting(tokens).counted(text, a_request()))
    assert told == count_text(text, a_request(), tokens)


def test_without_a_vocabulary_the_sink_goes_on_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> Any:
        raise FileNotFoundError("no vocabulary")

    assert asyncio.run(load(broken)) is None
    (said,) = caplog.records
    assert said.levelno == logging.ERROR
    assert "FileNotFoundError" in said.cause  # type: ignore[attr-defined]
