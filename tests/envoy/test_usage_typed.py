"""usage.lua on OpenAI's Responses and Anthropic's Messages: what counts, and what is reported."""

from typing import Any

import pytest

from tests.envoy.answers import (
    BROKEN,
    CHUNKED,
    FORMS,
    JSON,
    KINDS,
    SSE,
    dumps,
    event,
    messages,
    metadata,
    responses,
)
from tests.envoy.lua_host import Filter, Passed

USAGE = Filter("usage")
TEXTS = ["Hello", ' "there"', "!"]


def stream(form: str, *chunks: bytes) -> Passed:
    return USAGE.response(chunks, metadata(form), SSE, headers=CHUNKED)


def answer(form: str, body: dict[str, Any]) -> dict[str, Any]:
    return USAGE.response([dumps(body)], metadata(form), JSON).facts


def counts(facts: dict[str, Any]) -> tuple[Any, ...]:
    keys = ("prompt_tokens", "completion_tokens", "total_tokens", "usage_source", "cached_tokens")
    return tuple(facts.get(key) for key in keys)


@pytest.mark.parametrize(("form", "whole"), [("responses", responses), ("messages", messages)])
def test_a_stream_that_reports_its_usage(form: str, whole: Any) -> None:
    passed = stream(form, whole(TEXTS))
    assert passed.body == whole(TEXTS)
    assert counts(passed.facts) == (7, 3, 10, "reported", 3)
    assert passed.facts["finished"] is True
    assert passed.facts["response_model"] == "m"


def test_responses_without_usage_are_counted() -> None:
    passed = stream("responses", responses(TEXTS, usage=False))
    assert counts(passed.facts) == (None, 3, 3, "counted", None)
    assert passed.facts["finished"] is True


def test_messages_without_a_last_usage_have_the_prompt_of_their_start() -> None:
    passed = stream("messages", messages(TEXTS, usage=False))
    assert counts(passed.facts) == (7, 3, 10, "counted", 3)


@pytest.mark.parametrize(
    ("delta", "tokens"),
    [
        ({"type": "response.output_text.delta", "delta": "a"}, 1),
        ({"type": "response.reasoning_summary_text.delta", "delta": "a"}, 1),
        ({"type": "response.refusal.delta", "delta": "a"}, 1),
        ({"type": "response.function_call_arguments.delta", "delta": "{"}, 1),
        ({"type": "response.output_text.delta", "delta": ""}, 0),
        ({"type": "response.output_text.done", "text": "a"}, 0),
        ({"type": "response.function_call_arguments.done", "arguments": "{}"}, 0),
        ({"type": "response.output_item.done", "item": {"content": [{"text": "a"}]}}, 0),
        ({"type": "response.in_progress", "response": {"output": [{"text": "a"}]}}, 0),
    ],
)
def test_a_token_of_a_response(delta: dict[str, object], tokens: int) -> None:
    assert stream("responses", event(delta)).facts["total_tokens"] == tokens


@pytest.mark.parametrize(
    ("delta", "tokens"),
    [
        ({"type": "text_delta", "text": "a"}, 1),
        ({"type": "thinking_delta", "thinking": "a"}, 1),
        ({"type": "input_json_delta", "partial_json": "{"}, 1),
        ({"type": "text_delta", "text": ""}, 0),
        ({"type": "signature_delta", "signature": "abc"}, 0),
        ({"type": "citations_delta", "citation": {"cited_text": "abc"}}, 0),
    ],
)
def test_a_token_of_a_message(delta: dict[str, object], tokens: int) -> None:
    said = event({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")
    assert stream("messages", said).facts["total_tokens"] == tokens


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete", "response.failed"])
def test_each_end_of_a_response_reports(kind: str) -> None:
    error = {"code": "server_error", "message": "x"} if kind == "response.failed" else None
    usage = {"input_tokens": 4, "output_tokens": 2}
    facts = stream("responses", event({"type": kind, "response": {"usage": usage, "error": error}}))
    assert counts(facts.facts) == (4, 2, 6, "reported", None)
    assert facts.facts["finished"] is True
    assert ("upstream_error" in facts.facts) == (kind == "response.failed")


def test_llama_cpp_reports_the_time_it_worked_beside_the_response() -> None:
    last = {
        "type": "response.completed",
        "response": {"usage": {"input_tokens": 33, "output_tokens": 4}},
        "timings": {"prompt_ms": 7.5, "predicted_ms": 2.5},
    }
    assert stream("responses", event(last)).facts["compute_ms"] == 10


def test_the_usage_of_a_message_is_that_of_its_end_where_that_says_more() -> None:
    """Ollama begins with an estimate of the prompt, and ends with what it was."""
    start = event({"type": "message_start", "message": {"usage": {"input_tokens": 99}}})
    text = event({"type": "content_block_delta", "delta": {"text": "a"}})
    end = event({"type": "message_delta", "usage": {"input_tokens": 5, "output_tokens": 1}})
    assert counts(stream("messages", start, text, end).facts) == (5, 1, 6, "reported", None)
    zero = event({"type": "message_delta", "usage": {"input_tokens": 0, "output_tokens": 0}})
    assert counts(stream("messages", start, zero).facts) == (0, 0, 0, "reported", None)


def test_what_a_stream_of_messages_begins_with_teaches_nothing() -> None:
    start = event({"type": "message_start", "message": {"usage": {"input_tokens": 99}}})
    assert "prompt_reported" not in stream("messages", start).facts


@pytest.mark.parametrize("form", ["responses", "messages"])
def test_a_stream_that_is_abandoned_is_charged_what_was_delivered(form: str) -> None:
    """And the prompt, where the server told it already; each chunk costs one write."""
    whole = {"responses": responses, "messages": messages}[form](["a"] * 20)
    events = whole.split(b"\n\n")
    open_ = USAGE.open_response(metadata(form), SSE, headers=CHUNKED)
    open_.feed(b"\n\n".join(events[:3]) + b"\n\n")
    before, prompt = open_.sets, {"responses": 0, "messages": 7}[form]
    for n in range(2, 12):
        assert open_.feed(events[n + 1] + b"\n\n")
        assert open_.facts["total_tokens"] == prompt + n
        assert open_.sets - before == n - 1
    assert open_.facts["usage_source"] == "counted"
    assert open_.facts.get("prompt_tokens", 0) == prompt
    assert "completion_tokens" not in open_.facts


def test_an_answer_in_one_piece() -> None:
    told = {
        "model": "m", "error": None,
        "usage": {"input_tokens": 9, "output_tokens": 2, "total_tokens": 11,
                  "input_tokens_details": {"cached_tokens": 4}},
    }  # fmt: skip
    assert counts(answer("responses", told)) == (9, 2, 11, "reported", 4)
    usage = {"input_tokens": 1, "cache_read_input_tokens": 32, "output_tokens": 4}
    assert counts(answer("messages", {"usage": usage})) == (33, 4, 37, "reported", 32)
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 5, "output_tokens": 4}
    assert counts(answer("messages", {"usage": usage})) == (6, 4, 10, "reported", None)
    assert counts(answer("messages", {"usage": {"input_tokens": 1, "output_tokens": 4}})) == (
        1, 4, 5, "reported", None,
    )  # fmt: skip


@pytest.mark.parametrize("lie", [-1, 1.5, "7", 10**10])
def test_numbers_that_cannot_be_are_left_out(lie: object) -> None:
    facts = answer("messages", {"usage": {"input_tokens": lie, "cache_read_input_tokens": 1}})
    assert facts["usage_source"] == "estimated"
    assert facts["usage_odd"] is True
    facts = stream(
        "responses", responses(["a"]).replace(b'"output_tokens":1', b'"output_tokens":-1')
    )
    assert facts.facts["usage_odd"] is True
    assert counts(facts.facts)[:4] == (7, 1, 8, "counted")


def test_two_usages_the_last_one_counts_as_it_does_for_a_client() -> None:
    first, last = (b'"usage":{"input_tokens":%d,"output_tokens":%d}' % n for n in ((9, 9), (1, 2)))
    twice = b"{%b,%b}" % (first, last)
    assert counts(USAGE.response([twice], metadata("responses"), JSON).facts)[:3] == (1, 2, 3)


@pytest.mark.parametrize(
    "error",
    [
        event({"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, "error"),
        event({"type": "error", "code": "server_error", "message": "x"}),
        event({"type": "error", "error": None, "message": "x"}),
    ],
)
@pytest.mark.parametrize("form", ["responses", "messages"])
def test_an_error_in_a_stream_is_its_end(form: str, error: bytes) -> None:
    passed = stream(form, error)
    assert passed.body == error
    assert passed.facts["upstream_error"] is True
    assert "no_end" not in passed.facts


# Streams that stop.

CUT = {
    "chat": event({"error": {"message": BROKEN, "type": "server_error", "param": None,
                             "code": "incomplete_stream"}}),
    "messages": event({"type": "error", "error": {"type": "api_error", "message": BROKEN}},
                      "error"),
    "ollama": dumps({"error": BROKEN}) + b"\n",
}  # fmt: skip
CUT["completions"] = CUT["chat"]


def cut_response(number: int) -> bytes:
    told = {"code": "incomplete_stream", "message": BROKEN, "param": None}
    error = {"type": "server_error", "code": told["code"], "message": BROKEN, "param": None}
    return event({"type": "error", **told, "sequence_number": number, "error": error}, "error")


@pytest.mark.parametrize("form", ["chat", "completions", "responses", "messages", "ollama"])
def test_a_stream_without_its_end_mark_says_so_in_its_own_form(form: str) -> None:
    whole = FORMS[form](TEXTS)
    if form == "ollama":
        cut = b"".join(whole.splitlines(keepends=True)[:-1])
    else:
        cut = whole[: whole[:-2].rindex(b"\n\n") + 2]
    last = CUT.get(form) or cut_response(cut.count(b"data:"))
    for chunks in ([cut], [cut[i : i + 1] for i in range(len(cut))]):
        passed = USAGE.response(chunks, metadata(form), KINDS[form], headers=CHUNKED)
        assert passed.body == cut + last
        assert passed.facts["no_end"] is True
        assert "finished" not in passed.facts
    # Where the end comes with the last bytes, or was announced, nothing can be added.
    for headers, with_last in ((CHUNKED, True), ({"content-length": str(len(cut))}, False)):
        passed = USAGE.response(
            [cut], metadata(form), KINDS[form], headers=headers, end_with_last=with_last
        )
        assert passed.body == cut
        assert passed.facts["no_end"] is True


@pytest.mark.parametrize(
    ("form", "half", "apart"),
    [
        ("chat", b'data: {"a":', b"\n\n"),
        ("chat", b'data: {"a":1}\n', b"\n"),
        ("chat", b": ping\n", b"\n"),
        ("chat", b"", b""),
        ("ollama", b'{"a":', b"\n"),
        ("ollama", b'{"a":1}\n', b""),
        ("ollama", b'{"a":1}', b"\n"),
    ],
)
def test_what_is_added_stands_apart(form: str, half: bytes, apart: bytes) -> None:
    for facts in ({}, {"stream_usage": "ours"}, {"requested_model": "a", "model": "b"}):
        passed = USAGE.response([half], metadata(form, **facts), KINDS[form], headers=CHUNKED)
        assert passed.body == half + apart + CUT[form]


def test_a_packed_stream_is_left_alone() -> None:
    packed = {**CHUNKED, "content-encoding": "gzip"}
    passed = USAGE.response([b"\x1f\x8b"], metadata("chat"), SSE, headers=packed)
    assert passed.body == b"\x1f\x8b"
