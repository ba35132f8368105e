"""What an entry of Envoy's log means as a row: every field, and the odd endings of requests."""

import json
from base64 import b64encode
from datetime import UTC, datetime
from typing import Any

import pytest
from envoy.data.accesslog.v3 import accesslog_pb2 as pb

from parallama import contract as c
from parallama.usage import UsageRecord
from tests.usage_sink.make import START, STREAM, WHO, an_entry
from usage_sink import wire
from usage_sink.counting import Text


def row(entry: pb.HTTPAccessLogEntry) -> UsageRecord:
    finished = wire.parse(entry)
    assert finished is not None
    return finished.record


def without(facts: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in names}


def test_a_finished_stream_field_by_field() -> None:
    assert row(an_entry()) == UsageRecord(
        request_id="r1",
        timestamp=datetime.fromtimestamp(START, UTC).replace(microsecond=500_000),
        user_id="user-1",
        username="anna",
        key_id="key-1",
        gateway="ollama",
        dialect="openai",
        endpoint="/v1/chat/completions",
        model_name="llama3",
        served_model="llama3:8b",
        prompt_tokens=11,
        completion_tokens=20,
        cached_tokens=None,
        tokens_used=31,
        token_source="reported",
        streamed=True,
        finished=True,
        aborted=False,
        status_code=200,
        flags="",
        error_message=None,
        request_duration=1.5,
        time_to_first_token=0.25,
        compute_ms=812.5,
        upstream_host="127.0.0.1:11434",
        cost=None,
        attempts=1,
    )


def test_a_name_that_is_mapped_is_kept_beside_the_model_that_it_means() -> None:
    at = row(an_entry(lua={**STREAM, c.REQUESTED_MODEL: "gpt-4"}))
    assert (at.model_name, at.requested_model) == ("llama3", "gpt-4")
    assert row(an_entry()).requested_model is None


def test_a_call_that_spends_nothing_is_a_row_as_well() -> None:
    """A list of models: authz knows who asked, and the filters that count never ran."""
    at = row(an_entry(who={**without(WHO, c.METERED), c.ENDPOINT: "/v1/models"}, lua=None))
    assert (at.endpoint, at.tokens_used, at.token_source) == ("/v1/models", 0, "counted")
    assert (at.model_name, at.prompt_tokens, at.completion_tokens) == (None, None, None)
    assert (at.streamed, at.finished) == (False, False)


# Nobody's entries.


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(an_entry(who=None, lua=None, status=401), id="401: nobody is known"),
        pytest.param(an_entry(who=None, lua=None, status=404, details="direct_response"), id="404"),
        pytest.param(an_entry(intermediate=True), id="an entry before the end"),
        pytest.param(pb.HTTPAccessLogEntry(), id="an empty entry"),
        pytest.param(an_entry(who={}), id="metadata that names nobody"),
        pytest.param(an_entry(who={c.USER: 7, c.USERNAME: "anna"}), id="a user that is no text"),
    ],
)
def test_an_entry_of_nobody_is_no_row(entry: pb.HTTPAccessLogEntry) -> None:
    assert wire.parse(entry) is None


# How it ended.


@pytest.mark.parametrize(
    ("ending", "status", "aborted", "flags", "error"),
    [
        pytest.param({}, 200, False, "", None, id="well"),
        pytest.param(
            {"status": 0, "flags": ("downstream_connection_termination",), "details": "downstream"},
            499, True, "DC", "downstream", id="the client left before any answer",
        ),
        pytest.param(
            {"status": 200, "flags": ("downstream_connection_termination",)},
            200, True, "DC", None, id="the client left in mid-stream",
        ),
        pytest.param(
            {"status": 200, "flags": ("downstream_remote_reset",)},
            200, True, "DR", None, id="the client cancelled its HTTP/2 stream",
        ),
        pytest.param(
            {"status": 0, "details": "downstream_remote_disconnect"},
            499, True, "", "downstream_remote_disconnect", id="the client left, said in words only",
        ),
        pytest.param(
            {"status": 200, "flags": ("upstream_connection_termination",)},
            200, False, "UC", None, id="the upstream was cut in mid-stream",
        ),
        pytest.param(
            {
                "status": 503, "flags": ("upstream_connection_failure",),
                "lua": {c.TOTAL_TOKENS: 0},
                "details": "upstream_reset_before_response_started{connection_failure}",
            },
            503, False, "UF", "upstream_reset_before_response_started{connection_failure}",
            id="the upstream is down",
        ),
        pytest.param(
            {"status": 503, "flags": ("no_healthy_upstream",), "details": "no_healthy_upstream"},
            503, False, "UH", "no_healthy_upstream", id="no upstream at all",
        ),
        pytest.param(
            {"status": 504, "flags": ("stream_idle_timeout",), "details": "stream_idle_timeout"},
            504, False, "SI", "stream_idle_timeout", id="silence for too long",
        ),
        pytest.param(
            {"status": 429, "flags": ("rate_limited",), "details": "request_rate_limited"},
            429, False, "RL", "request_rate_limited", id="over a limit",
        ),
        pytest.param(
            {"status": 403, "flags": ("unauthorized_details",), "details": "ext_authz_denied"},
            403, False, "UAEX", "ext_authz_denied", id="a good key that may not",
        ),
        pytest.param({"status": 500}, 500, False, "", None, id="the upstream's own error"),
        pytest.param({"status": 0}, 0, False, "", None, id="no status and nobody left"),
        pytest.param(
            {"flags": ("upstream_connection_termination", "upstream_retry_limit_exceeded")},
            200, False, "UC,URX", None, id="two flags",
        ),
        pytest.param(
            {"lua": {**STREAM, c.UPSTREAM_ERROR: True}},
            200, False, "", "the upstream reported an error inside its answer",
            id="200 with an error line",
        ),
    ],
)  # fmt: skip
def test_how_a_request_ended(
    ending: dict[str, Any], status: int, aborted: bool, flags: str, error: str | None
) -> None:
    at = row(an_entry(**ending))
    assert (at.status_code, at.aborted, at.flags, at.error_message) == (
        status,
        aborted,
        flags,
        error,
    )


@pytest.mark.parametrize("name", [field.name for field in pb.ResponseFlags.DESCRIPTOR.fields])
def test_every_flag_has_its_short_name(name: str) -> None:
    short = row(an_entry(flags=(name,))).flags
    assert short.isupper()
    assert short.isalpha()
    assert len(short) <= 5


# What was spent, and how that is known.


@pytest.mark.parametrize(
    ("lua", "prompt", "completion", "used", "source"),
    [
        pytest.param(STREAM, 11, 20, 31, "reported", id="reported"),
        pytest.param(
            {c.PROMPT_TOKENS: 0, c.COMPLETION_TOKENS: 0, c.TOTAL_TOKENS: 0,
             c.USAGE_SOURCE: "reported"},
            0, 0, 0, "reported", id="zero is a number",
        ),
        pytest.param(
            {c.TOTAL_TOKENS: 7, c.USAGE_SOURCE: "counted"},
            None, 7, 7, "counted", id="a stream that was cut: what was delivered",
        ),
        pytest.param(
            {c.TOTAL_TOKENS: 7, c.COMPLETION_TOKENS: 7, c.USAGE_SOURCE: "counted"},
            None, 7, 7, "counted", id="a whole stream that reported nothing",
        ),
        pytest.param(
            {c.PROMPT_TOKENS: 30, c.COMPLETION_TOKENS: 70, c.TOTAL_TOKENS: 100,
             c.USAGE_SOURCE: "estimated"},
            30, 70, 100, "estimated", id="estimated",
        ),
        pytest.param({c.TOTAL_TOKENS: 0}, None, None, 0, "counted", id="refused: nothing spent"),
        pytest.param({}, None, None, 0, "counted", id="nothing was written"),
        pytest.param(
            {c.PROMPT_TOKENS: 5, c.TOTAL_TOKENS: 5, c.USAGE_SOURCE: "reported"},
            5, None, 5, "reported", id="missing is not zero",
        ),
        pytest.param(
            {c.TOTAL_TOKENS: 5, c.USAGE_SOURCE: "guessed"},
            None, None, 5, "counted", id="a source nobody knows",
        ),
        pytest.param(
            {c.TOTAL_TOKENS: "5", c.PROMPT_TOKENS: [1], c.USAGE_SOURCE: 7},
            0, None, 0, "counted", id="facts of the wrong kind",
        ),
    ],
)  # fmt: skip
def test_tokens_and_their_source(
    lua: dict[str, Any], prompt: int | None, completion: int | None, used: int, source: str
) -> None:
    at = row(an_entry(lua=lua))
    assert (at.prompt_tokens, at.completion_tokens, at.tokens_used, at.token_source) == (
        prompt,
        completion,
        used,
        source,
    )


def test_cached_tokens_are_a_part_of_the_prompt_and_kept_apart() -> None:
    at = row(an_entry(lua={**STREAM, c.CACHED_TOKENS: 4}))
    assert (at.cached_tokens, at.prompt_tokens, at.tokens_used) == (4, 11, 31)


# When the first token came.


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        pytest.param({}, 0.25, id="as Lua saw it"),
        pytest.param({"nanos": 740_000_000}, 0.01, id="to the millisecond"),
        pytest.param({"nanos": 751_000_000}, 0.0, id="clocks that round differently"),
        pytest.param(
            {"lua": without(STREAM, c.FIRST_TOKEN_AT)}, 0.2, id="no stream: the answer's first byte"
        ),
        pytest.param(
            {"lua": without(STREAM, c.FIRST_TOKEN_AT), "first_byte": None}, None, id="no answer"
        ),
        pytest.param(
            {"lua": without(STREAM, c.FIRST_TOKEN_AT), "status": 500}, None, id="an error: no token"
        ),
    ],
)
def test_time_to_the_first_token(fields: dict[str, Any], seconds: float | None) -> None:
    at = row(an_entry(**fields)).time_to_first_token
    assert at == (None if seconds is None else pytest.approx(seconds, abs=0.0005))


# What the limits had left.


@pytest.mark.parametrize(
    ("limits", "tokens_left", "requests_left"),
    [
        pytest.param(None, None, None, id="nothing is limited"),
        pytest.param(
            {c.RESERVATION: "r1", c.GRANTED: 150, c.TOKENS_LEFT: 850}, 969, None,
            id="what was held comes back, what was used goes",
        ),
        pytest.param(
            {c.RESERVATION: "r1", c.GRANTED: 10, c.TOKENS_LEFT: 0}, -21, None,
            id="a call that crossed its limit",
        ),
        pytest.param({c.REQUESTS_LEFT: 3}, None, 3, id="requests only"),
        pytest.param({c.TOKENS_LEFT: 0, c.REQUESTS_LEFT: 0}, -31, 0, id="nothing was granted"),
    ],
)  # fmt: skip
def test_what_is_left_after_it(
    limits: dict[str, Any] | None, tokens_left: int | None, requests_left: int | None
) -> None:
    finished = wire.parse(an_entry(limits=limits))
    assert finished is not None
    assert (finished.tokens_left, finished.requests_left) == (tokens_left, requests_left)


# Odd values.


@pytest.mark.parametrize("text", ["", "Über-Modell 🦙", "x" * 100_000, "a,b", "\x00"])
def test_names_are_taken_as_they_are(text: str) -> None:
    at = row(an_entry(lua={**STREAM, c.MODEL: text}))
    assert at.model_name == (text or None)


def test_an_upstream_that_was_never_reached_has_no_address() -> None:
    nowhere = row(an_entry(upstream=""))
    assert (nowhere.upstream_host, nowhere.attempts) == (None, None)


def test_an_address_is_written_as_envoy_writes_it() -> None:
    assert row(an_entry(upstream="::1")).upstream_host == "[::1]:11434"


@pytest.mark.parametrize(
    ("number", "taken", "odd"),
    [
        pytest.param(-1.0, 0, True, id="negative"),
        pytest.param(0.9, 0, False, id="a part of a token"),
        pytest.param(1e9, 10**9, False, id="the most"),
        pytest.param(1e9 + 1, 10**9, True, id="more"),
        pytest.param(1e300, 10**9, True, id="absurd"),
        pytest.param(float("inf"), 10**9, True, id="infinite"),
        pytest.param(float("nan"), None, True, id="no number"),
    ],
)
@pytest.mark.parametrize("name", [c.CACHED_TOKENS, c.PROMPT_TOKENS, c.COMPLETION_TOKENS])
def test_a_number_that_cannot_be_is_brought_where_it_can_and_the_row_says_so(
    name: str, number: float, taken: int | None, odd: bool
) -> None:
    """Where Lua or an upstream went wrong, who asked for what is still worth knowing."""
    finished = wire.parse(an_entry(lua={**STREAM, name: number}))
    assert finished is not None
    assert getattr(finished.record, name) == taken
    assert finished.odd == ((name,) if odd else ())
    said = "the upstream reported a usage that cannot be"
    assert finished.record.error_message == (said if odd else None)


@pytest.mark.parametrize(("number", "used"), [(float("nan"), 0), (-7.0, 0), (1e18, 10**9)])
def test_what_is_charged_is_a_number_as_well(number: float, used: int) -> None:
    assert row(an_entry(lua={**STREAM, c.TOTAL_TOKENS: number})).tokens_used == used


def test_what_lua_left_out_because_it_cannot_be_is_marked() -> None:
    finished = wire.parse(an_entry(lua={**STREAM, c.USAGE_ODD: True}))
    assert finished is not None
    assert finished.odd == (c.USAGE_ODD,)
    assert finished.record.error_message == "the upstream reported a usage that cannot be"


@pytest.mark.parametrize(("number", "ms"), [(float("nan"), None), (-1.0, 0), (1e300, 1e9)])
def test_time_that_a_model_cannot_have_worked(number: float, ms: float | None) -> None:
    assert row(an_entry(lua={**STREAM, c.COMPUTE_MS: number})).compute_ms == ms


LIMITS = '"policy_at":1772366399.512,"limit":"100 tokens per day","used":12,"held":8,"needs":8'


@pytest.mark.parametrize(
    ("who", "limits", "decision"),
    [
        pytest.param({}, {}, None, id="an authz that says nothing of it"),
        pytest.param({c.KNOWN_AT: 1772366400.1234}, {}, '{"known_at":1772366400.123}', id="a list"),
        pytest.param(
            {c.KNOWN_AT: 1772366400.0, c.RULE: "role"},
            {},
            '{"rule":"role","known_at":1772366400.000}',
            id="refused by authz",
        ),
        pytest.param(
            {c.KNOWN_AT: 1772366400.0},
            {c.DECISION: LIMITS},
            f'{{"known_at":1772366400.000,{LIMITS}}}',
            id="let in",
        ),
        pytest.param({c.KNOWN_AT: float("nan")}, {}, None, id="no number"),
    ],
)
def test_a_row_says_why_it_was_decided_so(
    who: dict[str, Any], limits: dict[str, Any], decision: str | None
) -> None:
    told = row(an_entry(who={**WHO, **who}, limits=limits)).decision
    assert told == decision
    assert told is None or json.loads(told)


def test_what_grants_paid_for_is_in_the_row() -> None:
    assert row(an_entry(limits={c.GRANTS: "tokens:g1"})).grants == "tokens:g1"
    assert row(an_entry(limits={c.GRANTED: 5})).grants is None


# Text that is to be counted.


def packed(text: str | bytes) -> str:
    return b64encode(text if isinstance(text, bytes) else text.encode()).decode()


COUNTED = {**STREAM, c.USAGE_SOURCE: "counted"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ({c.PROMPT: packed("one"), "1": packed("two")}, Text(b"one", b"two")),
        ({c.PROMPT: packed("one")}, Text(b"one", None)),
        ({"1": packed("a"), "2": packed("b"), "10": packed("z")}, Text(None, b"ab")),
        ({str(n): packed(f"{n},") for n in (1, 2, 3)}, Text(None, b"1,2,3,")),
        (
            {c.PROMPT: packed("a"), c.PROMPT_MORE: 7, "1": packed("b"), c.ANSWER_MORE: 9.0},
            Text(b"a", b"b", 7, 9),
        ),
        ({c.PROMPT: packed(b"\xff\x00")}, Text(b"\xff\x00", None)),
        ({c.PROMPT: False, "1": False}, None),
        ({c.PROMPT: False, "1": packed("a")}, Text(None, b"a")),
        ({}, None),
        (None, None),
        ({c.PROMPT: "no base64!", "1": packed("a")}, Text(b"", b"a")),
        ({c.PROMPT: "\u00e9", c.PROMPT_MORE: float("nan"), c.ANSWER_MORE: 1e300}, Text(b"", None)),
        ({c.PROMPT: 7, "1": [1], c.PROMPT_MORE: "x"}, None),
    ],
)
def test_text_is_unpacked(text: dict[str, Any] | None, found: Text | None) -> None:
    assert wire.text_of(an_entry(lua=COUNTED, text=text)) == found


@pytest.mark.parametrize(
    ("lua", "counts"),
    [
        (COUNTED, True),
        ({**STREAM, c.USAGE_SOURCE: "estimated"}, True),
        (STREAM, False),  # reported
        ({c.TOTAL_TOKENS: 0}, False),  # no answer began
        (None, False),
    ],
)
def test_text_counts_where_there_is_an_answer_and_no_report(
    lua: dict[str, Any] | None, counts: bool
) -> None:
    text = {c.PROMPT: packed("one"), "1": packed("two")}
    assert (wire.text_of(an_entry(lua=lua, text=text)) is not None) == counts
