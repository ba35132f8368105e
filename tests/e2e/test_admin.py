"""The admin API through Envoy: who calls is what authz says, and nothing that a client sends."""

import json
from typing import Any

import httpx
import pytest

from parallama import identity
from parallama.roles import Role
from tests.e2e.gateway import CHAT, Gateway, Someone, until
from tests.standin import StandIn

USERS, KEYS = "/admin/v1/users", "/admin/v1/keys"


def send(who: Someone, method: str, path: str, body: Any = None) -> httpx.Response:
    return who.ask(method, path, json=body)


def test_an_admin_makes_a_user_whose_key_works_and_then_does_not(
    gateway: Gateway, upstream: StandIn
) -> None:
    admin = gateway.someone(role=Role.ADMIN)
    user = send(admin, "POST", USERS, {"username": "made-over-http"}).json()
    made = send(admin, "POST", KEYS, {"user": user["id"], "name": "first"})
    gateway.tokens.append(made.json()["key"])
    key = {"authorization": f"Bearer {made.json()['key']}"}
    assert gateway.http.post("/api/chat", json=CHAT, headers=key).status_code == 200
    send(admin, "POST", f"{KEYS}/{made.json()['id']}/revoke")
    until(
        lambda: gateway.http.post("/api/chat", json=CHAT, headers=key).status_code == 401,
        seconds=1,
    )
    query = f"action=keys.revoke&subject={made.json()['id']}"
    (entry,) = admin.get(f"/admin/v1/audit?{query}").json()["items"]
    assert (entry["actor_id"], entry["via"], entry["address"]) == (
        *(admin.user_id, "api"),
        "127.0.0.1",
    )


def test_a_log_in_gives_a_token_that_works_until_it_is_ended(gateway: Gateway) -> None:
    admin = gateway.someone(role=Role.ADMIN)
    user = send(admin, "POST", USERS, {"username": "with-password"}).json()
    password = "correct horse battery"
    send(admin, "PUT", f"{USERS}/{user['id']}/password", {"password": password})
    given = {"username": "with-password", "password": password}
    told = gateway.http.post("/auth/login", json=given).json()
    token = {"authorization": f"Bearer {told['access_token']}"}
    me = gateway.http.get("/auth/me", headers=token).json()
    assert (me["user"]["id"], me["credential"].partition(":")[0]) == (user["id"], "token")
    assert gateway.http.post("/api/chat", json=CHAT, headers=token).status_code == 200
    again = gateway.http.post("/auth/refresh", json={"refresh_token": told["refresh_token"]})
    assert again.status_code == 200
    assert gateway.http.post("/auth/logout", headers=token).status_code == 204
    until(lambda: gateway.http.get("/auth/me", headers=token).status_code == 401, seconds=1)


@pytest.mark.parametrize("name", [identity.USER, identity.PERMISSIONS, "X-Parallama-User"])
def test_nobody_says_who_they_are_themselves(gateway: Gateway, name: str) -> None:
    admin, user = gateway.someone(role=Role.ADMIN), gateway.someone()
    claims = {
        identity.USER: admin.user_id,
        identity.PERMISSIONS: "users:read users:create",
        identity.CREDENTIAL: f"key:{admin.key_id}",
        identity.ADDRESS: "10.9.9.9",
        name: admin.user_id,
    }
    me = user.get("/auth/me", headers=claims).json()
    assert me["user"]["id"] == user.user_id
    assert me["credential"] == f"key:{user.key_id}"
    assert "users:create" not in me["permissions"]
    assert gateway.http.get(USERS, headers=claims).status_code == 401
    assert gateway.http.get("/admin/openapi.json", headers=claims).status_code == 200


def test_a_key_may_not_do_what_its_scopes_leave_out(gateway: Gateway) -> None:
    admin = gateway.someone(role=Role.ADMIN, scopes=["users:read"])
    assert admin.get(USERS).status_code == 200
    assert admin.get(KEYS).status_code == 403
    elsewhere = gateway.someone(role=Role.ADMIN, gateways=["ollama"])
    assert elsewhere.get(USERS).status_code == 403


def test_calls_to_the_admin_api_are_no_usage(gateway: Gateway) -> None:
    user = gateway.someone(requests=1)
    for _ in range(3):
        assert user.get("/me/quota").status_code == 200
    assert user.get("/admin/v1/audit").status_code == 403
    chat = user.post("/api/chat", CHAT)
    gateway.row(chat)
    assert len(gateway.rows_of(user.user_id)) == 1
    (left,) = user.get("/me/quota").json()["limits"]
    assert (left["used"], left["left"]) == (1, 0)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/admin/v1/nothing", 404, "not_found"),
        ("GET", "/auth/nothing", 404, "not_found"),
        ("PUT", USERS, 405, "method_not_allowed"),
        ("GET", "/admin%2fv1/users", 400, "bad_request"),
        ("GET", f"{USERS}?colour=red", 400, "invalid_request"),
    ],
)
def test_every_refusal_is_a_problem(
    gateway: Gateway, method: str, path: str, status: int, code: str
) -> None:
    admin = gateway.someone(role=Role.ADMIN)
    got, headers, body = gateway.raw(method, path, headers=admin.headers)
    assert (got, headers["content-type"]) == (status, "application/problem+json")
    assert json.loads(body)["code"] == code
    assert headers["x-request-id"]


def test_a_body_has_its_bounds(gateway: Gateway) -> None:
    admin = gateway.someone(role=Role.ADMIN)
    refused = admin.ask(
        "POST", USERS, content=b" " * 300_000, headers={"content-type": "application/json"}
    )
    assert (refused.status_code, refused.json()["code"]) == (413, "request_too_large")
