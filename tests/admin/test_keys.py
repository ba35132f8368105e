"""Keys over HTTP: for whoever hands them out, and for their owners."""

from datetime import timedelta
from typing import Any

import pytest

from parallama import keys
from parallama.db.accounts import find_key
from parallama.db.manage import credentials
from tests.admin.house import NOW, House, fields, later, names

KEYS = "/admin/v1/keys"
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl a@b"


async def opens(house: House, token: str) -> bool:
    """Whether it is a key's secret that authz would find."""
    parsed = keys.parse(token)
    assert parsed is not None
    found = await find_key(house.office.store, parsed.public_id)
    return found is not None and keys.verify(parsed.secret, found.secret_hash)


def test_a_key_from_its_first_day_to_its_last(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.user()
        bounds = {
            **{"name": "ci", "models": ["a*"], "networks": ["10.0.0.0/8"], "gateways": ["ollama"]},
            **{"scopes": ["models:infer"], "expires_at": later(days=1)},
        }
        made = await admin.post(KEYS, {"user": user.username, **bounds})
        assert made.status_code == 201
        told = made.json()
        token = told.pop("key")
        assert await opens(house, token)
        assert told["key_prefix"] == token[:16]
        assert {name: told[name] for name in bounds} == {
            **bounds,
            "expires_at": "2026-03-02T12:00:00Z",
        }
        where = made.headers["location"]
        found = await admin.get(where)
        assert (found.json(), found.headers["etag"]) == (told, made.headers["etag"])
        lifted = await admin.ask("PATCH", where, json={"models": None, "name": "x"})
        assert (lifted.json()["models"], lifted.json()["name"]) == (None, "x")
        assert lifted.json()["networks"] == ["10.0.0.0/8"]
        rotated = await admin.post(f"{where}/rotate", {"grace_seconds": 60})
        assert rotated.json()["previous_expires_at"] == "2026-03-01T12:01:00Z"
        assert rotated.json()["id"] == told["id"]
        assert await opens(house, token)
        assert await opens(house, rotated.json()["key"])
        async with house.hearing() as heard:
            revoked = await admin.post(f"{where}/revoke")
        assert heard == [f"key {told['id']}"]
        assert revoked.json()["revoked_at"] == "2026-03-01T12:00:00Z"
        assert (await admin.post(f"{where}/rotate")).status_code == 409

    on_both(story)


def test_that_a_key_was_used_is_no_change(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin, other = await house.admin(), await house.someone()
        assert other.key is not None
        where = f"{KEYS}/{other.key.id}"
        before = (await admin.get(where)).headers["etag"]
        query = "UPDATE api_keys SET last_used_at = ? WHERE id = ?"
        await house.office.store.write((query, [(NOW, other.key.id)]))
        assert (await admin.get(where)).json()["last_used_at"] == "2026-03-01T12:00:00Z"
        assert (await admin.get(where)).headers["etag"] == before

    on_one(story)


def test_owners_see_rotate_and_revoke_their_own(on_one: Any) -> None:
    async def story(house: House) -> None:
        user, other = await house.someone(), await house.someone()
        assert user.key is not None
        mine = await house.key(user.user)
        seen = names((await user.get(KEYS)).json()["items"], "id")
        assert sorted(seen) == sorted([user.key.id, mine.id])
        rotated = await user.post(f"{KEYS}/{mine.id}/rotate")
        assert await opens(house, rotated.json()["key"])
        assert (await user.post(f"{KEYS}/{mine.id}/revoke")).status_code == 200
        assert (await user.get(KEYS, params={"user": other.user.id})).status_code == 404
        assert (await user.post(KEYS, {})).status_code == 403

    on_one(story)


def test_with_own_scope_one_makes_keys_for_oneself_alone(on_one: Any) -> None:
    async def story(house: House) -> None:
        user, other = await house.someone(), await house.user()
        maker = await house.caller(user.user, user.key, "keys:create:own", "models:infer")
        made = await maker.post(KEYS, {"scopes": ["models:infer"]})
        assert made.json()["user_id"] == user.user.id
        refused = await maker.post(KEYS, {"user": other.id, "scopes": ["models:infer"]})
        assert refused.status_code == 404

    on_one(story)


def test_keys_come_oldest_first(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        user = await house.user()
        made = []
        for _ in range(5):
            house.now += timedelta(seconds=1)
            made.append((await house.key(user)).id)
        assert names(await admin.every(KEYS, user=user.id, limit=2), "id") == made

    on_both(story)


def test_a_public_key_is_a_key_too(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.user()
        made = await admin.post(KEYS, {"user": user.id, "public_key": PUBLIC_KEY})
        assert (made.status_code, made.json()["kind"], made.json()["key"]) == (201, "ssh", None)
        again = await admin.post(KEYS, {"user": user.id, "public_key": PUBLIC_KEY})
        assert again.status_code == 409

    on_one(story)


@pytest.mark.parametrize(
    ("given", "status", "wrong"),
    [
        ({"expires_at": "2026-02-01T00:00:00Z"}, 422, None),
        ({"expires_at": "2030-02-01T00:00:00"}, 400, "expires_at"),
        ({"expires_at": "1893456000"}, 400, "expires_at"),
        ({"expires_at": 1893456000}, 400, "expires_at"),
        ({"expires_at": "0001-01-01T00:00:00+14:00"}, 400, "expires_at"),
        ({"networks": ["10.0.0.1/8"]}, 422, None),
        ({"models": []}, 422, None),
        ({"gateways": ["azure"]}, 400, "gateways.0"),
        ({"scopes": ["models:fly"]}, 422, None),
        ({"name": "a\ud800"}, 400, "name"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(
    given: Any, status: int, wrong: str | None, on_one: Any
) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        refused = await admin.post(KEYS, given)
        assert refused.status_code == status
        assert wrong is None or fields(refused) == {wrong}

    on_one(story)


# Nobody gives what they lack.


def test_no_key_can_do_more_than_who_makes_it(on_one: Any) -> None:
    async def story(house: House) -> None:
        helper = await house.someone("keys:*", "models:read", "models:infer")
        user, chief = await house.user(), await house.user(role="admin")
        assert (await helper.post(KEYS, {"user": user.id})).status_code == 403
        bound = {"user": chief.id, "scopes": ["models:infer"]}
        made = await helper.post(KEYS, bound)
        assert made.status_code == 201
        where = made.headers["location"]
        for scopes in (None, ["*:*"], ["users:create"]):
            assert (await helper.post(KEYS, {**bound, "scopes": scopes})).status_code == 403
            refused = await helper.ask("PATCH", where, json={"scopes": scopes})
            assert refused.status_code == 403
        named = await helper.ask("PATCH", where, json={"name": "x"})
        assert named.status_code == 200

    on_one(story)


def test_nobody_learns_a_secret_that_could_do_more(on_one: Any) -> None:
    async def story(house: House) -> None:
        helper, chief = await house.someone("keys:*"), await house.admin()
        assert chief.key is not None
        refused = await helper.post(f"{KEYS}/{chief.key.id}/rotate")
        assert refused.status_code == 403
        user = await house.someone(scopes=["keys:rotate:own"])
        strong = await house.key(user.user)
        weak = await house.caller(user.user, user.key, "keys:rotate:own")
        assert (await weak.post(f"{KEYS}/{strong.id}/rotate")).status_code == 403
        assert user.key is not None
        assert (await weak.post(f"{KEYS}/{user.key.id}/rotate")).status_code == 200

    on_one(story)


@pytest.mark.parametrize(
    ("own", "wanted", "status"),
    [
        ({"models": ["a*", "b"]}, {}, 403),
        ({"models": ["a*", "b"]}, {"models": ["c"]}, 403),
        ({"models": ["a*", "b"]}, {"models": ["*"]}, 403),
        ({"models": ["a*", "b"]}, {"models": ["a:1", "b"]}, 201),
        ({"networks": ["10.0.0.0/8"]}, {}, 403),
        ({"networks": ["10.0.0.0/8"]}, {"networks": ["0.0.0.0/0"]}, 403),
        ({"networks": ["10.0.0.0/8"]}, {"networks": ["::/0"]}, 403),
        ({"networks": ["10.0.0.0/8"]}, {"networks": ["10.1.0.0/16"]}, 201),
        ({"expires_at": NOW + timedelta(days=1)}, {}, 403),
        ({"expires_at": NOW + timedelta(days=1)}, {"expires_at": later(days=2)}, 403),
        ({"expires_at": NOW + timedelta(days=1)}, {"expires_at": later(hours=1)}, 201),
    ],
)
def test_a_bounded_key_makes_keys_within_its_bounds(
    own: Any, wanted: Any, status: int, on_one: Any
) -> None:
    async def story(house: House) -> None:
        admin = await house.someone(role="admin", **own)
        made = await admin.post(KEYS, wanted)
        assert made.status_code == status
        by_log_in = await house.caller(admin.user, None)
        assert (await by_log_in.post(KEYS, wanted)).status_code == 201

    on_one(story)


def test_a_name_that_others_use_tells_nothing(on_one: Any) -> None:
    async def story(house: House) -> None:
        user = await house.someone()
        for _ in range(2):
            await house.key(await house.user(), name="ci")
        for which in ("ci", "nothing"):
            refused = await user.get(f"{KEYS}/{which}")
            assert refused.json()["detail"] == f"There is no key {which!r}."

    on_one(story)


def test_credentials_are_shown_nowhere_else(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        token = (await admin.post(KEYS, {})).json()["key"]
        parsed = keys.parse(token)
        assert parsed is not None
        stored = await credentials.list_keys(house.office.engine)
        for path in (KEYS, f"{KEYS}/{stored[-1].id}", "/admin/v1/audit"):
            assert parsed.secret not in (await admin.get(path)).text

    on_one(story)
