"""May this request go on? Every rule, and which of them speaks first."""

from typing import Any

import pytest

from authz.decide import (
    Allow,
    Asked,
    Caller,
    Deny,
    ModelAsked,
    credential,
    identify,
    judge_model,
)
from parallama import identity
from parallama.db.accounts import Credential
from parallama.endpoints import DISCOVERY
from parallama.identity import Viewer
from parallama.roles import Role, permissions
from tests.authz.make import NOW, TOKEN, WRONG, a_key, an_ask

BOTH = ("ollama", "openai")


def judged(asked: Asked, key: Credential, now: float = NOW) -> Allow | Deny:
    return identify(asked, key, gateways=BOTH, now=now)


# Which key was sent?


def test_one_key_is_the_credential() -> None:
    assert credential(an_ask()) == TOKEN


def test_the_same_key_in_two_headers_is_one_key() -> None:
    assert credential(an_ask(credentials=(TOKEN, TOKEN))) == TOKEN


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        pytest.param(an_ask(credentials=()), "Missing API key", id="none"),
        pytest.param(an_ask(credentials=(TOKEN, WRONG)), "Two different", id="two that disagree"),
        pytest.param(an_ask(credentials=("", TOKEN)), "Two different", id="a good and an odd one"),
        pytest.param(an_ask(query=f"key={TOKEN}"), "does not belong in the address", id="query"),
        pytest.param(an_ask(path=f"/v1/{TOKEN}"), "does not belong in the address", id="path"),
    ],
)
def test_no_clear_credential_is_no_entry(asked: Asked, says: str) -> None:
    refused = credential(asked)
    assert isinstance(refused, Deny)
    assert (refused.status, refused.code) == (401, "invalid_api_key")
    assert says in refused.message
    assert refused.caller is None


# Who is it, and may they?


@pytest.mark.parametrize(
    ("key", "status", "code", "says"),
    [
        pytest.param(a_key(revoked=True), 401, "invalid_api_key", "revoked", id="revoked"),
        pytest.param(a_key(expires_at=NOW - 1), 401, "invalid_api_key", "expired", id="expired"),
        pytest.param(
            a_key(disabled=True), 403, "permission_denied", "disabled", id="user disabled"
        ),
        pytest.param(
            a_key(networks=("10.2.0.0/16",)), 403, "permission_denied", "network", id="elsewhere"
        ),
        pytest.param(
            a_key(role=Role.READONLY), 403, "permission_denied", "role readonly", id="role"
        ),
    ],
)
def test_a_key_that_is_not_good_for_this_is_refused(
    key: Credential, status: int, code: str, says: str
) -> None:
    refused = judged(an_ask(), key)
    assert isinstance(refused, Deny)
    assert (refused.status, refused.code) == (status, code)
    assert says in refused.message


def test_what_is_allowed_says_who_it_is() -> None:
    allowed = judged(an_ask(), a_key())
    assert isinstance(allowed, Allow)
    assert allowed.caller == Caller(
        user="user-1",
        username="anna",
        key="key-1",
        role="user",
        gateway="openai",
        dialect="openai",
        endpoint="/v1/chat/completions",
    )
    assert allowed.models is None


EVERY_FAULT = {
    "revoked": True,
    "expires_at": NOW - 1,
    "disabled": True,
    "networks": ("192.0.2.0/24",),
    "gateways": ("openai",),
    "role": Role.READONLY,
    "scopes": permissions(["models:infer", "models:read"]),
    "models": ("llama3",),
}


def test_the_rules_speak_in_one_order() -> None:
    """Each fault is mended in turn; the next one is what the caller hears then."""
    key = a_key(**EVERY_FAULT)
    asked = an_ask(method="POST", path="/api/pull", gateway="ollama", dialect="ollama")
    mended = [
        ("revoked", False, "revoked"),
        ("expires_at", None, "expired"),
        ("disabled", False, "disabled"),
        ("networks", None, "network address"),
        ("gateways", ("ollama",), "for this gateway"),
        ("role", Role.OPERATOR, "role readonly"),
        ("scopes", permissions(["models:*"]), "not for this (models:manage)"),
        ("models", None, "restricted to some models"),
    ]
    faults = dict(EVERY_FAULT)
    for field, right, says in mended:
        refused = judged(asked, key)
        assert isinstance(refused, Deny)
        assert says in refused.message
        faults[field] = right
        key = a_key(**faults)
    assert isinstance(judged(asked, key), Allow)


@pytest.mark.parametrize(
    "key",
    [a_key(revoked=True), a_key(expires_at=NOW)],
    ids=["revoked", "expired"],
)
def test_a_dead_key_names_no_caller(key: Credential) -> None:
    """Whoever found an old key must not fill its owner's usage."""
    refused = judged(an_ask(), key)
    assert isinstance(refused, Deny)
    assert refused.caller is None


@pytest.mark.parametrize(
    "key",
    [a_key(disabled=True), a_key(role=Role.READONLY), a_key(networks=("192.0.2.1",))],
    ids=["disabled", "role", "network"],
)
def test_a_refusal_of_a_good_key_names_its_caller(key: Credential) -> None:
    refused = judged(an_ask(), key)
    assert isinstance(refused, Deny)
    assert refused.caller is not None
    assert refused.caller.user == "user-1"


@pytest.mark.parametrize(
    ("now", "good"),
    [(NOW - 0.001, True), (NOW, False), (NOW + 0.001, False)],
    ids=["just before", "at that second", "after"],
)
def test_a_key_expires_at_its_second(now: float, good: bool) -> None:
    assert isinstance(judged(an_ask(), a_key(expires_at=NOW), now), Allow) is good


@pytest.mark.parametrize(
    ("address", "networks", "inside"),
    [
        ("10.1.2.3", ("10.1.0.0/16",), True),
        ("10.2.2.3", ("10.1.0.0/16",), False),
        ("10.2.2.3", ("10.1.0.0/16", "10.2.0.0/16"), True),
        ("10.1.2.3", ("10.1.2.3",), True),
        ("10.1.2.4", ("10.1.2.3/32",), False),
        ("2001:db8::7", ("2001:db8::/32",), True),
        ("2001:db9::7", ("2001:db8::/32",), False),
        ("::1", ("::1/128",), True),
        ("::ffff:10.1.2.3", ("10.1.0.0/16",), True),  # a dual-stack listener says it so
        ("::ffff:10.2.2.3", ("10.1.0.0/16",), False),
        ("10.1.2.3", ("2001:db8::/32",), False),
        ("2001:db8::7", ("10.0.0.0/8",), False),
        ("10.1.2.3", ("0.0.0.0/0",), True),
        ("2001:db8::7", ("0.0.0.0/0",), False),
        ("", ("0.0.0.0/0", "::/0"), False),  # a unix socket has no address
        ("10.1.2.3:4000", ("10.0.0.0/8",), False),
        ("not an address", ("0.0.0.0/0",), False),
        ("10.1.2.3", (), False),
    ],
)
def test_a_key_with_networks_comes_from_them(
    address: str, networks: tuple[str, ...], inside: bool
) -> None:
    decision = judged(an_ask(address=address), a_key(networks=networks))
    assert isinstance(decision, Allow) is inside


INFER = ("POST", "/v1/chat/completions")
READ = ("GET", "/v1/models")
MANAGE = ("POST", "/api/pull")


@pytest.mark.parametrize(
    ("role", "may"),
    [
        (Role.ADMIN, {INFER, READ, MANAGE}),
        (Role.OPERATOR, {INFER, READ, MANAGE}),
        (Role.USER, {INFER, READ}),
        (Role.READONLY, {READ}),
    ],
)
def test_roles_meet_endpoints(role: Role, may: set[tuple[str, str]]) -> None:
    for method, path in (INFER, READ, MANAGE):
        decision = judged(an_ask(method=method, path=path), a_key(role=role))
        assert isinstance(decision, Allow) is ((method, path) in may)
        assert isinstance(decision, Allow) or decision.status == 403


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/files", 404, "unknown_endpoint"),
        ("POST", "/v1/chat/completions/", 404, "unknown_endpoint"),
        ("POST", "/v1/Chat/completions", 404, "unknown_endpoint"),
        ("POST", "", 404, "unknown_endpoint"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/api/tags", 405, "method_not_allowed"),
        ("post", "/api/chat", 405, "method_not_allowed"),
    ],
)
def test_what_nobody_thought_about_is_refused(
    method: str, path: str, status: int, code: str
) -> None:
    refused = judged(an_ask(method=method, path=path), a_key(role=Role.ADMIN))
    assert isinstance(refused, Deny)
    assert (refused.status, refused.code) == (status, code)
    assert refused.caller is not None
    assert refused.caller.endpoint == "unknown"


def test_a_gateway_that_is_not_served_does_not_exist() -> None:
    refused = identify(an_ask(), a_key(role=Role.ADMIN), gateways=("ollama",), now=NOW)
    assert isinstance(refused, Deny)
    assert (refused.status, refused.code) == (404, "unknown_endpoint")


# Models.


@pytest.mark.parametrize(
    ("models", "model", "allowed"),
    [
        (("llama3",), "llama3", True),
        (("llama3",), "llama3:8b", False),
        (("llama3",), "llama3:latest", True),
        (("llama3:latest",), "llama3", True),
        (("llama3:8b",), "llama3", False),
        (("llama3",), "llama3:latest:latest", False),
        (("llama3",), "Llama3", False),
        (("llama3",), " llama3", False),
        (("llama3*",), "llama3:8b", True),
        (("llama3*",), "llama3", True),
        (("llama3*",), "llama", False),
        (("gemma", "llama3*"), "llama3:8b", True),
        (("*",), "anything", True),
        (("a*b",), "axb", False),
        (("a*b",), "a*b", True),
        ((), "llama3", False),
    ],
)
def test_a_restricted_key_uses_its_models_only(
    models: tuple[str, ...], model: str, allowed: bool
) -> None:
    refused = judge_model(ModelAsked("openai", models, model))
    assert (refused is None) is allowed


@pytest.mark.parametrize(
    ("dialect", "sentence"),
    [
        ("ollama", 'model "gpt" not found, try pulling it first'),
        ("openai", "The model 'gpt' does not exist or you do not have access to it."),
    ],
)
def test_a_hidden_model_looks_unknown(dialect: str, sentence: str) -> None:
    refused = judge_model(ModelAsked(dialect, ("llama3",), "gpt"))
    assert refused == Deny(404, "model_not_found", sentence, rule="model")


@pytest.mark.parametrize(
    ("models", "requested", "model", "allowed"),
    [
        (("llama3",), "gpt-4", "llama3", True),
        (("gpt-4",), "gpt-4", "llama3", True),
        (("GPT-4",), "gpt-4:latest", "llama3", True),
        (("gpt*",), "GPT-4", "llama3", True),
        (("gpt-4",), "gpt-3", "llama3", False),
        (("gpt-4",), None, "llama3", False),
        (("gemma*",), "gpt-4", "llama3", False),
        ((), "gpt-4", "llama3", False),
    ],
)
def test_a_key_may_say_a_mapped_name_if_it_may_use_that_or_what_it_means(
    models: tuple[str, ...], requested: str | None, model: str, allowed: bool
) -> None:
    refused = judge_model(ModelAsked("openai", models, model, requested=requested))
    assert (refused is None) is allowed
    if requested is not None and refused is not None:
        assert requested in refused.message
        assert model not in refused.message


def test_a_request_without_a_model_cannot_be_judged() -> None:
    refused = judge_model(ModelAsked("openai", ("*",), None))
    assert refused is not None
    assert (refused.status, refused.code) == (400, "model_required")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/llama3%2Fx"),
        ("HEAD", "/api/tags"),
        ("GET", "/api/ps"),
        ("GET", "/api/version"),
        ("POST", "/api/show"),
    ],
)
@pytest.mark.parametrize("models", [None, ("llama3", "b*", "größe,")])
def test_who_answers_lists_is_told_what_may_be_seen(
    method: str, path: str, models: tuple[str, ...] | None
) -> None:
    decision = judged(an_ask(method=method, path=path), a_key(models=models))
    assert isinstance(decision, Allow)
    told = identity.viewer(dict(decision.headers))
    assert told == Viewer(path, ("openai",), "openai", models or ("*",))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/pull", "/v1/messages/count_tokens"])
def test_a_model_server_hears_nothing_of_its_caller(path: str) -> None:
    decision = judged(an_ask(path=path), a_key(role=Role.ADMIN))
    assert isinstance(decision, Allow)
    assert decision.headers == ()


@pytest.mark.parametrize(
    ("key", "gateways"),
    [
        ({}, ("ollama", "openai")),
        ({"gateways": ("openai",)}, ("openai",)),
        ({"scopes": permissions(["models:read:ollama"])}, ("ollama",)),
        ({"scopes": permissions(["users:read"])}, ()),
        ({"role": Role.READONLY, "models": ("a",)}, ("ollama", "openai")),
    ],
)
def test_whoever_is_known_may_read_what_gateways_there_are(
    key: dict[str, Any], gateways: tuple[str, ...]
) -> None:
    asked = an_ask(method="GET", path="/gateway/discovery", gateway=DISCOVERY, dialect="problem")
    decision = identify(asked, a_key(**key), gateways={DISCOVERY}, now=NOW)
    assert isinstance(decision, Allow)
    told = identity.viewer(dict(decision.headers))
    assert told is not None
    assert (told.gateways, told.models) == (gateways, key.get("models") or ("*",))
    switched_off = identify(asked, a_key(**key), gateways={"openai"}, now=NOW)
    assert isinstance(switched_off, Deny)
    assert switched_off.status == 404
    disabled = identify(asked, a_key(**key, disabled=True), gateways={DISCOVERY}, now=NOW)
    assert isinstance(disabled, Deny)


@pytest.mark.parametrize("path", ["/api/pull", "/api/create", "/api/copy", "/api/push"])
def test_a_restricted_key_manages_nothing(path: str) -> None:
    """A copy of a model has a name of its own, that no list of names foresaw."""
    refused = judged(an_ask(path=path), a_key(role=Role.ADMIN, models=("llama3",)))
    assert isinstance(refused, Deny)
    assert refused.status == 403


def test_no_refusal_repeats_a_key() -> None:
    for asked in (an_ask(query=TOKEN), an_ask(path=TOKEN), an_ask(credentials=(TOKEN, WRONG))):
        refused = credential(asked)
        assert isinstance(refused, Deny)
        assert TOKEN not in refused.message
