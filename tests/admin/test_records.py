"""Usage and audit over HTTP."""

from datetime import timedelta
from decimal import Decimal
from typing import Any

from parallama.db import ledger
from tests.admin.house import NOW, House, fields, names
from tests.parallama.db_on_disk import a_record

USAGE, AUDIT = "/admin/v1/usage", "/admin/v1/audit"


async def rows(house: House, user_id: str, *ids: str, **more: Any) -> None:
    records = [
        a_record(id, user_id=user_id, timestamp=NOW + timedelta(minutes=n), **more)
        for n, id in enumerate(ids)
    ]
    await ledger.add(house.office.store, records)


def test_rows_come_newest_first_though_others_come(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.someone()
        await rows(house, user.user.id, "a", "b", "c", "d", cost=Decimal("0.000000000001"))
        first = (await user.get(USAGE, params={"limit": 2})).json()
        assert names(first["items"], "request_id") == ["d", "c"]
        assert first["items"][0]["cost"] == "0.000000000001"
        await ledger.add(house.office.store, [a_record("e", user_id=user.user.id)])
        rest = await user.get(USAGE, params={"cursor": first["next_cursor"], "limit": 2})
        assert names(rest.json()["items"], "request_id")[0] == "b"
        since = {"since": "2026-03-01T12:01:00Z", "until": "2026-03-01T13:03:00+01:00"}
        found = await admin.get(USAGE, params={"user": user.user.username, **since})
        assert names(found.json()["items"], "request_id") == ["c", "b"]

    on_both(story)


def test_sums_are_by_what_is_named(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.someone()
        await rows(house, user.user.id, "a", "b", cost=Decimal("0.5"))
        await rows(house, "gone", "c", model_name=None)
        told = (await admin.get(f"{USAGE}/summary", params={"by": ["model", "day"]})).json()
        sums = [(at["model_name"], at["requests"], at["cost"]) for at in told["items"]]
        assert sorted(sums, key=str) == [("llama3", 2, "1"), (None, 1, None)]
        (own,) = (await user.get(f"{USAGE}/summary")).json()["items"]
        assert (own["user_id"], own["requests"]) == (user.user.id, 2)
        refused = await user.get(f"{USAGE}/summary", params={"by": "colour"})
        assert (refused.status_code, fields(refused)) == (400, {"by.0"})

    on_both(story)


def test_the_record_of_changes_is_for_who_may_read_it(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.someone()
        await admin.post(f"/admin/v1/users/{user.user.id}/disable")
        await admin.post(f"/admin/v1/users/{user.user.id}/enable")
        told = await admin.every(AUDIT, limit=1)
        assert names(told, "action")[:2] == ["users.enable", "users.disable"]
        assert told[0]["before"]["disabled_at"] == "2026-03-01T12:00:00+00:00"
        assert (told[0]["actor"], told[0]["via"]) == (admin.user.username, "api")
        mine = await admin.every(AUDIT, actor=admin.user.id, subject=user.user.id)
        assert names(mine, "action") == ["users.enable", "users.disable"]
        assert (await user.get(AUDIT)).status_code == 403

    on_both(story)


def test_a_time_has_its_zone(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        for since in ("2026-03-01", "2026-03-01T12:00:00", "1700000000", "now", ""):
            for path in (USAGE, AUDIT, f"{USAGE}/summary"):
                refused = await admin.get(path, params={"since": since})
                assert (refused.status_code, fields(refused)) == (400, {"since"}), since

    on_one(story)


def test_what_no_database_can_hold_is_refused(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        for query in ({"user": "a\x00"}, {"user": "é" * 3000}):
            assert (await admin.get(USAGE, params=query)).status_code in (400, 404)
        assert (await admin.get("/admin/v1/users/a%00b")).status_code in (400, 404)

    on_both(story)
