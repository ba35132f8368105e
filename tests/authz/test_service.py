"""The service over a real socket: it always answers, and never yes to rubbish."""

import asyncio
import json
import logging
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from envoy.service.auth.v3 import external_auth_pb2 as pb
from envoy.service.auth.v3.external_auth_pb2_grpc import AuthorizationStub
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from authz.keyring import Keyring
from authz.mapped import Mapped
from authz.service import CHECK, Authz
from parallama import contract as c
from parallama import rpc
from parallama.changes import Change
from parallama.db.accounts import KeyRecord
from parallama.errors import Unavailable
from parallama.roles import Role
from tests.authz.make import (
    MINTED,
    NOW,
    TOKEN,
    WRONG,
    a_check,
    a_key,
    a_model_check,
    no_mappings,
    no_signatures,
    no_tokens,
)
from tests.examples import examples

T = TypeVar("T")
Ask = Callable[[pb.CheckRequest], Awaitable[pb.CheckResponse]]


class Known:
    """A database that holds one key, or is away, or is broken."""

    def __init__(self, record: KeyRecord | None = None, error: Exception | None = None) -> None:
        self._record = record
        self._error = error

    async def __call__(self, public_id: str) -> KeyRecord | None:
        if self._error is not None:
            raise self._error
        record = self._record
        return record if record is not None and record.public_id == public_id else None


def served(known: Known, story: Callable[[Ask], Awaitable[T]]) -> T:
    async def told() -> T:
        with tempfile.TemporaryDirectory() as folder:
            address = f"unix:{Path(folder) / 'a.sock'}"
            keyring = Keyring(known, no_tokens(), size=100)
            service = Authz(
                keyring,
                no_signatures(),
                no_mappings(),
                gateways=("ollama", "openai"),
                clock=lambda: NOW,
            )
            server = rpc.Server({CHECK: service.check})
            await server.start(address.removeprefix("unix:"))
            try:
                async with grpc.aio.insecure_channel(address) as channel:
                    stub = AuthorizationStub(channel)

                    async def ask(check: pb.CheckRequest) -> pb.CheckResponse:
                        answer = await stub.Check(check, timeout=10)
                        assert isinstance(answer, pb.CheckResponse)
                        return answer

                    return await story(ask)
            finally:
                await server.stop(0)

    return asyncio.run(told())


def answer(check: pb.CheckRequest, known: Known | None = None) -> pb.CheckResponse:
    async def story(ask: Ask) -> pb.CheckResponse:
        return await ask(check)

    return served(known or Known(a_key()), story)


def is_yes(response: pb.CheckResponse) -> bool:
    """As Envoy reads it: status OK. The `ok_response` may even be left out."""
    return bool(response.status.code == 0)


def status(response: pb.CheckResponse) -> int:
    return 200 if is_yes(response) else int(response.denied_response.status.code)


def test_a_good_key_is_let_in_also_from_memory() -> None:
    async def story(ask: Ask) -> list[pb.CheckResponse]:
        return [await ask(a_check()) for _ in range(3)]

    first, second, third = served(Known(a_key()), story)
    assert is_yes(first)
    assert first.dynamic_metadata[c.USER] == "user-1"
    assert first == second == third


class Remembering:
    """A service that is asked without a socket, whose clock, key and mappings may change."""

    def __init__(self, key: KeyRecord) -> None:
        self.known = Known(key)
        self.now = NOW
        self.table = {"gpt-4": "smollm2"}
        self.mapped = Mapped(self._mappings)
        self.keyring = Keyring(self.known, no_tokens(), size=100)
        self._service = Authz(
            self.keyring,
            no_signatures(),
            self.mapped,
            gateways=("openai",),
            clock=lambda: self.now,
        )

    async def ask(self, **fields: Any) -> pb.CheckResponse:
        told = self._service.check(a_check(**fields).SerializeToString())
        return pb.CheckResponse.FromString(told if isinstance(told, bytes) else await told)

    async def _mappings(self) -> dict[str, dict[str, str]]:
        return {"openai": dict(self.table)}


def test_what_was_answered_once_is_not_said_for_longer_than_it_is_true() -> None:
    async def story() -> None:
        at = Remembering(a_key(expires_at=NOW + 60))
        for _ in range(3):
            first = await at.ask()
            assert is_yes(first)
            assert "smollm2" in first.dynamic_metadata[c.ALIASES]
        assert (await at.ask(path="/v1/completions")).dynamic_metadata[c.ENDPOINT] != (
            first.dynamic_metadata[c.ENDPOINT]
        )
        assert status(await at.ask(method="GET")) == 405
        at.table = {"gpt-4": "another"}
        at.mapped.on_change(Change("mappings"))
        assert "another" in (await at.ask()).dynamic_metadata[c.ALIASES]
        at.known._record = a_key(role=Role.READONLY)
        assert is_yes(await at.ask())
        at.keyring.on_change(Change("user", "user-1"))
        assert status(await at.ask()) == 403
        at.known._record = a_key(expires_at=NOW + 60)
        at.keyring.forget_all()
        assert [is_yes(await at.ask()) for _ in range(2)] == [True, True]
        at.now = NOW + 60
        assert status(await at.ask()) == 401

    asyncio.run(story())


def test_an_answer_to_one_address_is_none_to_another() -> None:
    async def story() -> None:
        at = Remembering(a_key(networks=("10.0.0.0/8",)))
        for address, expected in [("10.1.2.3", 200), ("10.1.2.3", 200), ("192.0.2.1", 403)]:
            assert status(await at.ask(address=address)) == expected

    asyncio.run(story())


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        pytest.param(a_check(headers={}), 401, id="no key"),
        pytest.param(a_check(headers={"x-api-key": WRONG}), 401, id="wrong secret"),
        pytest.param(a_check(headers={"authorization": "Bearer x"}), 401, id="malformed key"),
        pytest.param(
            a_check(headers={"authorization": f"Bearer {TOKEN},Bearer {TOKEN}"}), 401, id="joined"
        ),
        pytest.param(
            a_check(headers={"authorization": "Bearer " + "ü" * (1 << 20)}), 401, id="2 MB of key"
        ),
        pytest.param(a_check(path="/" + "a" * (1 << 20)), 404, id="1 MB of path"),
        pytest.param(a_check(path="/v1/чат/完了"), 404, id="a path in Unicode"),
        pytest.param(a_check(path=f"/v1/chat/completions?key={TOKEN}"), 401, id="key in the query"),
        pytest.param(a_check(route={}), 404, id="no context extensions"),
        pytest.param(
            a_check(route={c.ROUTE_GATEWAY: "other", c.ROUTE_DIALECT: "openai"}), 404, id="gateway"
        ),
        pytest.param(
            a_check(headers={"x-api-key": WRONG}, route={c.ROUTE_GATEWAY: "other"}),
            401,
            id="whether a gateway is served is told to nobody without a key",
        ),
        pytest.param(a_check(method=""), 405, id="no method"),
        pytest.param(pb.CheckRequest(), 401, id="an empty question"),
    ],
)
def test_anything_else_is_refused_in_json(check: pb.CheckRequest, expected: int) -> None:
    refused = answer(check)
    assert status(refused) == expected
    assert json.loads(refused.denied_response.body)["error"]
    assert TOKEN not in str(refused)


@pytest.mark.parametrize(
    ("authz", "lua", "expected"),
    [
        pytest.param(None, {c.MODEL: "llama3"}, 200, id="allowed"),
        pytest.param(None, {c.MODEL: "gemma:2b"}, 200, id="allowed by a prefix"),
        pytest.param(None, {c.MODEL: "gpt"}, 404, id="hidden"),
        pytest.param(None, {c.MODEL: "llama3,gemma"}, 404, id="a list is a name"),
        pytest.param(None, {}, 400, id="no model"),
        pytest.param(None, None, 400, id="no facts"),
    ],
)
def test_the_second_question_is_answered(
    authz: dict[str, Any] | None, lua: dict[str, Any] | None, expected: int
) -> None:
    assert status(answer(a_model_check(authz, lua))) == expected


ODD: list[Any] = [None, True, 7, "", ["llama3"], {"a": "llama3"}]


def test_facts_of_the_wrong_kind_allow_nothing() -> None:
    async def story(ask: Ask) -> list[tuple[Any, Any]]:
        let_in = []
        for models in ("llama3", *ODD, "left out"):
            for model in (*ODD, "left out"):
                authz = {c.DIALECT: "openai"} | ({} if models == "left out" else {c.MODELS: models})
                lua = {} if model == "left out" else {c.MODEL: model}
                if is_yes(await ask(a_model_check(authz, lua))):
                    let_in.append((models, model))
        return let_in

    assert served(Known(a_key()), story) == []


@pytest.mark.parametrize(
    ("error", "code", "event"),
    [
        (Unavailable("the database is away"), "service_unavailable", "keys not checked"),
        (ValueError("nobody planned this"), "internal_error", "check failed"),
    ],
)
@pytest.mark.parametrize("dialect", ["ollama", "openai"])
def test_a_store_in_trouble_is_a_refusal_in_the_callers_dialect(
    error: Exception, code: str, event: str, dialect: str, caplog: pytest.LogCaptureFixture
) -> None:
    route = {c.ROUTE_GATEWAY: dialect, c.ROUTE_DIALECT: dialect}
    refused = answer(a_check(route=route), Known(error=error))
    assert status(refused) == (503 if isinstance(error, Unavailable) else 500)
    said = json.loads(refused.denied_response.body)["error"]
    assert isinstance(said, str) if dialect == "ollama" else said["code"] == code
    assert str(error) not in str(refused)
    assert event in caplog.messages
    assert TOKEN not in caplog.text


def test_who_is_known_already_is_let_in_while_the_store_is_away() -> None:
    known = Known(a_key())

    async def story(ask: Ask) -> bool:
        assert is_yes(await ask(a_check()))
        known._error = Unavailable("the database is away")
        return is_yes(await ask(a_check()))

    assert served(known, story)


def test_refusals_are_logged_without_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for headers in ({"x-api-key": WRONG}, {"x-api-key": TOKEN, "api-key": WRONG}):
        answer(a_check(headers=headers))
    answer(a_check(method="POST", path="/api/pull"))
    facts = [
        (at.status, at.code, at.user)  # type: ignore[attr-defined]
        for at in caplog.records
        if at.message == "request refused"
    ]
    assert facts == [
        (401, "invalid_api_key", None),
        (401, "invalid_api_key", None),
        (403, "permission_denied", "anna"),
    ]
    for secret in (TOKEN[17:], WRONG[17:]):
        assert secret not in caplog.text


# Rubbish.

words = st.one_of(
    st.text(max_size=40),
    st.sampled_from([TOKEN, WRONG, f"Bearer {TOKEN}", "POST", "/api/chat", "ollama", "llama3"]),
)
texts = st.dictionaries(
    st.one_of(
        words,
        st.sampled_from(
            [
                "authorization",
                "x-api-key",
                "api-key",
                c.ROUTE_GATEWAY,
                c.ROUTE_DIALECT,
                c.ROUTE_BASE,
            ]
        ),
    ),
    words,
    max_size=5,
)
values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
facts = st.dictionaries(
    st.one_of(words, st.sampled_from([c.MODEL, c.MODELS, c.DIALECT, c.USER])), values, max_size=4
)


@st.composite
def questions(draw: st.DrawFn) -> pb.CheckRequest:
    """A question in which nothing need be as Envoy would say it."""
    check = pb.CheckRequest()
    at = check.attributes
    http = at.request.http
    http.method, http.path = draw(words), draw(words)
    http.headers.update(draw(texts))
    at.context_extensions.update(draw(texts))
    at.source.address.socket_address.address = draw(words)
    for namespace in (c.AUTHZ, c.LUA):
        if draw(st.booleans()):
            at.metadata_context.filter_metadata[namespace].update(draw(facts))
    return check


def _may_be_yes(check: pb.CheckRequest) -> bool:
    """Said again in other words: a good key at an endpoint, or a model that the metadata names."""
    at = check.attributes
    metadata = at.metadata_context.filter_metadata
    if c.AUTHZ in metadata:
        models = metadata[c.AUTHZ].fields[c.MODELS].string_value
        return bool(models and metadata[c.LUA].fields[c.MODEL].string_value)
    return any(TOKEN in value for value in at.request.http.headers.values())


@given(st.lists(questions(), min_size=1, max_size=20))
@example([a_check(), a_model_check(lua={c.MODEL: "llama3"})])
@examples(60, suppress_health_check=list(HealthCheck))
def test_no_rubbish_is_allowed_and_none_goes_unanswered(checks: list[pb.CheckRequest]) -> None:
    async def story(ask: Ask) -> list[bool]:
        return [is_yes(await ask(check)) for check in checks]

    known = Known(a_key(public_id=MINTED.public_id, role=Role.ADMIN))
    for check, yes in zip(checks, served(known, story), strict=True):
        assert not yes or _may_be_yes(check)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
@example(0, b"\xff\xff")
@examples(200)
def test_bytes_that_are_no_message_are_an_error_and_not_an_allow(at: int, flip: bytes) -> None:
    """Envoy takes an error for a refusal: `failure_mode_allow: false`."""
    whole = a_check(headers={}).SerializeToString()
    service = Authz(
        Keyring(Known(a_key()), no_tokens(), size=1),
        no_signatures(),
        no_mappings(),
        gateways=("ollama", "openai"),
        clock=lambda: NOW,
    )

    async def story() -> bytes:
        said = service.check(whole[:at] + flip + whole[at + len(flip) :])
        return said if isinstance(said, bytes) else await said

    yes = False
    with suppress(rpc.RpcError):
        yes = is_yes(pb.CheckResponse.FromString(asyncio.run(story())))
    assert not yes
