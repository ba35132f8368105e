"""Roles over HTTP."""

from typing import Any

import pytest

from tests.admin.house import House, names

ROLES = "/admin/v1/roles"


def test_a_role_from_its_first_day_to_its_last(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        given = {"name": "auditor", "permissions": ["audit:read", "usage:*"], "description": "d"}
        made = await admin.post(ROLES, given)
        assert made.status_code == 201
        assert made.json() == {
            **{**given, "origin": "database"},
            **dict.fromkeys(("created_at", "updated_at"), "2026-03-01T12:00:00Z"),
        }
        where = made.headers["location"]
        user = await house.user(role="auditor")
        changed = await admin.ask("PATCH", where, json={"permissions": ["audit:read"]})
        assert (changed.json()["permissions"], changed.json()["description"]) == (
            ["audit:read"],
            "d",
        )
        used = await admin.ask("DELETE", where)
        assert (used.status_code, used.json()["code"]) == (409, "conflict")
        await admin.ask("PATCH", f"/admin/v1/users/{user.id}", json={"role": "user"})
        assert (await admin.ask("DELETE", where)).status_code == 204
        assert (await admin.get(where)).status_code == 404

    on_both(story)


def test_all_roles_come_by_name(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        await admin.post(ROLES, {"name": "b", "permissions": []})
        listed = await admin.every(ROLES, limit=2)
        assert names(listed, "name") == ["admin", "b", "operator", "readonly", "user"]
        assert names(listed, "origin").count("built in") == 4

    on_one(story)


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
def test_what_is_built_in_stays(method: str, on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        body = {"permissions": []} if method == "PATCH" else None
        refused = await admin.ask(method, f"{ROLES}/user", json=body)
        assert refused.status_code == 409

    on_one(story)


def test_no_role_permits_what_its_maker_may_not(on_one: Any) -> None:
    async def story(house: House) -> None:
        helper, admin = await house.someone("roles:*", "models:infer:ollama"), await house.admin()
        for wanted in ("*:*", "models:*", "models:infer", "users:read:own"):
            refused = await helper.post(ROLES, {"name": "x", "permissions": [wanted]})
            assert refused.status_code == 403
        made = await helper.post(
            ROLES, {"name": "x", "permissions": ["roles:read", "models:infer:ollama"]}
        )
        where = made.headers["location"]
        gains = await helper.ask("PATCH", where, json={"permissions": ["roles:read", "audit:read"]})
        assert gains.status_code == 403
        await admin.ask("PATCH", where, json={"permissions": ["roles:read", "audit:read"]})
        kept = await helper.ask("PATCH", where, json={"permissions": ["audit:read"]})
        assert kept.status_code == 200

    on_one(story)


def test_what_is_no_permission_is_refused(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        refused = await admin.post(ROLES, {"name": "x", "permissions": ["models:fly"]})
        assert refused.status_code == 422
        assert "models:fly" in refused.json()["detail"]

    on_one(story)
