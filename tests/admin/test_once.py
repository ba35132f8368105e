"""The same POST twice, by its Idempotency-Key."""

import asyncio
from typing import Any

from parallama import keys
from parallama.admin import once
from parallama.db.manage import credentials, people
from tests.admin.house import House
from tests.valkey import Valkey

USERS, KEYS = "/admin/v1/users", "/admin/v1/keys"
ONCE = {"idempotency-key": "a"}


async def kept(house: House) -> list[bytes]:
    redis = house.office.redis
    return [await redis.get(key) async for key in redis.scan_iter(f"{once.PREFIX}*")]


def test_a_second_one_gets_the_first_ones_answer(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        first = await admin.post(USERS, {"username": "x"}, headers=ONCE)
        second = await admin.post(USERS, {"username": "x"}, headers=ONCE)
        assert (first.status_code, second.status_code) == (201, 201)
        assert second.json() == first.json()
        for header in ("etag", "location", "content-type"):
            assert second.headers[header] == first.headers[header]
        assert second.headers["idempotency-replayed"] == "true"
        assert "idempotency-replayed" not in first.headers
        assert len(await people.list_users(house.office.engine)) == 2

    on_one(story)


def test_without_an_answer_there_is_none_the_second_time_either(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        for _ in range(2):
            done = await admin.post("/admin/v1/tokens/revoke", {"jti": "x"}, headers=ONCE)
            assert (done.status_code, done.content) == (204, b"")

    on_one(story)


def test_a_secret_is_shown_once_and_kept_nowhere(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        first = (await admin.post(KEYS, {}, headers=ONCE)).json()
        again = await admin.post(KEYS, {}, headers=ONCE)
        assert again.json() == {**first, "key": None}
        parsed = keys.parse(first["key"])
        assert parsed is not None
        for text in await kept(house):
            assert parsed.secret.encode() not in text
        assert len(await credentials.list_keys(house.office.engine)) == 2

    on_one(story)


def test_it_belongs_to_one_caller_path_and_body(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin, other = await house.admin(), await house.admin()
        await admin.post(USERS, {"username": "x"}, headers=ONCE)
        refused = await admin.post(USERS, {"username": "y"}, headers=ONCE)
        assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")
        assert (await admin.post(KEYS, {}, headers=ONCE)).status_code == 201
        taken = await other.post(USERS, {"username": "x"}, headers=ONCE)
        assert taken.status_code == 409
        made = await other.post(USERS, {"username": "y"}, headers=ONCE)
        assert made.status_code == 201

    on_one(story)


def test_what_was_refused_may_be_tried_again(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        wrong = {"username": "x", "role": "later"}
        assert (await admin.post(USERS, wrong, headers=ONCE)).status_code == 404
        await admin.post("/admin/v1/roles", {"name": "later", "permissions": []})
        assert (await admin.post(USERS, wrong, headers=ONCE)).status_code == 201

    on_one(story)


def test_of_many_at_once_one_is_done(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        answers = await asyncio.gather(*(admin.post(KEYS, {}, headers=ONCE) for _ in range(10)))
        tokens = [a.json()["key"] for a in answers if a.status_code == 201 and a.json()["key"]]
        assert len(tokens) == 1
        assert {a.status_code for a in answers} <= {201, 409}
        assert len(await credentials.list_keys(house.office.engine)) == 2

    on_one(story)


def test_where_nobody_knows_how_the_first_one_ended_there_is_no_second(
    on_one: Any, monkeypatch: Any
) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()

        async def dies(*_: Any, **__: Any) -> None:
            raise RuntimeError("in the middle of it")

        with monkeypatch.context() as patch:
            patch.setattr(people, "create_user", dies)
            broken = await admin.post(USERS, {"username": "x"}, headers=ONCE)
        assert (broken.status_code, broken.json()["code"]) == (500, "internal_error")
        refused = await admin.post(USERS, {"username": "x"}, headers=ONCE)
        assert (refused.status_code, refused.json()["code"]) == (409, "outcome_unknown")
        assert (await admin.post(USERS, {"username": "x"})).status_code == 201

    on_one(story)


def test_a_key_is_visible_and_short(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        for key in ("", "a b", "x" * 256, "é"):
            refused = await admin.post(
                USERS, {"username": "x"}, headers={"idempotency-key": key.encode()}
            )
            assert refused.json()["code"] == "invalid_idempotency_key"
        assert await kept(house) == []

    on_one(story)


def test_without_redis_nothing_is_promised_and_nothing_done(on_one: Any, valkey: Valkey) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        valkey.stop()
        try:
            refused = await admin.post(USERS, {"username": "x"}, headers=ONCE)
            assert (refused.status_code, refused.json()["code"]) == (503, "service_unavailable")
            made = await admin.post(USERS, {"username": "x"})  # no promise was asked for
            assert made.status_code == 201
        finally:
            valkey.start()

    on_one(story)
