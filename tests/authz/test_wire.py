"""Envoy's own messages, as they come and as they should not."""

import json
from typing import Any

import pytest
from envoy.service.auth.v3 import external_auth_pb2 as pb

from authz import wire
from authz.decide import Allow, Asked, Deny, ModelAsked, identify
from parallama import contract as c
from parallama.db.accounts import KeyRecord
from parallama.roles import Role
from tests.authz.make import NOW, TOKEN, a_check, a_key, a_model_check, an_ask


def parsed(**fields: Any) -> Asked:
    asked = wire.parse(a_check(**fields))
    assert isinstance(asked, Asked)
    return asked


def credentials(headers: dict[str, str]) -> tuple[str, ...]:
    return parsed(headers=headers).credentials


def allowed(
    key: KeyRecord, method: str, path: str, *, count_text: bool = False
) -> pb.CheckResponse:
    decision = identify(
        an_ask(method=method, path=path, gateway="ollama"), key, gateways=("ollama",), now=NOW
    )
    assert isinstance(decision, Allow)
    return pb.CheckResponse.FromString(wire.render_allow(decision, count_text=count_text))


# In.


def test_the_requests_id_is_told_for_a_refusal() -> None:
    assert parsed(headers={"x-request-id": "r-1"}).told_id == "r-1"
    check = a_model_check()
    check.attributes.request.http.headers["x-request-id"] = "r-2"
    asked = wire.parse(check)
    assert isinstance(asked, ModelAsked)
    assert asked.told_id == "r-2"


def test_an_anthropic_refusal_names_the_request() -> None:
    sent = pb.CheckResponse.FromString(wire.render_deny(Deny(401, "c", "Why."), "anthropic", "r-1"))
    assert json.loads(sent.denied_response.body) == {
        "type": "error",
        "error": {"type": "authentication_error", "message": "Why."},
        "request_id": "r-1",
    }


def test_the_first_question() -> None:
    assert wire.parse(a_check()) == an_ask()


def test_a_prefix_of_the_route_and_the_query_do_not_belong_to_the_path() -> None:
    route = {c.ROUTE_GATEWAY: "ollama", c.ROUTE_DIALECT: "ollama", c.ROUTE_BASE: "/ollama"}
    asked = parsed(path="/ollama/api/chat?a=/b?c", route=route)
    assert (asked.path, asked.query) == ("/api/chat", "a=/b?c")
    assert (asked.gateway, asked.dialect) == ("ollama", "ollama")


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({}, ()),
        ({"authorization": f"Bearer {TOKEN}"}, (TOKEN,)),
        ({"authorization": f"bearer {TOKEN}"}, (TOKEN,)),
        ({"authorization": f"BEARER   {TOKEN} "}, (TOKEN,)),
        ({"x-api-key": TOKEN}, (TOKEN,)),
        ({"api-key": f" {TOKEN} "}, (TOKEN,)),
        ({"authorization": f"Bearer {TOKEN}", "x-api-key": "x"}, (TOKEN, "x")),
        ({"authorization": f"Bearer {TOKEN}", "api-key": "y", "x-api-key": "x"}, (TOKEN, "x", "y")),
        ({"authorization": TOKEN}, ("",)),
        ({"authorization": f"Basic {TOKEN}"}, ("",)),
        ({"authorization": "Bearer"}, ("",)),
        ({"authorization": ""}, ("",)),
        ({"x-api-key": ""}, ("",)),
        # Envoy joins a header that came twice.
        ({"authorization": f"Bearer {TOKEN},Bearer {TOKEN}"}, (f"{TOKEN},Bearer {TOKEN}",)),
        ({"x-api-key": f"{TOKEN},{TOKEN}"}, (f"{TOKEN},{TOKEN}",)),
        ({"authorization": "Bearer ключ 🔑"}, ("ключ 🔑",)),
        ({"x-key": TOKEN, "cookie": TOKEN}, ()),
    ],
)
def test_credentials_by_header(headers: dict[str, str], found: tuple[str, ...]) -> None:
    assert credentials(headers) == found


def test_a_header_of_a_megabyte_is_just_a_wrong_key() -> None:
    assert credentials({"authorization": "Bearer " + "x" * (1 << 20)}) == ("x" * (1 << 20),)


def test_nothing_at_all_is_an_ask_of_no_gateway() -> None:
    """No route names a gateway '': whatever key comes with it, there is nothing here."""
    asked = wire.parse(pb.CheckRequest())
    assert asked == Asked("", "", "", "", "", "", ())
    assert isinstance(asked, Asked)
    refused = identify(asked, a_key(role=Role.ADMIN), gateways=("ollama", "openai"), now=NOW)
    assert isinstance(refused, Deny)
    assert refused.status == 404


@pytest.mark.parametrize(
    ("authz", "lua", "asked"),
    [
        pytest.param(
            None,
            {c.MODEL: "llama3"},
            ModelAsked("openai", ("llama3", "gemma*"), "llama3"),
            id="as it should be",
        ),
        pytest.param(
            None, {}, ModelAsked("openai", ("llama3", "gemma*"), None), id="no model named"
        ),
        pytest.param(
            None,
            {c.MODEL: "llama3", c.REQUESTED_MODEL: "gpt-4"},
            ModelAsked("openai", ("llama3", "gemma*"), "llama3", requested="gpt-4"),
            id="a name that is mapped",
        ),
        pytest.param(
            None, None, ModelAsked("openai", ("llama3", "gemma*"), None), id="the body was not read"
        ),
    ],
)
def test_the_second_question(
    authz: dict[str, Any] | None, lua: dict[str, Any] | None, asked: ModelAsked
) -> None:
    assert wire.parse(a_model_check(authz, lua)) == asked


# Out.


def test_an_allowed_call_says_who_it_is_and_nothing_to_the_upstream() -> None:
    answer = allowed(a_key(), "POST", "/api/chat")
    assert answer.status.code == 0
    assert answer.WhichOneof("http_response") == "ok_response"
    assert answer.ok_response == pb.OkHttpResponse()
    assert dict(answer.dynamic_metadata) == {
        c.USER: "user-1",
        c.USERNAME: "anna",
        c.KEY: "key-1",
        c.ROLE: "user",
        c.GATEWAY: "ollama",
        c.DIALECT: "openai",
        c.ENDPOINT: "/api/chat",
        c.KNOWN_AT: 0.0,
        c.METERED: "1",
        c.READ_BODY: True,
        c.WATCH: "openai user-1 key key-1",
    }


@pytest.mark.parametrize(
    ("models", "method", "path", "told"),
    [
        (None, "POST", "/v1/completions", {c.METERED: "1", c.READ_BODY: True}),
        (None, "GET", "/api/tags", {}),
        (None, "GET", "/api/version", {}),
        (None, "POST", "/api/show", {c.READ_BODY: True}),
        (
            ("a", "b*"), "POST", "/api/chat",
            {c.METERED: "1", c.READ_BODY: True, c.CHECK_MODEL: True, c.MODELS: "a,b*"},
        ),
        (("a",), "POST", "/api/show", {c.READ_BODY: True, c.CHECK_MODEL: True, c.MODELS: "a"}),
        (("a", "b*"), "GET", "/v1/models", {}),
        (("a",), "GET", "/api/version", {}),
        (("a",), "GET", "/v1/models/a", {}),
    ],
)  # fmt: skip
def test_what_the_later_filters_are_told(
    models: tuple[str, ...] | None, method: str, path: str, told: dict[str, Any]
) -> None:
    metadata = dict(allowed(a_key(models=models), method, path).dynamic_metadata)
    who = {c.USER, c.USERNAME, c.KEY, c.ROLE, c.GATEWAY, c.DIALECT, c.ENDPOINT, c.KNOWN_AT}
    assert (c.WATCH in metadata) is (c.METERED in told), "what answers at once is not watched"
    who.add(c.WATCH)
    assert {name: value for name, value in metadata.items() if name not in who} == told
    assert set(metadata) <= c.AUTHZ_KEYS


@pytest.mark.parametrize(("path", "told"), [("/api/chat", True), ("/api/show", False)])
def test_text_is_asked_for_where_tokens_are_spent(path: str, told: bool) -> None:
    metadata = allowed(a_key(), "POST", path, count_text=True).dynamic_metadata
    assert (c.COUNT_TEXT in metadata) == told
    assert c.COUNT_TEXT not in allowed(a_key(), "POST", path).dynamic_metadata


def test_a_managing_call_is_not_metered_but_its_body_is_read() -> None:
    metadata = allowed(a_key(role=Role.ADMIN), "POST", "/api/pull").dynamic_metadata
    assert c.METERED not in metadata
    assert metadata[c.READ_BODY] is True
    assert c.WATCH in metadata


@pytest.mark.parametrize(
    ("status", "grpc_code"), [(401, 16), (403, 7), (404, 5), (405, 7), (503, 7), (500, 7)]
)
def test_a_refusal_is_never_ok_and_has_its_status(status: int, grpc_code: int) -> None:
    answer = pb.CheckResponse.FromString(wire.render_deny(Deny(status, "code", "Why."), "openai"))
    assert answer.status.code == grpc_code
    assert answer.denied_response.status.code == status
    headers = {at.header.key: at.header.value for at in answer.denied_response.headers}
    assert headers["content-type"] == "application/json"
    assert ("www-authenticate" in headers) is (status == 401)


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("ollama", {"error": "No, because."}),
        (
            "openai",
            {
                "error": {
                    "message": "No, because.",
                    "type": "permission_error",
                    "param": None,
                    "code": "permission_denied",
                }
            },
        ),
    ],
)
def test_a_refusal_speaks_the_callers_dialect(dialect: str, body: dict[str, Any]) -> None:
    deny = Deny(403, "permission_denied", "No,\nbecause.")
    answer = pb.CheckResponse.FromString(wire.render_deny(deny, dialect))
    assert json.loads(answer.denied_response.body) == body


def test_a_refused_caller_becomes_metadata_and_an_unknown_one_leaves_none() -> None:
    refused = identify(an_ask(), a_key(disabled=True), gateways=("openai",), now=NOW)
    assert isinstance(refused, Deny)
    answer = pb.CheckResponse.FromString(wire.render_deny(refused, "openai"))
    assert answer.dynamic_metadata[c.USER] == "user-1"
    assert c.METERED not in answer.dynamic_metadata

    unknown = pb.CheckResponse.FromString(wire.render_deny(Deny(401, "c", "m"), "openai"))
    assert not unknown.HasField("dynamic_metadata")


def test_the_second_answer_leaves_the_first_ones_metadata_alone() -> None:
    answer = pb.CheckResponse.FromString(wire.MODEL_ALLOWED)
    assert answer.WhichOneof("http_response") == "ok_response"
    assert not answer.HasField("dynamic_metadata")
