"""Log-ins over HTTP."""

from typing import Any

import httpx
import jwt

from parallama.db.manage import people
from parallama.db.manage.people import User
from tests.admin.house import House, fields
from tests.valkey import Valkey

PASSWORD = "correct horse battery"


async def with_password(house: House, **more: Any) -> User:
    user = await house.user(**more)
    settings = house.config.authentication
    return await people.set_password(house.desk(), user.id, PASSWORD, settings=settings)


async def post(house: House, path: str, body: Any) -> httpx.Response:
    return await house.ask("POST", path, json=body, headers={"x-parallama-address": "192.0.2.9"})


async def login(house: House, user: User) -> dict[str, Any]:
    answer = await post(house, "/auth/login", {"username": user.username, "password": PASSWORD})
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    told: dict[str, Any] = answer.json()
    return told


def test_a_session_from_its_begin_to_its_end(on_both: Any) -> None:
    async def story(house: House) -> None:
        user = await with_password(house)
        told = await login(house, user)
        assert (told["token_type"], told["expires_in"]) == ("Bearer", 1800)
        (key,) = (await house.ask("GET", "/auth/.well-known/jwks.json")).json()["keys"]
        claims = jwt.decode(
            told["access_token"],
            jwt.PyJWK(key),
            audience="parallama",
            options={"verify_exp": False, "verify_nbf": False, "verify_iat": False},
        )
        assert claims["sub"] == user.id
        renewed = await post(house, "/auth/refresh", {"refresh_token": told["refresh_token"]})
        assert renewed.status_code == 200
        caller = await house.caller(user, None)
        body = {"refresh_token": renewed.json()["refresh_token"]}
        assert (await caller.post("/auth/logout", body)).status_code == 204
        refused = await post(house, "/auth/refresh", body)
        assert (refused.status_code, refused.json()["code"]) == (401, "not_accepted")

    on_both(story)


def test_a_token_ends_its_own_session_and_all(on_one: Any) -> None:
    async def story(house: House) -> None:
        user = await with_password(house)
        first, second = await login(house, user), await login(house, user)
        claims = jwt.decode(first["access_token"], options={"verify_signature": False})
        caller = await house.caller(user, None)
        caller.headers["x-parallama-credential"] = f"token:{claims['jti']}"
        assert (await caller.post("/auth/logout")).status_code == 204
        for token, status in ((first, 401), (second, 200)):
            answer = await post(house, "/auth/refresh", {"refresh_token": token["refresh_token"]})
            assert answer.status_code == status
        assert (await caller.post("/auth/logout", {"everywhere": True})).status_code == 204
        token = {"refresh_token": answer.json()["refresh_token"]}
        assert (await post(house, "/auth/refresh", token)).status_code == 401

    on_one(story)


def test_a_key_has_no_session(on_one: Any) -> None:
    async def story(house: House) -> None:
        assert (await (await house.someone()).post("/auth/logout")).status_code == 422

    on_one(story)


def test_a_session_of_another_issuer_is_not_ours_to_end(on_one: Any) -> None:
    """Above all not one of ours, whose id it bears."""

    async def story(house: House) -> None:
        user, other = await with_password(house), await with_password(house)
        theirs = await login(house, other)
        claims = jwt.decode(theirs["access_token"], options={"verify_signature": False})
        caller = await house.caller(user, None)
        caller.headers["x-parallama-credential"] = f"outside:{claims['jti']}"
        answer = await caller.post("/auth/logout")
        assert answer.status_code == 422
        assert "another issuer" in answer.text
        goes_on = await post(house, "/auth/refresh", {"refresh_token": theirs["refresh_token"]})
        assert goes_on.status_code == 200
        assert (await caller.post("/auth/logout", {"everywhere": True})).status_code == 204

    on_one(story)


def test_there_is_one_answer_for_whatever_is_wrong(on_one: Any) -> None:
    async def story(house: House) -> None:
        user, off = await with_password(house), await with_password(house)
        await people.disable_user(house.desk(), off.id)
        without = await house.user()
        tries = [
            (user.username, "wrong wrong wrong"),
            (off.username, PASSWORD),
            (without.username, PASSWORD),
            ("nobody", PASSWORD),
            ("no\x00body", PASSWORD),
            ("' OR 1=1 --", PASSWORD),
        ]
        answers = {
            (answer.status_code, answer.text)
            for name, password in tries
            if (
                answer := await post(house, "/auth/login", {"username": name, "password": password})
            )
        }
        ((status, text),) = answers
        assert status == 401
        assert PASSWORD not in text

    on_one(story)


def test_who_guesses_waits(on_one: Any) -> None:
    async def story(house: House) -> None:
        user = await with_password(house)
        wrong = {"username": user.username, "password": "wrong wrong wrong"}
        statuses = [(await post(house, "/auth/login", wrong)).status_code for _ in range(6)]
        assert statuses == [401] * 5 + [429]
        right = {"username": user.username, "password": PASSWORD}
        locked = await post(house, "/auth/login", right)
        assert (locked.status_code, locked.json()["code"]) == (429, "too_many_attempts")
        assert int(locked.headers["retry-after"]) >= 1
        admin = await house.admin()
        unlocked = await admin.post(f"/admin/v1/users/{user.username}/unlock")
        assert (unlocked.status_code, unlocked.json()["id"]) == (200, user.id)
        assert (await post(house, "/auth/login", right)).status_code == 200
        (entry,) = await admin.every("/admin/v1/audit", action="users.unlock")
        assert (entry["subject_id"], entry["via"]) == (user.id, "api")

    on_one(story)


def test_without_redis_nobody_logs_in(on_one: Any, valkey: Valkey) -> None:
    async def story(house: House) -> None:
        user = await with_password(house)
        valkey.stop()
        try:
            right = {"username": user.username, "password": PASSWORD}
            assert (await post(house, "/auth/login", right)).status_code == 503
        finally:
            valkey.start()

    on_one(story)


def test_one_changes_ones_own_password(on_one: Any) -> None:
    async def story(house: House) -> None:
        user = await with_password(house)
        told = await login(house, user)
        caller = await house.caller(user, None)
        change = {"current": PASSWORD, "new": "another horse battery"}
        wrong = await caller.post("/auth/password", {**change, "current": "wrong wrong wrong"})
        assert wrong.status_code == 401
        weak = await caller.post("/auth/password", {**change, "new": "short"})
        assert weak.status_code == 422
        assert (await caller.post("/auth/password", change)).status_code == 200
        token = {"refresh_token": told["refresh_token"]}
        assert (await post(house, "/auth/refresh", token)).status_code == 401

    on_one(story)


def test_no_secret_is_said_back(on_one: Any) -> None:
    async def story(house: House) -> None:
        secret = "a-secret-of-somebody"
        for body in (
            {"username": "x", "password": [secret]},
            {"username": "x", "password": secret * 100},
            {"username": "x", "pasword": secret},
            {"username": {secret: 1}, "password": "x"},
        ):
            refused = await post(house, "/auth/login", body)
            assert (refused.status_code, bool(fields(refused))) == (400, True)
            assert secret not in refused.text

    on_one(story)


def test_who_one_is_and_what_one_may(on_one: Any) -> None:
    async def story(house: House) -> None:
        user = await house.someone("usage:read:own")
        told = (await user.get("/auth/me")).json()
        assert told["user"]["id"] == user.user.id
        assert told["credential"] == user.headers["x-parallama-credential"]
        assert told["permissions"] == ["usage:read:own"]

    on_one(story)
