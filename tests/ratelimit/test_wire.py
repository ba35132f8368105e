import contextlib
import json

import pytest
from envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import wire
from ratelimit.rules import MOST_TOKENS, Admitted, Refused, Reserve, Room, Settle, duration

RESERVE = {
    "user": "u1", "role": "user", "key": "k1", "gateway": "openai", "dialect": "openai",
    "model": "smollm2", "endpoint": "/v1/chat/completions", "max_tokens": "100",
    "body_bytes": "400", "request_id": "r1",
}  # fmt: skip


def request(entries, hits=None) -> RateLimitRequest:
    call = RateLimitRequest(domain="parallama")
    descriptor = call.descriptors.add()
    for key, value in entries.items():
        descriptor.entries.add(key=key, value=value)
    if hits is not None:
        descriptor.hits_addend.value = hits
    return call


def parsed(call: RateLimitRequest) -> Reserve | Settle:
    return wire.parse(call.SerializeToString())


def admitted(answer: Admitted) -> RateLimitResponse:
    return RateLimitResponse.FromString(wire.admitted(answer))


def headers(response: RateLimitResponse) -> dict[str, str]:
    return {header.key: header.value for header in response.response_headers_to_add}


def test_whether_a_call_may_want_to_spend_is_seen_before_it_is_parsed():
    settle = {"user": "u1", "reservation": "r1", "gateway": "openai"}
    assert wire.may_reserve(request(RESERVE).SerializeToString())
    assert not wire.may_reserve(request(settle, hits=7).SerializeToString())


def test_a_reserve_call():
    assert parsed(request(RESERVE)) == Reserve(
        user="u1",
        key="k1",
        gateway="openai",
        dialect="openai",
        model="smollm2",
        endpoint="/v1/chat/completions",
        max_tokens=100,
        body_bytes=400,
        request_id="r1",
    )


@pytest.mark.parametrize("name", ["role", "key", "model", "endpoint", "max_tokens", "body_bytes"])
def test_what_is_optional_may_be_empty_or_absent(name):
    without = {key: value for key, value in RESERVE.items() if key != name}
    assert parsed(request({**RESERVE, name: ""})) == parsed(request(without))


@pytest.mark.parametrize("name", ["user", "gateway", "dialect", "request_id"])
def test_what_is_needed_may_not(name):
    without = {key: value for key, value in RESERVE.items() if key != name}
    for entries in ({**RESERVE, name: ""}, without):
        with pytest.raises(wire.BadCall, match=f"{name} is missing"):
            parsed(request(entries))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("0", None), ("-1", None), ("-2", None), ("1", 1), ("007", 7),
        ("9" * 18, 10**18 - 1), ("9" * 5000, MOST_TOKENS),
    ],
)  # fmt: skip
def test_max_tokens(text, value):
    ask = parsed(request({**RESERVE, "max_tokens": text}))
    assert isinstance(ask, Reserve)
    assert ask.max_tokens == value


@pytest.mark.parametrize("text", ["a", "1.5", "1e9", " 1", "+1", "--1", "-", "٣", "0x10", "1_0"])
@pytest.mark.parametrize("name", ["max_tokens", "body_bytes"])
def test_what_is_no_number_is_refused(name, text):
    with pytest.raises(wire.BadCall, match=f"{name} is not a whole number"):
        parsed(request({**RESERVE, name: text}))


TEXT = st.text(max_size=300)
ENTRIES = st.lists(st.tuples(st.sampled_from(["user", "model", "reservation"]) | TEXT, TEXT))


@given(ENTRIES, st.none() | st.integers(0, 2**64 - 1))
def test_a_message_as_envoy_writes_it_is_read_as_the_library_does(entries, hits):
    call = RateLimitRequest(domain="parallama")
    descriptor = call.descriptors.add()
    for key, value in entries:
        descriptor.entries.add(key=key, value=value)
    if hits is not None:
        descriptor.hits_addend.value = hits
    message = call.SerializeToString()
    quick = wire.as_envoy_writes_it(message)
    if quick is None:
        names = [key for key, _ in entries]
        odd = any(not key or not value or len(key.encode()) > 127 for key, value in entries)
        assert odd or len(set(names)) < len(names) or (hits or 0) >= 2**63
    else:
        assert quick == wire.read(message)


def changed(message: bytes, at: int, cut: int, put: bytes) -> bytes:
    at %= len(message)
    return message[:at] + put + message[at + cut :]


@given(
    st.sampled_from([request(RESERVE), request({"user": "u1", "reservation": "r1"}, hits=2**40)]),
    st.lists(st.tuples(st.integers(0), st.integers(0, 3), st.binary(max_size=3)), max_size=4),
)
def test_what_went_wrong_on_the_way_is_never_read_as_something_else(call, changes):
    message = call.SerializeToString()
    for change in changes:
        message = changed(message, *change) if message else b""
    quick = wire.as_envoy_writes_it(message)
    if quick is not None:
        assert quick == wire.read(message)
    with contextlib.suppress(wire.BadCall):
        wire.parse(message)


@given(TEXT, TEXT, st.integers(0, 10**18), st.none() | st.integers(0, 10**18))
def test_an_answer_reads_as_it_was_written(reservation, decision, number, left):
    room = None if left is None else Room(number, left, left % 10**6)
    answer = Admitted(reservation, number, room, room, decision=decision, would_refuse=("a", "b"))
    response = admitted(answer)
    assert response.overall_code == RateLimitResponse.OK
    left_over = {} if left is None else {"requests_left": left, "tokens_left": left}
    assert dict(response.dynamic_metadata) == {
        "reservation": reservation,
        "granted": float(number),
        "would_refuse": "a; b",
        **({"decision": decision} if decision else {}),
        **{name: float(amount) for name, amount in left_over.items()},
    }
    assert len(headers(response)) == (0 if left is None else 6)
    assert set(headers(response).values()) <= {
        str(number),
        str(left),
        duration((left or 0) % 10**6),
    }


def test_a_settle_call():
    call = request({"user": "u1", "reservation": "r1"}, hits=42)
    assert parsed(call) == Settle("u1", "r1", 42)


def test_settling_nothing_is_not_settling_one():
    assert parsed(request({"user": "u1", "reservation": "r1"}, hits=0)) == Settle("u1", "r1", 0)


def test_a_charge_is_bounded():
    call = request({"user": "u1", "reservation": "r1"}, hits=2**64 - 1)
    assert parsed(call) == Settle("u1", "r1", MOST_TOKENS)


def twice(call: RateLimitRequest) -> RateLimitRequest:
    call.descriptors.append(call.descriptors[0])
    return call


def repeated(call: RateLimitRequest) -> RateLimitRequest:
    call.descriptors[0].entries.add(key="user", value="u2")
    return call


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(RateLimitRequest(), id="empty"),
        pytest.param(request({}), id="no entries"),
        pytest.param(twice(request(RESERVE)), id="two descriptors"),
        pytest.param(repeated(request(RESERVE)), id="two users"),
        pytest.param(request({**RESERVE, "dialect": "klingon"}), id="unknown dialect"),
        pytest.param(request({"user": "u1", "reservation": "r1"}), id="no addend"),
        pytest.param(request({"user": "u1", "reservation": ""}, hits=1), id="no reservation"),
        pytest.param(request({"reservation": "r1"}, hits=1), id="no user"),
    ],
)
def test_bad_calls(call):
    with pytest.raises(wire.BadCall):
        parsed(call)


def test_an_admitted_call():
    response = admitted(Admitted("r1", 200, Room(10, 9, 48), Room(1000, 800, 3600)))
    assert response.overall_code == RateLimitResponse.OK
    assert not response.raw_body
    assert dict(response.dynamic_metadata) == {
        "reservation": "r1",
        "granted": 200,
        "tokens_left": 800,
        "requests_left": 9,
    }
    assert headers(response) == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "48s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "800",
        "x-ratelimit-reset-tokens": "1h0m0s",
    }


def test_a_call_without_limits_is_settled_too():
    response = admitted(Admitted("r1", 5, None, None))
    assert dict(response.dynamic_metadata) == {"reservation": "r1", "granted": 5}
    assert headers(response) == {}


def test_a_unit_without_a_limit_has_no_headers():
    response = admitted(Admitted("r1", 0, Room(10, 9, 48), None))
    assert {name.rpartition("-")[2] for name in headers(response)} == {"requests"}
    assert set(dict(response.dynamic_metadata)) == {"reservation", "granted", "requests_left"}


def test_what_else_is_told():
    answer = Admitted("r1", 5, None, None, cap=17, would_refuse=("1 request per day", "x"))
    told = dict(admitted(answer).dynamic_metadata)
    assert (told["cap"], told["would_refuse"]) == ("17", "1 request per day; x")


def refused(dialect, *, may_retry=True) -> RateLimitResponse:
    answer = Refused("rate_limit_exceeded", "Too fast.", 48, may_retry, Room(10, 0, 48), None)
    return RateLimitResponse.FromString(wire.refused(answer, dialect))


def test_a_refusal():
    response = refused("openai")
    assert response.overall_code == RateLimitResponse.OVER_LIMIT
    found = headers(response)
    assert found["content-type"] == "application/json"
    assert found["retry-after"] == "48"
    assert found["x-ratelimit-remaining-requests"] == "0"
    assert "x-should-retry" not in found
    assert json.loads(response.raw_body)["error"]["code"] == "rate_limit_exceeded"


def test_a_refusal_that_waiting_does_not_help():
    assert headers(refused("openai", may_retry=False))["x-should-retry"] == "false"


def test_ollama_gets_one_sentence():
    assert json.loads(refused("ollama").raw_body) == {"error": "Too fast."}


def test_anthropics_form_names_the_request():
    answer = Refused("insufficient_quota", "All is spent.", 48, False, None, None)
    sent = RateLimitResponse.FromString(wire.refused(answer, "anthropic", request_id="r-1"))
    assert json.loads(sent.raw_body) == {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "All is spent."},
        "request_id": "r-1",
    }


@pytest.mark.parametrize("dialect", ["ollama", "openai", "anthropic"])
def test_a_call_may_be_of_any_dialect(dialect):
    assert parsed(request({**RESERVE, "dialect": dialect})).dialect == dialect


def test_what_a_charge_teaches():
    entries = {
        "user": "u1", "key": "k", "gateway": "openai", "reservation": "r1", "model": "m",
        "body_bytes": "90",
    }  # fmt: skip
    told = parsed(request({**entries, "prompt_reported": "31"}, hits=42))
    assert told == Settle("u1", "r1", 42, "k", "openai", "m", 90, 31)
    assert parsed(request(entries, hits=42)).prompt_tokens is None
    assert not told.bounded
    assert parsed(request({**entries, "max_tokens": "5"}, hits=42)).bounded
