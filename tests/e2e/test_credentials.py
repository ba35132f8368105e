"""Who may come in, by which key, from where, to do what; and where keys never turn up."""

import os
from pathlib import Path

import httpx
import pytest

from parallama import keys
from parallama.roles import Role
from tests.e2e.gateway import CHAT, GENERATE, Gateway, Json
from tests.standin import StandIn

UNKNOWN = keys.mint(os.urandom, rounds=4).token
PATHS = ["/v1/chat/completions", "/api/chat"]


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def check_refusal(answer: httpx.Response, status: int) -> str:
    """The sentence of a refusal in the dialect of its path."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    if answer.request.url.path.startswith("/api/"):
        assert isinstance(error, str)
        return error
    assert error.keys() == {"message", "type", "param", "code"}
    return str(error["message"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="none"),
        pytest.param({"authorization": ""}, id="empty"),
        pytest.param({"authorization": "Bearer"}, id="a scheme alone"),
        pytest.param(bearer("plm_short"), id="malformed"),
        pytest.param(bearer(UNKNOWN[:-1] + "0"), id="a wrong checksum"),
        pytest.param(bearer(UNKNOWN), id="unknown"),
        pytest.param(bearer("sk-" + "x" * 48), id="another service's"),
        pytest.param(bearer("x" * 8000), id="very long"),
        pytest.param({"authorization": f"Basic {UNKNOWN}"}, id="Basic"),
        pytest.param({"authorization": UNKNOWN}, id="no scheme"),
        pytest.param({"x-api-key": UNKNOWN}, id="unknown in x-api-key"),
        pytest.param({"api-key": ""}, id="empty api-key"),
        pytest.param(bearer("' OR 1=1 --"), id="SQL"),
    ],
)
def test_without_a_good_key_nothing_reaches_the_upstream(
    gateway: Gateway, upstream: StandIn, path: str, headers: dict[str, str]
) -> None:
    answer = gateway.http.post(path, json=CHAT, headers=headers)
    message = check_refusal(answer, 401)
    assert "key" in message
    assert answer.headers["www-authenticate"].startswith("Bearer")
    if path.startswith("/v1"):
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    for value in headers.values():
        assert len(value) < 20 or value.split()[-1] not in answer.text
    assert not upstream.requests


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key"])
def test_a_key_is_good_in_each_of_three_headers(gateway: Gateway, path: str, header: str) -> None:
    someone = gateway.someone()
    value = someone.headers["authorization"] if header == "authorization" else someone.token
    answer = gateway.http.post(path, json=CHAT, headers={header: value})
    assert answer.status_code == 200
    both = {"authorization": someone.headers["authorization"], header: value}
    assert gateway.http.post(path, json=CHAT, headers=both).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_two_keys_that_disagree_are_refused(gateway: Gateway, upstream: StandIn, path: str) -> None:
    anna, ben = gateway.someone(), gateway.someone()
    for headers in (
        [("authorization", f"Bearer {anna.token}"), ("x-api-key", ben.token)],
        [("x-api-key", anna.token), ("api-key", ben.token)],
        [("authorization", f"Bearer {anna.token}"), ("authorization", f"Bearer {ben.token}")],
        [("x-api-key", anna.token), ("x-api-key", ben.token)],
        [("authorization", f"Basic {anna.token}"), ("x-api-key", anna.token)],
    ):
        check_refusal(gateway.http.post(path, json=CHAT, headers=headers), 401)
    assert not upstream.requests


@pytest.mark.parametrize("path", PATHS)
def test_a_key_in_the_address_is_refused_even_beside_a_good_one(
    gateway: Gateway, upstream: StandIn, path: str
) -> None:
    someone = gateway.someone()
    for target in (f"{path}?key={someone.token}", f"{path}?api_key={UNKNOWN}"):
        message = check_refusal(someone.post(target, CHAT), 401)
        assert "address" in message
        assert someone.token not in message
    assert not upstream.requests


@pytest.mark.parametrize("path", PATHS)
def test_an_expired_key_is_told_so(gateway: Gateway, upstream: StandIn, path: str) -> None:
    someone = gateway.someone(expired=True)
    assert "expired" in check_refusal(someone.post(path, CHAT), 401)
    assert not upstream.requests


@pytest.mark.parametrize("path", PATHS)
def test_a_key_works_only_from_its_networks(gateway: Gateway, upstream: StandIn, path: str) -> None:
    outside = gateway.someone(networks=["10.0.0.0/8"])
    lies = {"x-forwarded-for": "10.1.2.3", "x-real-ip": "10.1.2.3", "forwarded": "for=10.1.2.3"}
    for headers in ({}, lies, {"x-envoy-external-address": "10.1.2.3"}):
        assert "network" in check_refusal(outside.post(path, CHAT, headers=headers), 403)
    assert not upstream.requests
    inside = gateway.someone(networks=["10.0.0.0/8", "127.0.0.1/32"])
    assert inside.post(path, CHAT).status_code == 200


MODEL = {"model": "smollm2"}
CALLS: list[tuple[str, str, Json | None, set[Role]]] = [
    ("GET", "/api/tags", None, set(Role)),
    ("GET", "/v1/models", None, set(Role)),
    ("POST", "/api/show", MODEL, set(Role)),
    ("POST", "/api/chat", CHAT, {Role.ADMIN, Role.OPERATOR, Role.USER}),
    ("POST", "/v1/chat/completions", CHAT, {Role.ADMIN, Role.OPERATOR, Role.USER}),
    ("POST", "/api/generate", GENERATE, {Role.ADMIN, Role.OPERATOR, Role.USER}),
    ("POST", "/api/pull", {"model": "new"}, {Role.ADMIN, Role.OPERATOR}),
    ("POST", "/api/copy", {"source": "smollm2", "destination": "c"}, {Role.ADMIN, Role.OPERATOR}),
    ("DELETE", "/api/delete", MODEL, {Role.ADMIN, Role.OPERATOR}),
]


@pytest.mark.parametrize("role", Role)
def test_a_role_opens_its_endpoints_and_no_others(gateway: Gateway, role: Role) -> None:
    someone = gateway.someone(role=role)
    for method, path, body, roles in CALLS:
        gateway.upstream.reset()
        answer = someone.ask(method, path, json=body)
        if role in roles:
            assert answer.status_code == 200, (path, answer.text)
            assert gateway.upstream.requests or "x-parallama-cache" in answer.headers
        else:
            assert role in check_refusal(answer, 403)
            assert not gateway.upstream.requests


def test_what_a_client_claims_to_be_is_overwritten_or_means_nothing(gateway: Gateway) -> None:
    someone = gateway.someone()
    claims = {
        "x-request-id": "00000000-0000-4000-8000-000000000001",
        "x-user": "admin",
        "x-ai-user": "admin",
        "x-envoy-original-path": "/api/tags",
        "x-envoy-decorator-operation": "x",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-max-retries": "10",
        "x-envoy-force-trace": "true",
    }
    answers = [someone.post("/api/chat", CHAT, headers=claims) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2
    assert claims["x-request-id"] not in ids
    for answer in answers:
        assert answer.status_code == 200
        row = gateway.row(answer)
        assert (row["user_id"], row["username"]) == (someone.user_id, someone.name)
        names = {name.lower() for name, _ in gateway.seen(answer).headers}
        assert not {name for name in claims if name.startswith("x-envoy")} & names
    assert not gateway.rows(claims["x-request-id"])


def test_a_key_turns_up_nowhere(gateway: Gateway) -> None:
    """Not upstream, in no log, file, command line or configuration; nor does its secret part."""
    someone = gateway.someone(role=Role.OPERATOR)
    token = someone.token
    places: list[dict[str, str]] = [
        {"authorization": f"Bearer {token}"},
        {"authorization": f"bearer {token}"},
        {"x-api-key": token},
        {"api-key": token},
        {"authorization": f"Bearer {token}", "x-api-key": token, "api-key": token},
        {"authorization": f"Bearer {token}", "proxy-authorization": f"Basic {token}"},
        {"authorization": f"Bearer {token}", "cookie": f"key={token}"},
        {"authorization": token},
        {"authorization": f"Basic {token}"},
        {"x-api-key": token, "authorization": f"Bearer {UNKNOWN}"},
        {"authorization": f"Bearer {token}x"},
    ]
    last = None
    for headers in places:
        for path in ("/api/chat", "/v1/chat/completions", f"/v1/models/{token}", f"/{token}"):
            answer = gateway.http.post(path, json=CHAT, headers=headers)
            assert token not in answer.text + str(answer.headers)
            last = answer if answer.status_code == 200 else last
        gateway.http.get(f"/v1/models?key={token}", headers=headers)
    assert last is not None
    gateway.row(last)

    parsed = keys.parse(token)
    assert parsed is not None
    for needle in (token, parsed.secret):
        assert needle not in str([seen.as_dict() for seen in gateway.upstream.requests])
        assert needle not in gateway.log()
        assert needle not in gateway.admin("/config_dump") + gateway.admin("/clusters")
        for pid in gateway.processes():
            assert needle.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert needle.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        for file in gateway.folder.rglob("*"):
            if file.is_file():
                assert needle.encode() not in file.read_bytes(), file


def test_the_counters_password_is_in_its_file_alone(gateway: Gateway) -> None:
    password = (gateway.folder / "secrets" / "redis_password").read_text().strip()
    for pid in gateway.processes():
        assert password.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert password not in gateway.log() + gateway.admin("/config_dump")
    private = [gateway.folder / "secrets" / "redis_password", *gateway.folder.glob("parallama.db*")]
    private += [gateway.config.state_dir, gateway.config.run_dir]
    for path in private:
        assert path.stat().st_mode & 0o077 == 0, path


def test_no_service_listens_on_the_network(gateway: Gateway) -> None:
    """All but the gateway's own port are unix sockets that only their owner may open."""
    mine = {str(pid) for pid in gateway.processes()}
    listening = set()
    for pid in mine:
        inodes = {
            os.readlink(link).removeprefix("socket:[").removesuffix("]")
            for link in Path(f"/proc/{pid}/fd").iterdir()
            if os.path.lexists(link) and os.readlink(link).startswith("socket:[")
        }
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == "0A" and rest[5] in inodes:
                    listening.add(int(local.rpartition(":")[2], 16))
    assert listening == {gateway.address[1]}


def test_a_first_key_from_the_command_line_works(gateway: Gateway, upstream: StandIn) -> None:
    user = gateway.cli("users", "create", "first-user", "--role", "user")
    made = gateway.cli(
        "keys", "create", "first-user", "--name", "laptop", "--expires", "30d",
        "--models", "smollm2,sec*", "--networks", "127.0.0.0/8,::1/128",
    )  # fmt: skip
    gateway.tokens.append(made["key"])
    answer = gateway.http.post("/api/chat", json=CHAT, headers=bearer(made["key"]))
    assert answer.status_code == 200
    gateway.row(answer)
    (row,) = gateway.cli("usage", "list", "--user", "first-user")
    assert row["request_id"] == answer.headers["x-request-id"]
    assert (row["user"], row["key_id"]) == (user["username"], made["id"])
    expected = {
        "request_id", "user", "key_id", "gateway", "endpoint", "model_name", "prompt_tokens",
        "completion_tokens", "tokens_used", "token_source", "status_code", "aborted",
        "request_duration", "time_to_first_token",
    }  # fmt: skip
    assert expected <= row.keys()
    assert row["completion_tokens"] == upstream.last().emitted
