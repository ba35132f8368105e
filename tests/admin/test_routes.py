"""What holds for every endpoint."""

import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from parallama import identity, roles
from parallama.admin import openapi
from parallama.admin.app import api
from parallama.admin.visit import Known, Needs, Open
from tests.admin.house import House, fields

ROOT = Path(__file__).parents[2]
ROUTES = openapi.routes(api())
NEEDING = [route for route in ROUTES if isinstance(openapi.asked(route), Needs)]
OWN = [r for r in NEEDING if (n := openapi.asked(r)) and isinstance(n, Needs) and n.own]
NOBODYS = "00000000-0000-4000-8000-000000000000"

# What an endpoint must be given besides its path; all else it can do without.
BODIES: dict[str, Any] = {
    "create_user": {"username": "x"},
    "create_key": {},
    "create_role": {"name": "x", "permissions": []},
    "create_grant": {"user": "x", "unit": "tokens", "amount": 1, "expires_at": "2030-01-01T00:00Z"},
    "set_limits": {"scope": "x", "gateway": "*"},
    "set_price": {"model": "x", "prompt_per_million": "1", "completion_per_million": "1"},
    "set_mapping": {"gateway": "ollama", "external_model": "x", "internal_model": "y"},
    "set_password": {"password": None},
    "revoke_token": {"jti": "x"},
}
QUERIES = {"unset_limits": {"scope": "x"}, "unset_price": {"model": "x"}}


def name(route: APIRoute) -> str:
    return route.name


def method(route: APIRoute) -> str:
    (only,) = route.methods or ()
    return only


def asked(route: APIRoute, thing: str = NOBODYS) -> dict[str, Any]:
    path = route.path
    for place in ("{user}", "{key}", "{role}", "{id}"):
        path = path.replace(place, thing)
    more: dict[str, Any] = {"params": QUERIES.get(route.name, {})}
    if method(route) in ("PATCH", "PUT") or route.name in BODIES:
        more["json"] = BODIES.get(route.name, {})
    return {"method": method(route), "path": path, **more}


@pytest.mark.parametrize("route", ROUTES, ids=name)
def test_each_says_what_it_asks_of_its_caller(route: APIRoute) -> None:
    assert openapi.asked(route) is not None


def test_those_that_need_no_permission_are_these() -> None:
    found = {
        kind: {r.path for r in ROUTES if isinstance(openapi.asked(r), kind)}
        for kind in (Open, Known)
    }
    assert found[Open] == {
        *("/auth/login", "/auth/refresh", "/auth/.well-known/jwks.json"),
        "/admin/openapi.json",
    }
    assert found[Known] == {"/auth/me", "/auth/logout", "/auth/password"}


def test_each_is_described() -> None:
    assert [r.name for r in ROUTES if r.include_in_schema and not r.description] == []
    assert len({r.name for r in ROUTES}) == len(ROUTES)


def test_the_description_is_the_committed_one() -> None:
    """`python -m parallama.admin.openapi docs/openapi.json` writes it."""
    assert openapi.text(api()) == (ROOT / "docs" / "openapi.json").read_text("utf-8")


def test_nothing_is_open_to_nobody_or_to_who_may_nothing(on_one: Any) -> None:
    async def story(house: House) -> None:
        nobody = await house.someone("models:infer")
        for route in NEEDING:
            given = asked(route)
            refused = await house.ask(**given)
            assert refused.status_code == 401, route.name
            assert refused.headers["content-type"] == "application/problem+json"
            refused = await nobody.ask(**given)
            assert refused.status_code == 403, route.name
            assert refused.json()["code"] == "permission_denied"
        for path in ("/auth/me", "/me/quota"):
            assert (await house.ask("GET", path)).status_code == 401

    on_one(story)


def test_what_is_somebody_elses_is_not_there_for_who_has_only_their_own(on_one: Any) -> None:
    """Each endpoint with own scope, about things of another user."""

    async def story(house: House) -> None:
        other = await house.someone()
        assert other.key is not None
        admin = await house.admin()
        limits = await admin.post(
            "/admin/v1/limits",
            {"scope": other.user.id, "gateway": "*", "tokens_per_day": 1},
        )
        grant = await admin.post(
            "/admin/v1/grants",
            {
                **{"user": other.user.id, "unit": "tokens", "amount": 1},
                "expires_at": "2030-01-01T00:00:00Z",
            },
        )
        things = {
            "/admin/v1/users/{user}": other.user.id,
            "/admin/v1/keys/{key}": other.key.id,
            "/admin/v1/limits/{id}": limits.json()["id"],
            "/admin/v1/grants/{id}": grant.json()["id"],
        }
        for route in OWN:
            needed = openapi.asked(route)
            assert isinstance(needed, Needs)
            caller = await house.someone(f"{needed.permission}:own")
            thing = next((t for path, t in things.items() if route.path.startswith(path)), None)
            if thing is not None:
                refused = await caller.ask(**asked(route, thing))
                assert refused.status_code == 404, route.name
                assert NOBODYS not in refused.text
                unknown = await caller.ask(**asked(route))
                assert unknown.json() == {
                    **refused.json(),
                    "detail": refused.json()["detail"].replace(thing, NOBODYS),
                }
            elif method(route) == "GET":
                seen = await caller.get(route.path)
                assert seen.status_code == 200, route.name
                assert other.user.id not in seen.text, route.name
                assert other.key.id not in seen.text, route.name

    on_one(story)


def test_what_nobody_reads_is_refused(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        for route in ROUTES:
            given = asked(route)
            refused = await admin.ask(**{**given, "params": {**given["params"], "colour": "red"}})
            assert refused.status_code == 400, route.name
            assert fields(refused) >= {"colour"}
            if "json" in given:
                refused = await admin.ask(**{**given, "json": {**given["json"], "colour": "red"}})
                assert refused.status_code == 400, route.name
                assert fields(refused) >= {"colour"}

    on_one(story)


def test_the_headers_about_a_caller_are_removed_from_what_clients_send() -> None:
    text = (ROOT / "envoy" / "envoy.yaml").read_text()
    assert f"remove_on_match: {{key_matcher: {{prefix: {identity.PREFIX}" in text
    names = (identity.USER, identity.USERNAME, identity.PERMISSIONS, identity.CREDENTIAL)
    assert all(each.startswith(identity.PREFIX) for each in (*names, identity.ADDRESS))
    assert f"key: {identity.ADDRESS}," in (ROOT / "envoy" / "routes.yaml").read_text()


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "admin-api.md").read_text("utf-8")
    lines = re.findall(r"(?m)^\| ([A-Z]+) \| `(\S+)` \| `(\S+)` \| (.*) \|$", text)
    told = {(m, path): (permission, may.split(" | ")) for m, path, permission, may in lines}
    assert told == {(method(r), r.path): _needed(openapi.asked(r)) for r in NEEDING}
    others = {r.path for r in ROUTES} - {r.path for r in NEEDING}
    assert all(f" {path}`" in text for path in others)


def _needed(needs: Any) -> tuple[str, list[str]]:
    resource, action = needs.permission.split(":")

    def may(role: roles.Role) -> str:
        granted = roles.BUILT_IN[role]
        if roles.permits(granted, resource, action):
            return "yes"
        return "own" if needs.own and roles.permits(granted, resource, action, "own") else "no"

    return needs.permission, [may(role) for role in roles.Role]
