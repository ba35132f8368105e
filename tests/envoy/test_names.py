"""usage.lua puts the name back that the client asked for, and changes no other byte."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.envoy.answers import (
    CHUNKED,
    FORMS,
    JSON,
    KINDS,
    SSE,
    Metadata,
    chat,
    dumps,
    event,
    mapped,
    metadata,
    ollama,
)
from tests.envoy.lua_host import NOW_MS, Filter, Passed
from tests.examples import examples

USAGE = Filter("usage")
MEANT, ASKED = "llama2:70b", 'gpt "4"\\é'
TEXTS = ["Hello", " \"model\":\"llama2:70b\"", "\\", "\n", "", "é", "a"]  # fmt: skip


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    cuts = sorted(cuts)
    found = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return [piece for piece in found if piece]


def renamed(form: str, chunks: list[bytes], **facts: object) -> Passed:
    told = mapped(form, ASKED, MEANT, **facts)
    return USAGE.response(chunks, told, KINDS[form], headers=CHUNKED)


def with_asked(whole: bytes) -> bytes:
    """Its members are named so wherever a server writes them."""
    asked = json.dumps(ASKED, ensure_ascii=False).encode()
    return whole.replace(b'"model":"llama2:70b"', b'"model":' + asked)


@pytest.mark.parametrize("form", FORMS)
def test_each_part_of_a_stream_has_the_name_that_was_asked_for(form: str) -> None:
    whole = FORMS[form](TEXTS, MEANT)
    expected = with_asked(whole)
    assert expected.count(b"gpt") >= {"messages": 1, "responses": 2}.get(form, 3)
    by_event = [one + b"\n" for one in whole.split(b"\n")]
    by_event[-1] = by_event[-1][:-1]
    for chunks in ([whole], by_event, [whole[i : i + 1] for i in range(len(whole))]):
        passed = renamed(form, chunks)
        assert passed.body == expected
        assert passed.facts["response_model"] == MEANT
        assert passed.facts["usage_source"] == "reported"


@pytest.mark.parametrize("form", FORMS)
def test_without_a_mapping_a_stream_passes_as_it_comes(form: str) -> None:
    whole = FORMS[form](TEXTS, MEANT)
    stream = USAGE.open_response(metadata(form, model=MEANT), KINDS[form], headers=CHUNKED)
    for i in range(len(whole)):
        assert stream.feed(whole[i : i + 1]) == whole[i : i + 1]


@examples(150)
@given(st.data(), st.sampled_from(sorted(FORMS)), st.booleans(), st.sampled_from(["none", "map"]))
def test_chunks_change_nothing(data: st.DataObject, form: str, usage: bool, how: str) -> None:
    """However a stream is cut, what goes out and what is known are as in one chunk."""
    texts = data.draw(st.lists(st.text(max_size=6) | st.sampled_from(TEXTS), max_size=5))
    whole = FORMS[form](texts, MEANT, usage)
    style = data.draw(st.sampled_from(["", "crlf", "comments", "no end", "cut"]))
    if style == "crlf":
        whole = whole.replace(b"\n", b"\r\n")
    elif style == "comments" and form != "ollama":
        whole = whole.replace(b"\n\n", b"\n\n: ping\n\n")
    elif style == "no end":
        whole = whole.rstrip(b"\n")
    elif style == "cut":
        whole = whole[: data.draw(st.integers(0, len(whole)))]
    facts: dict[str, object] = {"stream_usage": data.draw(st.sampled_from(["ours", "client"]))}
    if form not in ("chat", "completions"):
        facts = {}
    if how == "map":
        facts |= {"requested_model": ASKED, "model": MEANT}
    told: Metadata = metadata(form, **facts)
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=12))
    one = USAGE.response([whole] if whole else [], told, KINDS[form], headers=CHUNKED)
    for chunks in (pieces(whole, cuts), pieces(whole, list(range(len(whole))))):
        many = USAGE.response(chunks, told, KINDS[form], headers=CHUNKED)
        assert many.body == one.body
        assert many.facts == one.facts
    if how == "none" and facts.get("stream_usage") != "ours":
        assert one.body.startswith(whole)
    if style != "cut":
        # The newline that the last line lacks may be what makes an event of it.
        assert one.facts["total_tokens"] == (7 if usage else 0) + (
            len(texts) if usage else sum(map(bool, texts)) + (7 if form == "messages" else 0)
        )


def test_the_event_that_nobody_asked_for_goes_here_too() -> None:
    whole = chat(["a", "b", "c"], MEANT)
    passed = renamed("chat", [whole], stream_usage="ours")
    assert passed.body == with_asked(chat(["a", "b", "c"], MEANT, usage=False))
    assert passed.facts["total_tokens"] == 10


def test_nothing_is_held_longer_than_its_line() -> None:
    stream = USAGE.open_response(mapped("ollama", ASKED, MEANT), KINDS["ollama"], headers=CHUNKED)
    line = ollama(["a"], MEANT).splitlines(keepends=True)[0]
    for _ in range(3):
        assert stream.feed(line[:40]) == b""
        assert stream.feed(line[40:-1]) == with_asked(line[:-1])
        assert stream.feed(b"\n" + line[:9]) == b"\n"
        assert stream.feed(line[9:]) == with_asked(line)
        assert stream.feed(line) == with_asked(line)
    sse = USAGE.open_response(mapped("chat", ASKED, MEANT), SSE, headers=CHUNKED)
    assert sse.feed(b": pi") == b": pi"
    assert sse.feed(b"ng\n\ndata: [DO") == b"ng\n\ndata: [DO"
    assert sse.feed(b"NE]\n\n") == b"NE]\n\n"


def test_a_token_costs_no_more_than_its_chunk() -> None:
    """The lines that are like the one before, which most are: one write of metadata each."""
    stream = USAGE.open_response(mapped("chat", ASKED, MEANT), SSE, headers=CHUNKED)
    events = [one + b"\n\n" for one in chat(["a"] * 20, MEANT).split(b"\n\n")]
    for one in events[:3]:
        stream.feed(one)
    before = stream.sets
    for n, one in enumerate(events[3:20]):
        assert stream.feed(one) == with_asked(one)
        assert stream.sets - before == n + 1


@pytest.mark.parametrize(
    "line",
    [
        b'{"choices":[{"delta":{"content":"a"},"model":"llama2:70b"}]}',
        b'{"choices":[{"delta":{"content":"a","x":{"model":"llama2:70b"}}}],"model":7}',
        b'{"choices":[{"delta":{"content":"\\"model\\":\\"llama2:70b\\""}}]}',
        b'{"choices":[{"delta":{"content":"a"}}],"model":null}',
        b'{"model":"llama2:70b"',
        b'["model"]',
        b"nothing",
        b"",
    ],
)
def test_only_the_name_at_the_top_is_one(line: bytes) -> None:
    whole = b"data: " + line + b"\n\ndata: [DONE]\n\n"
    for chunks in ([whole], [whole[i : i + 1] for i in range(len(whole))]):
        assert renamed("chat", chunks).body == whole


def test_a_line_like_the_one_before_is_one_only_if_it_is() -> None:
    """What is compared is all but the text: these follow a line that they could be taken for."""
    first = event({"model": MEANT, "choices": [{"delta": {"content": "hi"}}]})
    for other in (
        {"model": MEANT, "choices": [{"delta": {"content": 'a"b'}}]},
        {"model": MEANT, "choices": [{"delta": {"content": "a\\"}}]},
        {"model": MEANT, "choices": [{"delta": {"content": ""}}]},
        {"model": "other", "choices": [{"delta": {"content": "hi"}}]},
        {"model": MEANT, "choices": [{"delta": {"content": "hi"}}], "usage": {"prompt_tokens": 1}},
        {"choices": [{"delta": {"content": "hi"}}]},
    ):
        line = event(other)
        together = USAGE.response([first + line], mapped("chat", ASKED, MEANT), SSE)
        apart = USAGE.response([line], mapped("chat", ASKED, MEANT), SSE)
        assert together.body == with_asked(first) + apart.body
        assert together.facts["total_tokens"] == 1 + apart.facts["total_tokens"]
    broken = b'data: {"model":"llama2:70b","choices":[{"delta":{"content":"h\ni"}}]}\n\n'
    passed = USAGE.response([first + broken], mapped("chat", ASKED, MEANT), SSE)
    assert passed.body == with_asked(first) + broken


@examples(100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["content", "reasoning", "text", "arguments", "tool_calls", "x"]),
            st.sampled_from(["a", "", '"', "\\", '\\"', "é", None, 7, [], ["a"], {"model": "m"}])
            | st.text(max_size=3),
            st.sampled_from(["m", "n", None]),
            st.booleans(),
        ),
        max_size=8,
    ),
    st.booleans(),
)  # fmt: skip
def test_lines_in_a_row_mean_what_each_of_them_means(said: list[Any], first: bool) -> None:
    """The quick look at a line and the careful one come to the same."""
    lines = []
    for key, value, model, odd in said:
        line: dict[str, object] = {"choices": [{"delta": {key: value}}], "created_at": "now"}
        if model:
            line = {"model": model, **line} if first else {**line, "model": model}
        lines.append(event({**line, "odd": odd} if odd else line))
    told = mapped("chat", "asked", "m")
    row = USAGE.response([b"".join(lines)], told, SSE)
    singles = [USAGE.response([line], told, SSE) for line in lines]
    assert row.body == b"".join(single.body for single in singles)
    assert row.facts["total_tokens"] == sum(single.facts["total_tokens"] for single in singles)


def test_a_line_of_five_megabytes() -> None:
    text = "x" * 5_000_000
    whole = chat(["a", text, "b"], MEANT)
    for size in (len(whole), 16_384):
        chunks = [whole[i : i + size] for i in range(0, len(whole), size)]
        passed = renamed("chat", chunks)
        assert passed.body == with_asked(whole)
        assert passed.facts["total_tokens"] == 10


# Answers in one piece.


def one(body: bytes, chunks: list[bytes] | None = None, **more: Any) -> Passed:
    length = {"content-length": str(len(body))}
    told = mapped("chat", ASKED, MEANT)
    return USAGE.response(chunks or [body], told, JSON, headers=length, **more)


@examples(60)
@given(st.data())
def test_an_answer_in_one_piece_has_the_name_that_was_asked_for(data: st.DataObject) -> None:
    body = json.dumps(
        {"id": "c", "choices": [{"message": {"content": "} }"}, "model": "x"}], "model": MEANT,
         "usage": {"prompt_tokens": 1, "completion_tokens": 2}}, indent=1
    ).encode()  # fmt: skip
    body += data.draw(st.sampled_from([b"", b"\n"]))
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=6))
    passed = one(body, pieces(body, cuts), end_with_last=data.draw(st.booleans()))
    asked = json.dumps(ASKED, ensure_ascii=False).encode()
    assert passed.body == body.replace(b'"model": "llama2:70b"', b'"model": ' + asked)
    assert passed.facts["total_tokens"] == 3
    assert passed.facts["response_model"] == MEANT


def test_a_length_that_changes_is_not_announced() -> None:
    told = mapped("chat", ASKED, MEANT)
    stream = USAGE.open_response(told, JSON, headers={"content-length": "9"})
    assert "content-length" not in stream.passed(b"").headers


@pytest.mark.parametrize("body", [b"[1]", b'{"model":"llama2:70b"', b"", b"x", b'{"model":[]}'])
def test_what_is_no_answer_passes_as_it_is(body: bytes) -> None:
    assert one(body).body == body


def test_an_answer_that_is_too_long_to_be_read_keeps_its_name() -> None:
    start, block = b'{"model":"llama2:70b","x":"', b"y" * (1 << 20)
    chunks = [start, *[block] * 17, b'"}']
    assert one(b"", chunks).body == b"".join(chunks)


# Errors.


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"error": "model 'llama2:70b' not found"}, {"error": f"model '{ASKED}' not found"}),
        (
            {"error": {"message": 'model "llama2:70b" not found, try pulling it first'}},
            {"error": {"message": f'model "{ASKED}" not found, try pulling it first'}},
        ),
        (
            {"error": {"message": "llama2:70b: no", "type": "x", "param": "llama2:70b"}},
            {"error": {"message": f"{ASKED}: no", "type": "x", "param": "llama2:70b"}},
        ),
        (
            {"object": "error", "message": "The model `llama2:70b` does not exist."},
            {"object": "error", "message": f"The model `{ASKED}` does not exist."},
        ),
        (
            {"type": "error", "error": {"type": "not_found_error", "message": "llama2:70b."}},
            {"type": "error", "error": {"type": "not_found_error", "message": f"{ASKED}."}},
        ),
        ({"error": "model 'llama2:70b:latest' and"}, {"error": f"model '{ASKED}' and"}),
        ({"error": "llama2:70b-q4, my-llama2:70b, x/llama2:70b.gguf"}, None),
        ({"error": "nothing of that"}, None),
        ({"error": 7}, None),
        ({"prompt": "llama2:70b"}, None),
    ],
)
def test_an_error_names_what_was_asked_for(body: object, expected: object) -> None:
    raw = json.dumps(body).encode()
    told = mapped("chat", ASKED, MEANT)
    for chunks in ([raw], [raw[i : i + 1] for i in range(len(raw))]):
        length = {"content-length": str(len(raw))}
        passed = USAGE.response(chunks, told, JSON, status=404, headers=length)
        if expected is None:
            assert passed.body == raw
        else:
            assert json.loads(passed.body) == expected
        assert passed.facts == dict(told["parallama"])


def test_an_error_without_a_mapping_passes_as_it_is() -> None:
    raw = b'{"error":"model \'llama2:70b\' not found"}'
    length = {"content-length": str(len(raw))}
    passed = USAGE.response([raw], metadata("chat", model=MEANT), JSON, 404, length)
    assert (passed.body, passed.headers["content-length"]) == (raw, str(len(raw)))
    page = USAGE.response([raw], mapped("chat", ASKED, MEANT), "text/plain", 404, length)
    assert (page.body, page.headers["content-length"]) == (raw, str(len(raw)))


def test_an_error_inside_a_stream_names_what_was_asked_for() -> None:
    for form, error in (
        ("ollama", dumps({"error": "llama2:70b crashed"}) + b"\n"),
        ("chat", event({"error": {"message": "llama2:70b crashed"}})),
        ("messages", event({"type": "error", "error": {"message": "llama2:70b crashed"}}, "error")),
    ):
        passed = renamed(form, [error])
        assert b"llama2" not in passed.body
        assert passed.facts == {
            **dict(mapped(form, ASKED, MEANT)["parallama"]), "upstream_error": True,
        }  # fmt: skip
    assert NOW_MS not in passed.facts.values()
