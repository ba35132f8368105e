"""Users over HTTP."""

import asyncio
from typing import Any

import pytest

from parallama.admin import cursors
from parallama.db.manage import audit, people
from parallama.desk import Actor
from tests.admin.house import House, fields, names

USERS = "/admin/v1/users"


def test_a_user_from_the_first_day_to_the_last(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        made = await admin.post(USERS, {"username": "anna", "more_roles": ["readonly"]})
        assert made.status_code == 201
        id = made.json()["id"]
        assert made.headers["location"] == f"{USERS}/{id}"
        assert made.json() == {
            **{"id": id, "username": "anna", "role": "user", "more_roles": ["readonly"]},
            **{"has_password": False, "disabled_at": None},
            **dict.fromkeys(("created_at", "updated_at"), "2026-03-01T12:00:00Z"),
        }
        for who in (id, "anna"):
            found = await admin.get(f"{USERS}/{who}")
            assert (found.json(), found.headers["etag"]) == (made.json(), made.headers["etag"])
        changed = await admin.ask(
            "PATCH", f"{USERS}/anna", json={"username": "hanna", "more_roles": []}
        )
        assert (changed.json()["username"], changed.json()["more_roles"]) == ("hanna", [])
        disabled = await admin.post(f"{USERS}/{id}/disable")
        assert disabled.json()["disabled_at"] == "2026-03-01T12:00:00Z"
        enabled = await admin.post(f"{USERS}/{id}/enable")
        assert enabled.json()["disabled_at"] is None
        password = {"password": "correct horse battery"}
        await admin.ask("PUT", f"{USERS}/{id}/password", json=password)
        assert (await admin.get(f"{USERS}/{id}")).json()["has_password"] is True
        gone = await admin.ask("DELETE", f"{USERS}/{id}")
        assert (gone.status_code, gone.content) == (204, b"")
        assert (await admin.get(f"{USERS}/{id}")).status_code == 404

    on_both(story)


def test_who_did_it_is_on_record_and_the_services_are_told(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.user()
        async with house.hearing() as told:
            await admin.post(f"{USERS}/{user.id}/disable")
        assert told == [f"user {user.id}"]
        which = audit.Which(action="users.disable")
        (entry,) = [at async for at in audit.entries(house.office.engine, which)]
        by = Actor(entry.actor, entry.via, entry.actor_id, entry.address, entry.request_id)
        assert by == Actor(admin.user.username, "api", admin.user.id, "192.0.2.7", "r1")

    on_one(story)


def test_a_list_goes_on_where_it_ended_though_others_come(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        for n in range(5):
            await house.user(name=f"b{n}")
        first = (await admin.get(USERS, params={"limit": 2})).json()
        assert names(first["items"], "username") == ["b0", "b1"]
        await house.user(name="a")
        await house.user(name="b2+")
        rest = await admin.get(USERS, params={"limit": 200, "cursor": first["next_cursor"]})
        assert names(rest.json()["items"], "username") == ["b2", "b2+", "b3", "b4", "u1"]
        assert rest.json()["next_cursor"] is None
        assert len(await admin.every(USERS, limit=1)) == 8

    on_both(story)


@pytest.mark.parametrize("limit", ["0", "201", "x", "-1", "1.5"])
def test_a_page_has_a_size(limit: str, on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        refused = await admin.get(USERS, params={"limit": limit})
        assert (refused.status_code, fields(refused)) == (400, {"limit"})

    on_one(story)


def test_what_is_no_cursor_is_refused(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        others = [cursors._write((1,)), cursors._write(("a", "b")), cursors._write((None,))]
        half = "WyJcdWQ4MDAiXQ"  # half of a pair of surrogates
        deep = cursors.base64.b64encode(b"[" * 1400).decode()
        for cursor in ("x", "%00", "", "é", half, deep, *others):
            refused = await admin.get(USERS, params={"cursor": cursor})
            assert (refused.status_code, refused.json()["code"]) == (400, "invalid_cursor"), cursor

    on_one(story)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"username": "x", "rol": "user"}, "rol"),
        ({"username": 1}, "username"),
        ({}, "username"),
        ({"username": "x", "more_roles": "user"}, "more_roles"),
        ({"username": "x" * 300}, "username"),
        ({"username": None}, "username"),
    ],
)
def test_a_mistake_is_named(given: Any, wrong: str, on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        refused = await admin.post(USERS, given)
        assert (refused.status_code, fields(refused)) == (400, {wrong})
        assert wrong in refused.json()["detail"]

    on_one(story)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"username": "a b"}, 422),
        ({"username": "x", "role": "nobody"}, 404),
        ({"username": "taken"}, 409),
        ({"username": "x\x00"}, 422),
    ],
)
def test_what_makes_no_sense_is_refused(given: Any, status: int, on_both: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        await house.user(name="taken")
        refused = await admin.post(USERS, given)
        assert refused.status_code == status
        assert len(await people.list_users(house.office.engine)) == 2

    on_both(story)


# Nobody gives what they lack.


def test_roles_that_permit_more_than_one_has_are_not_given(on_one: Any) -> None:
    async def story(house: House) -> None:
        helper = await house.someone("users:*", "models:read", "keys:read:own")
        user = await house.user(role="readonly")
        for given in ({"role": "admin"}, {"more_roles": ["operator"]}, {"role": "user"}):
            refused = await helper.post(USERS, {"username": "x", **given})
            assert (refused.status_code, refused.json()["code"]) == (403, "permission_denied")
            refused = await helper.ask("PATCH", f"{USERS}/{user.id}", json=given)
            assert refused.status_code == 403
        admin = await house.admin()
        made = await admin.post(USERS, {"username": "x", "role": "admin"})
        assert made.status_code == 201

    on_one(story)


def test_what_somebody_has_already_is_no_gift(on_one: Any) -> None:
    async def story(house: House) -> None:
        helper = await house.someone("users:*")
        chief = await house.user(role="admin")
        renamed = await helper.ask("PATCH", f"{USERS}/{chief.id}", json={"username": "chief"})
        assert renamed.status_code == 200

    on_one(story)


@pytest.mark.parametrize(
    ("method", "verb", "body"),
    [("PUT", "password", {"password": "correct horse battery"}), ("POST", "enable", None)],
)
def test_nobody_takes_over_or_brings_back_who_may_do_more(
    method: str, verb: str, body: Any, on_one: Any
) -> None:
    async def story(house: House) -> None:
        helper = await house.someone("users:*", role="operator")
        chief, other = await house.user(role="admin"), await house.user(role="admin")
        await people.disable_user(house.desk(), chief.id)
        refused = await helper.ask(method, f"{USERS}/{chief.id}/{verb}", json=body)
        assert refused.status_code == 403
        able = await house.caller(other, None)
        done = await able.ask(method, f"{USERS}/{chief.id}/{verb}", json=body)
        assert done.status_code == 200

    on_one(story)


# The last admin.


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "", None),
        ("POST", "/disable", None),
        ("PATCH", "", {"role": "operator"}),
    ],
)
def test_the_last_admin_stays(method: str, path: str, body: Any, on_both: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        await people.disable_user(house.desk(), (await house.user(role="admin")).id)
        where = f"{USERS}/{admin.user.id}{path}"
        refused = await admin.ask(method, where, json=body)
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
        assert (await people.get_user(house.office.engine, admin.user.id)) == admin.user
        await house.user(more_roles=["admin"])
        assert (await admin.ask(method, where, json=body)).is_success

    on_both(story)


# ETags.


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("DELETE", "", None), ("POST", "/disable", None), ("PATCH", "", {"username": "y"})],
)
def test_what_changed_meanwhile_is_not_changed(
    method: str, path: str, body: Any, on_both: Any
) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.user()
        where = f"{USERS}/{user.id}"
        seen = (await admin.get(where)).headers["etag"]
        await people.update_user(house.desk(), user.id, username="other")
        for tag in (seen, f"W/{seen}", '"x"', "x", ""):
            refused = await admin.ask(method, where + path, json=body, headers={"if-match": tag})
            assert (refused.status_code, refused.json()["code"]) == (412, "changed_meanwhile"), tag
        found = await people.get_user(house.office.engine, user.id)
        assert (found.username, found.disabled_at) == ("other", None)
        now = (await admin.get(where)).headers["etag"]
        both = {"if-match": f'"x", {now}'}
        assert (await admin.ask(method, where + path, json=body, headers=both)).is_success

    on_both(story)


def test_a_star_is_whatever_is_there(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.user()
        star = {"if-match": "*"}
        done = await admin.post(f"{USERS}/{user.id}/disable", headers=star)
        assert done.status_code == 200

    on_one(story)


# Several at once.


def test_two_admins_cannot_take_each_other_away(on_both: Any) -> None:
    async def story(house: House) -> None:
        first, second = await house.admin(), await house.admin()
        answers = await asyncio.gather(
            first.post(f"{USERS}/{second.user.id}/disable"),
            second.post(f"{USERS}/{first.user.id}/disable"),
        )
        assert sorted(answer.status_code for answer in answers) == [200, 409]

    on_both(story)


def test_of_two_changes_to_what_both_saw_one_is_made(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.user()
        where = f"{USERS}/{user.id}"
        seen = {"if-match": (await admin.get(where)).headers["etag"]}
        answers = await asyncio.gather(
            *(admin.ask("PATCH", where, json={"username": n}, headers=seen) for n in ("x", "y"))
        )
        won, lost = sorted(answer.status_code for answer in answers)
        assert won == 200
        assert lost in (412, 503)  # the database itself may see that two collide

    on_both(story)
