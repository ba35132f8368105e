"""usage.lua: counts what passes, takes what is reported, changes no byte that is not its own."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama import contract
from tests.envoy.answers import BROKEN, CHUNKED, NDJSON, SSE
from tests.envoy.lua_host import NOW_MS, Filter, Passed, chat, ollama
from tests.examples import examples

USAGE = Filter("usage")


def asked(authz: Any = None, **facts: object) -> dict[str, dict[str, object]]:
    """Metadata as it is when the answer comes."""
    return {**(authz or chat()), contract.LUA: {contract.TOTAL_TOKENS: 0, **facts}}


OURS = asked(stream_usage="ours")


def event(**members: object) -> bytes:
    return (
        b"data: " + json.dumps({"model": "m", **members}, separators=(",", ":")).encode() + b"\n\n"
    )


def delta(**members: object) -> bytes:
    return event(choices=[{"index": 0, "delta": members, "finish_reason": None}])


ROLE = delta(role="assistant", content="")
HI = delta(content="hi")
END = event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
EXTRA = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9})
DONE = b"data: [DONE]\n\n"


CUT_SSE = (
    b'data: {"error":{"message":"%b","type":"server_error","param":null,'
    b'"code":"incomplete_stream"}}\n\n' % BROKEN.encode()
)
CUT_NDJSON = b'{"error":"%b"}\n' % BROKEN.encode()


def without_cut(passed: Passed, cut: bytes = CUT_SSE) -> bytes:
    """The body without the event that tells of a missing end mark, which has to be there then."""
    if passed.facts.get("finished") or passed.facts.get("upstream_error"):
        assert "no_end" not in passed.facts
        return passed.body
    assert passed.facts["no_end"] is True
    assert passed.body.endswith(cut)
    return passed.body.removesuffix(cut)


def sse(*chunks: bytes, metadata: Any = None, **more: Any) -> Passed:
    passed = USAGE.response(chunks, metadata or asked(), SSE, headers=CHUNKED, **more)
    if metadata is not OURS:
        whole = b"".join(chunks)
        assert without_cut(passed).rstrip(b"\n") == whole.rstrip(b"\n")
    return passed


def one_by_one(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def counts(passed: Passed) -> tuple[Any, ...]:
    facts = passed.facts
    return tuple(
        facts.get(key)
        for key in ("prompt_tokens", "completion_tokens", "total_tokens", "usage_source")
    )


# When it runs.


def test_only_metered_calls_are_counted() -> None:
    assert USAGE.response([HI], chat(metered=None), SSE).facts == {}
    metadata = {**chat(), contract.LUA: {contract.MODEL: "m"}}
    assert USAGE.response([HI], metadata, SSE).facts == {"model": "m"}
    assert USAGE.response([HI], {}, SSE).facts == {}


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_errors_cost_nothing(status: int) -> None:
    body = b'{"error":{},"usage":{"prompt_tokens":3,"completion_tokens":1}}'
    passed = USAGE.response([body], OURS, status=status)
    assert passed.body == body
    assert passed.facts == {"stream_usage": "ours", "total_tokens": 0}


def test_other_types_are_not_read() -> None:
    assert USAGE.response([HI], asked(), "text/plain").facts == {"total_tokens": 0}
    assert (
        USAGE.response([HI], asked(), "text/event-stream; charset=utf-8").facts["total_tokens"] == 1
    )
    assert USAGE.response([HI], asked(), "Text/Event-Stream").facts["total_tokens"] == 1


# Event streams.


def test_a_stream_without_usage_is_counted() -> None:
    facts = sse(ROLE, HI, HI, HI, END, DONE).facts
    assert facts == {
        "total_tokens": 3,
        "completion_tokens": 3,
        "usage_source": "counted",
        "first_token_at": NOW_MS,
        "response_model": "m",
        "finished": True,
    }
    assert set(facts) <= contract.LUA_KEYS


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        (HI, 1),
        (delta(reasoning_content="a"), 1),
        (delta(reasoning="a"), 1),
        (delta(content=None, reasoning_content="a"), 1),
        (delta(tool_calls=[{"index": 0, "function": {"arguments": "{"}}]), 1),
        (event(choices=[{"text": "a"}]), 1),
        (b'data:{"choices" : [ { "delta" : { "content" : "a" } } ] }\n\n', 1),
        (b'data: {"choices":[{"delta":{"content":"content"}}]}\r\n\r\n', 1),
        (ROLE, 0),
        (END, 0),
        (delta(tool_calls=[]), 0),
        (delta(content=None), 0),
        (event(choices=[{"text": ""}]), 0),
        (event(choices=[{"delta": {}, "logprobs": {"content": [{"token": "a"}]}}]), 0),
        (b": keepalive\n\n", 0),
        (b"event: message\n\n", 0),
        (DONE, 0),
        (b"data: not json\n\n", 0),
        (b"data: {\n\n", 0),
        (b"data:\n\n", 0),
    ],
)
def test_one_token_for_each_event_with_text(line: bytes, tokens: int) -> None:
    assert sse(line).facts.get("total_tokens", 0) == tokens
    assert sse(HI, line, HI).facts["total_tokens"] == tokens + 2
    assert USAGE.response(one_by_one(line), asked(), SSE).facts.get("total_tokens", 0) == tokens


@examples(100)
@given(
    st.text(max_size=20)
    | st.sampled_from(
        [
            'content":"x', '"content":"x"', '","content":"x', '"usage":{"prompt_tokens":99}',
            "usage", '"', "data: [DONE]", "\n\ndata: [DONE]\n\n", '{"error":{}}',
            '\\"content\\":\\"', "[DONE]", "content",
        ]
    ),
    st.booleans(),
)  # fmt: skip
def test_the_answers_text_cannot_pass_for_structure(text: str, ascii_only: bool) -> None:
    said = {"choices": [{"delta": {"refusal": text, "content": ""}}], "model": "m"}
    line = b"data: " + json.dumps(said, ensure_ascii=ascii_only).encode(errors="replace") + b"\n\n"
    facts = sse(HI, line).facts
    assert facts == {
        "total_tokens": 1,
        "completion_tokens": 1,
        "usage_source": "counted",
        "first_token_at": NOW_MS,
        "response_model": "m",
        "no_end": True,
    }


def test_a_reported_usage_is_the_last_word() -> None:
    facts = sse(ROLE, HI, HI, END, EXTRA, DONE).facts
    assert counts(sse(ROLE, HI, HI, END, EXTRA, DONE)) == (7, 2, 9, "reported")
    assert facts["finished"] is True
    assert "cached_tokens" not in facts


def test_null_usage_is_nothing_and_cumulative_usage_counts_once() -> None:
    null = event(choices=[{"delta": {"content": "a"}}], usage=None)
    assert counts(sse(null, null, DONE)) == (None, 2, 2, "counted")
    assert counts(sse(null, null, EXTRA)) == (7, 2, 9, "reported")
    growing = [
        event(
            choices=[{"delta": {"content": "a"}}],
            usage={"prompt_tokens": 5, "completion_tokens": n, "total_tokens": 5 + n},
        )
        for n in (1, 2, 3)
    ]
    assert counts(sse(*growing, DONE)) == (5, 3, 8, "reported")


def test_text_after_a_report_is_counted_on_top() -> None:
    first = event(choices=[{"delta": {}}], usage={"prompt_tokens": 5, "completion_tokens": 0})
    assert counts(sse(first, HI, HI)) == (5, 2, 7, "counted")
    assert counts(sse(first, HI, HI, EXTRA)) == (7, 2, 9, "reported")


def test_cached_tokens_and_a_total_of_its_own() -> None:
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 0,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    passed = sse(event(choices=[], usage=usage))
    assert counts(passed) == (10, 0, 12, "reported")
    assert passed.facts["cached_tokens"] == 0


@pytest.mark.parametrize(
    "lie", ["-1", "1.5", "1e300", '"7"', "null", "[7]", "1000000001", "NaN", "true"]
)
def test_a_lie_is_not_a_number(lie: str) -> None:
    both = f'data: {{"choices":[],"usage":{{"prompt_tokens":{lie},"completion_tokens":{lie}}}}}\n\n'
    assert counts(sse(HI, both.encode())) == (None, 1, 1, "counted")
    one = f'data: {{"choices":[],"usage":{{"prompt_tokens":4,"completion_tokens":{lie}}}}}\n\n'
    assert counts(sse(HI, one.encode())) == (4, 1, 5, "counted")
    usage = f'{{"prompt_tokens":4,"completion_tokens":1,"total_tokens":{lie}}}'
    total = f'data: {{"choices":[],"usage":{usage}}}\n\n'
    assert counts(sse(HI, total.encode())) == (4, 1, 5, "reported")
    for event_ in (both, one, total):
        odd = sse(HI, event_.encode()).facts.get("usage_odd")
        assert odd is (None if lie == "null" else True)


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 10**9, "completion_tokens": 1},
        {"prompt_tokens": 6 * 10**8, "completion_tokens": 6 * 10**8, "total_tokens": 10**9},
    ],
)
def test_a_sum_that_cannot_be_is_cut_and_noted(usage: dict[str, int]) -> None:
    """Envoy settles nothing beyond it."""
    passed = sse(HI, event(choices=[], usage=usage))
    assert passed.facts["total_tokens"] == 10**9
    assert passed.facts["usage_odd"] is True


def test_numbers_that_can_be_are_not_odd() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": None}
    assert "usage_odd" not in sse(HI, event(choices=[], usage=usage)).facts


def test_llama_cpp_timings_stand_in_for_usage() -> None:
    timings = {"cache_n": 13, "prompt_n": 1, "prompt_ms": 2.5, "predicted_n": 4, "predicted_ms": 10}
    last = event(choices=[{"delta": {}, "finish_reason": "stop"}], timings=timings)
    passed = sse(HI, HI, HI, HI, last, DONE)
    assert counts(passed) == (14, 4, 18, "reported")
    assert passed.facts["cached_tokens"] == 13
    assert passed.facts["compute_ms"] == 12.5
    both = event(choices=[], usage={"prompt_tokens": 14, "completion_tokens": 4}, timings=timings)
    assert counts(sse(HI, both)) == (14, 4, 18, "reported")
    assert sse(HI, both).facts["compute_ms"] == 12.5


@pytest.mark.parametrize(
    "line",
    [
        b'data: {"error":{"message":"x"}}\n\n',
        b"error: {}\n\n",
        b"event: error\ndata: {}\n\n",
        b'data: {"error":"x"}',
    ],
)
def test_an_error_inside_a_stream_is_noticed(line: bytes) -> None:
    facts = sse(HI, line).facts
    assert facts["upstream_error"] is True
    assert facts["total_tokens"] == 1
    assert "upstream_error" not in sse(event(error=None)).facts


def test_an_aborted_stream_is_charged_what_was_delivered() -> None:
    stream = USAGE.open_response(OURS, SSE)
    for n in range(1, 6):
        assert stream.feed(HI) == HI
        assert stream.facts["total_tokens"] == n
    assert stream.facts["usage_source"] == "counted"
    assert "finished" not in stream.facts


def test_a_chunk_costs_one_write() -> None:
    stream = USAGE.open_response(OURS, SSE)
    stream.feed(ROLE + HI)
    before = stream.sets
    for _ in range(10):
        stream.feed(HI + HI)
    assert stream.sets - before == 10
    stream.feed(b": keepalive\n\n")
    assert stream.sets - before == 10


def test_a_usage_event_of_300_kilobytes() -> None:
    big = event(x="y" * 300_000, choices=[], usage={"prompt_tokens": 7, "completion_tokens": 2})
    for size in (len(big), 1024):
        chunks = [big[i : i + size] for i in range(0, len(big), size)]
        passed = sse(HI, *chunks, DONE, metadata=OURS)
        assert counts(passed) == (7, 2, 9, "reported")
        assert passed.body == HI + DONE


# The event that facts.lua asked for.


def test_the_extra_event_goes_and_nothing_else() -> None:
    passed = sse(ROLE, HI, END, EXTRA, DONE, metadata=OURS)
    assert passed.body == ROLE + HI + END + DONE
    assert counts(passed) == (7, 2, 9, "reported")
    assert passed.facts["finished"] is True


@pytest.mark.parametrize(
    "stays",
    [
        event(choices=[], usage=None),
        event(choices=[], prompt_filter_results=[]),
        event(choices=[{"delta": {}}], usage={"prompt_tokens": 7, "completion_tokens": 2}),
        event(usage={"prompt_tokens": 7, "completion_tokens": 2}),
        b"data: {broken\n\n",
        b": \r\n\r\n",
    ],
)
def test_other_events_stay(stays: bytes) -> None:
    for chunks in ([HI, stays, DONE], one_by_one(HI + stays + DONE)):
        assert sse(*chunks, metadata=OURS).body == HI + stays + DONE


def test_a_client_that_asked_keeps_the_event() -> None:
    metadata = asked(stream_usage="client")
    assert sse(HI, EXTRA, DONE, metadata=metadata).body == HI + EXTRA + DONE


@examples(200)
@given(
    st.lists(
        st.sampled_from(
            [
                ROLE, HI, EXTRA, DONE, END,
                b": ping\n\n", b"event: x\n", b"\n", b"data: x\n\n", b"data", b"d:{}\n",
            ]
        ),
        max_size=6,
    ),
    st.sampled_from(["", "no end", "crlf"]),
    st.data(),
)  # fmt: skip
def test_wherever_the_network_splits(events: list[bytes], style: str, data: st.DataObject) -> None:
    if b"data" in events:  # an unfinished line would change the meaning of the next event
        events = events[: events.index(b"data") + 1]
    if style == "no end" and events and events[-1] != b"data":
        events[-1] = events[-1].rstrip(b"\n")
    end = b"\r\n" if style == "crlf" else b"\n"
    events = [one.replace(b"\n", end) for one in events]
    whole = b"".join(events)
    extra = EXTRA.replace(b"\n", end)
    kept = b"".join(one for one in events if one not in (extra, EXTRA.rstrip(b"\n")))

    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    chunks = [piece for piece in pieces if piece]
    ends_inside_json = whole.endswith(b"data")  # held back until the end is known
    with_last = data.draw(st.booleans()) and not ends_inside_json
    last_is_end = with_last and bool(chunks)
    passed = sse(*chunks, metadata=OURS, end_with_last=last_is_end)
    body = passed.body if last_is_end else without_cut(passed)
    apart = b"" if body == kept else b"\n" if kept.endswith(b"\n") else b"\n\n"
    assert body == kept + apart
    text = sum(one.startswith(HI.rstrip()) for one in events)
    reported = any(one.startswith(EXTRA.rstrip()) for one in events)
    if reported:
        after = [i for i, one in enumerate(events) if one.startswith(EXTRA.rstrip())][-1]
        text = sum(one.startswith(HI.rstrip()) for one in events[after:])
        assert passed.facts["total_tokens"] == 9 + text
    else:
        assert passed.facts["total_tokens"] == text
    assert passed.facts.get("finished", False) is any(
        one.startswith(b"data: [DONE]") for one in events
    )


def test_nothing_is_held_longer_than_its_line() -> None:
    stream = USAGE.open_response(OURS, SSE)
    assert stream.feed(HI[:10]) == b""
    assert stream.feed(HI[10:-2]) == HI[:-2]  # its object is complete
    assert stream.feed(b"\n") == b"\n"
    assert stream.feed(b"\n: pi") == b"\n: pi"
    assert stream.feed(b"ng\n\n") == b"ng\n\n"
    assert stream.feed(b"data: [DO") == b"data: [DO"
    assert stream.feed(b"NE]") == b"NE]"


def test_the_extra_event_goes_when_its_line_ends_come_late() -> None:
    stream = USAGE.open_response(OURS, SSE)
    assert stream.feed(HI + EXTRA[:-2]) == HI
    assert stream.facts["total_tokens"] == 9
    assert stream.feed(b"\n") == b""
    assert stream.feed(b"\n") == b""
    assert stream.feed(b"\n" + HI) == b"\n" + HI


def test_a_length_that_may_shrink_is_not_announced() -> None:
    length = {"content-length": str(len(HI))}
    assert "content-length" not in USAGE.response([HI, DONE], OURS, SSE, headers=length).headers
    passed = USAGE.response([HI], asked(), SSE, headers=length)
    assert passed.headers["content-length"] == str(len(HI))
    assert passed.body == HI  # nothing is added to a length that was announced
    assert passed.facts["no_end"] is True


def test_a_huge_line_does_not_stay() -> None:
    start = b'data: {"x":"'
    stream = USAGE.open_response(OURS, SSE)
    assert stream.feed(start) == b""
    block = b"y" * (1 << 20)
    out = b"".join([stream.feed(block) for _ in range(18)])
    assert out == start + block * 18


# Ollama.


def line(**members: object) -> bytes:
    said = {"model": "llama3.2", "created_at": "2026-08-04T08:52:19Z", **members}
    return json.dumps(said, separators=(",", ":")).encode() + b"\n"


def said(text: str) -> bytes:
    return line(message={"role": "assistant", "content": text}, done=False)


def final(**members: object) -> bytes:
    return line(
        message={"role": "assistant", "content": ""}, done=True, done_reason="stop", **members
    )


def ndjson(*chunks: bytes) -> Passed:
    passed = USAGE.response(chunks, asked(ollama()), NDJSON, headers=CHUNKED)
    whole = b"".join(chunks)
    apart = b"" if whole.endswith(b"\n") or passed.facts.get("finished") else b"\n"
    assert without_cut(passed, CUT_NDJSON) == whole + apart
    return passed


def test_an_ollama_stream() -> None:
    last = final(
        prompt_eval_count=26,
        prompt_eval_duration=325_953_000,
        eval_count=3,
        eval_duration=4_047_000,
    )
    whole = said("a") + said("true") + said('"done":true') + last
    for chunks in ([whole], one_by_one(whole), whole.splitlines(keepends=True)):
        passed = ndjson(*chunks)
        assert counts(passed) == (26, 3, 29, "reported")
        assert passed.facts["compute_ms"] == pytest.approx(330.0)
        assert passed.facts["finished"] is True
        assert passed.facts["response_model"] == "llama3.2"


@pytest.mark.parametrize(
    ("one", "tokens"),
    [
        (said("a"), 1),
        (said(""), 0),
        (line(response="a", done=False), 1),
        (line(response="", thinking="a", done=False), 1),
        (line(message={"content": "", "thinking": "a"}, done=False), 1),
        (line(message={"tool_calls": [{"arguments": {"done": True}}]}, done=False), 1),
        (b'{"done": false, "response" : "a"}\n', 1),
        (b"\n", 0),
        (b"not json\n", 0),
    ],
)  # fmt: skip
def test_one_token_for_each_ollama_line_with_text(one: bytes, tokens: int) -> None:
    facts = ndjson(said("x"), one, said("y")).facts
    assert facts["total_tokens"] == 2 + tokens
    assert facts["usage_source"] == "counted"
    assert "finished" not in facts


def test_white_space_changes_nothing() -> None:
    spaced = json.dumps({"done": True, "eval_count": 2, "response": ""}).encode() + b"\n"
    assert counts(ndjson(said("a"), said("b"), spaced)) == (0, 2, 2, "reported")


def test_ollama_leaves_out_zeros() -> None:
    assert counts(ndjson(said("a"), final(eval_count=1))) == (0, 1, 1, "reported")
    assert counts(ndjson(final(prompt_eval_count=5))) == (5, 0, 5, "reported")
    assert counts(ndjson(final())) == (0, 0, 0, "reported")
    assert counts(ndjson(said("a"), said("b"), final())) == (None, 2, 2, "counted")


def test_an_error_line() -> None:
    facts = ndjson(said("a"), b'{"error":"model runner has crashed"}\n').facts
    assert facts["upstream_error"] is True
    assert facts["total_tokens"] == 1
    assert "finished" not in facts
    assert "upstream_error" not in ndjson(said('"error":"x"')).facts


def test_a_last_line_without_end() -> None:
    assert counts(ndjson(said("a") + final(eval_count=1)[:-1])) == (0, 1, 1, "reported")


# One JSON answer.


def answer(body: object, metadata: Any = None, size: int = 50) -> Passed:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    passed = USAGE.response(
        [raw[i : i + size] for i in range(0, len(raw), size)], metadata or asked()
    )
    assert passed.body == raw
    return passed


def test_an_openai_answer() -> None:
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    passed = answer({"model": "m", "choices": [], "usage": usage})
    assert counts(passed) == (3, 1, 4, "reported")
    assert passed.facts["cached_tokens"] == 2
    assert passed.facts["finished"] is True
    assert passed.facts["response_model"] == "m"
    assert counts(answer({"timings": {"prompt_n": 3, "predicted_n": 1}})) == (3, 1, 4, "reported")


def test_numbers_in_the_text_never_count() -> None:
    text = 'x","usage":{"prompt_tokens":99,"completion_tokens":99},"eval_count":9'
    passed = answer({"choices": [{"message": {"content": text, "usage": {"prompt_tokens": 9}}}]})
    assert counts(passed)[3] == "estimated"


def test_an_answer_without_usage_is_charged_by_its_size() -> None:
    body = {"choices": [{"message": {"content": "x" * 100}}]}
    size = len(json.dumps(body).encode())
    completion = -(-size // 4)
    said = counts(answer(body, asked(body_bytes="41")))
    assert said == (11, completion, 11 + completion, "estimated")
    embed = asked(ollama(endpoint="/api/embeddings"), body_bytes="41")
    assert counts(answer({"embedding": [0.1] * 50}, embed)) == (11, 0, 11, "estimated")


def test_an_error_of_status_200_costs_nothing() -> None:
    passed = answer({"error": "out of memory"})
    assert counts(passed) == (None, None, 0, None)
    assert passed.facts["upstream_error"] is True


def test_embeddings_have_no_completion() -> None:
    usage = {"prompt_tokens": 8, "total_tokens": 8}
    assert counts(answer({"data": [{"embedding": [0.1] * 500}], "usage": usage})) == (
        8,
        0,
        8,
        "reported",
    )
    embed = {"model": "m", "embeddings": [[0.1]], "prompt_eval_count": 8}
    assert counts(answer(embed, asked(ollama(endpoint="/api/embed")))) == (8, 0, 8, "reported")


def test_an_ollama_answer() -> None:
    body = {
        "model": "m",
        "response": "a b",
        "done": True,
        "eval_count": 2,
        "eval_duration": 2_000_000,
    }
    passed = answer(body, asked(ollama(endpoint="/api/generate")))
    assert counts(passed) == (0, 2, 2, "reported")
    assert passed.facts["compute_ms"] == 2


def test_half_an_answer_is_not_finished() -> None:
    half = answer(b'{"model":"m","usage":{"prompt_tokens":3,"completion_tokens":1}')
    assert "finished" not in half.facts
    assert counts(half)[3] == "estimated"
    assert answer(b"").facts == {"total_tokens": 0}
    assert "finished" not in answer(b"[1]").facts


def test_an_answer_that_is_too_long_is_charged_by_its_size() -> None:
    raw = (
        b'{"x":"'
        + b"y" * (16 * 1024 * 1024)
        + b'","usage":{"prompt_tokens":3,"completion_tokens":1}}'
    )
    assert counts(answer(raw, size=1 << 20))[3] == "estimated"


@pytest.mark.parametrize("name", ['"' + "a" * 300 + '"', '"\\ud800"', '"a\\n"', "7", "null", '""'])
def test_a_strange_model_name_is_left_out(name: str) -> None:
    assert "response_model" not in answer(f'{{"model":{name}}}'.encode()).facts
    assert "response_model" not in sse(f'data: {{"model":{name}}}\n\n'.encode()).facts
