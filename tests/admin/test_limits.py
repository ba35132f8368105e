"""Limits, grants, quotas, prices and model mappings over HTTP."""

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from parallama.buckets import bucket, buckets
from parallama.counters import Call
from parallama.db import ledger
from parallama.db.policies import policy_of
from parallama.limits import Limit, Unit, Window
from tests.admin.house import NOW, Caller, House, fields, later, names
from tests.parallama.db_on_disk import a_record
from tests.valkey import Valkey

LIMITS, GRANTS, PRICES = "/admin/v1/limits", "/admin/v1/grants", "/admin/v1/prices"
MAPPINGS = "/admin/v1/model-mappings"


def test_limits_are_set_shown_and_removed(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.someone()
        this = {"scope": user.user.username, "gateway": "ollama", "model": "a*"}
        made = await admin.post(LIMITS, {**this, "tokens_per_day": 5, "cost_per_day": "1.50"})
        told = made.json()
        assert (told["tokens_per_day"], told["cost_per_day"]) == (5, "1.5")
        assert told["requests_per_day"] is None
        async with house.hearing() as heard:
            more = await admin.post(LIMITS, {**this, "concurrent": 2})
        assert heard == [f"limits {user.user.id}"]
        assert (more.json()["id"], more.json()["tokens_per_day"]) == (told["id"], 5)
        where = f"{LIMITS}/{told['id']}"
        assert (await admin.get(where)).headers["etag"] == more.headers["etag"]
        assert names((await user.get(LIMITS)).json()["items"], "id") == [told["id"]]
        stale = {"if-match": made.headers["etag"]}
        assert (await admin.ask("DELETE", where, headers=stale)).status_code == 412
        assert (await admin.ask("DELETE", where)).status_code == 204
        assert (await admin.get(where)).status_code == 404
        for gateway in ("ollama", "openai"):
            await admin.post(LIMITS, {**this, "gateway": gateway, "concurrent": 1})
        query = {"scope": user.user.username, "gateway": "openai"}
        assert (await admin.ask("DELETE", LIMITS, params=query)).json() == {"removed": 1}
        query = {"scope": user.user.username}
        assert (await admin.ask("DELETE", LIMITS, params=query)).json() == {"removed": 1}

    on_both(story)


def test_limits_of_a_role_and_a_key_have_an_id_too(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.someone()
        assert user.key is not None
        for scope in ("role:user", f"key:{user.key.id}"):
            made = await admin.post(LIMITS, {"scope": scope, "gateway": "*", "concurrent": 1})
            where = f"{LIMITS}/{made.json()['id']}"
            assert (await user.get(where)).status_code == 200
            assert (await admin.ask("DELETE", where)).status_code == 204
        made = await admin.post(LIMITS, {"scope": "role:admin", "gateway": "*", "concurrent": 1})
        assert (await user.get(f"{LIMITS}/{made.json()['id']}")).status_code == 404

    on_one(story)


@pytest.mark.parametrize(
    ("given", "status", "wrong"),
    [
        ({}, 422, None),
        ({"tokens_per_day": -1}, 400, "tokens_per_day"),
        ({"tokens_per_day": "5"}, 400, "tokens_per_day"),
        ({"tokens_per_day": 2**70}, 400, "tokens_per_day"),
        ({"cost_per_day": 1.5}, 400, "cost_per_day"),
        ({"cost_per_day": "1e5"}, 400, "cost_per_day"),
        ({"cost_per_day": "0.0000000001"}, 422, None),
        ({"token_per_day": 5}, 400, "token_per_day"),
        ({"concurrent": 1, "model": "a*b"}, 422, None),
        ({"concurrent": 1, "gateway": "azure"}, 400, "gateway"),
    ],
)
def test_amounts_that_make_no_sense_are_refused(
    given: Any, status: int, wrong: str | None, on_one: Any
) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        refused = await admin.post(LIMITS, {"scope": "role:user", "gateway": "*", **given})
        assert refused.status_code == status
        assert wrong is None or fields(refused) == {wrong}
        assert (await admin.get(LIMITS)).json()["items"] == []

    on_one(story)


def test_grants_are_given_shown_and_taken_back(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.someone()
        made = []
        for days, unit, amount in ((2, "tokens", 5), (1, "cost", "0.50"), (3, "tokens", 7)):
            given = {"unit": unit, "amount": amount, "expires_at": later(days=days)}
            made.append((await admin.post(GRANTS, {"user": user.user.id, **given})).json())
        assert [each["amount"] for each in made] == [5, "0.5", 7]
        in_order = [made[i]["id"] for i in (1, 0, 2)]
        assert names(await user.every(GRANTS, limit=1), "id") == in_order
        where = f"{GRANTS}/{made[0]['id']}"
        assert (await user.get(where)).json() == made[0]
        assert (await admin.ask("DELETE", where)).status_code == 204
        assert (await admin.get(where)).status_code == 404

    on_both(story)


@pytest.mark.parametrize(
    "given",
    [
        {"unit": "cost", "amount": 1},
        {"unit": "tokens", "amount": "1.5"},
        {"unit": "tokens", "amount": 1, "expires_at": "2020-01-01T00:00:00Z"},
    ],
)
def test_grants_that_make_no_sense_are_refused(given: Any, on_one: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        whole = {"user": admin.user.id, "expires_at": later(days=1), **given}
        assert (await admin.post(GRANTS, whole)).status_code == 422

    on_one(story)


# What is left.


async def spend(house: House, who: Caller, tokens: int, *, settle: int | None) -> None:
    now = house.now.timestamp()
    policy = await policy_of(house.office.store, who.user.id)
    key = "" if who.key is None else who.key.id
    holds = [b.hold(1) for b in buckets(policy.limits, "ollama", "m", key, now)]
    call = Call(f"r{tokens}", who.user.id, key, "ollama", "ollama", "/api/chat", "m", now)
    counters = house.office.counters
    counted = [(hold, 0) for hold in holds if hold.unit is not Unit.CONCURRENT]
    reply = await counters.reserve(call, holds, tokens=tokens, least=0, now=now)
    if not counters.taken(reply).known:
        since = await counters.begin(who.user.id, now)
        assert await counters.seed(who.user.id, since, counted, [], now)
        reply = await counters.reserve(call, holds, tokens=tokens, least=0, now=now)
        assert counters.taken(reply).taken
    if settle is not None:
        assert await counters.settle(who.user.id, call.request_id, settle, now) == 1


async def quota(who: Caller, path: str = "/me/quota") -> dict[str, Any]:
    """By unit and window."""
    answer = await who.get(path)
    assert answer.status_code == 200, answer.text
    return {f"{at['unit']}/{at['window']}": at for at in answer.json()["limits"]}


def test_a_quota_says_what_is_left_and_when_it_starts_again(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.someone()
        amounts = {"tokens_per_day": 100, "requests_per_minute": 3, "concurrent": 2}
        await admin.post(LIMITS, {"scope": user.user.id, "gateway": "*", **amounts})
        await spend(house, user, 40, settle=30)
        await spend(house, user, 20, settle=None)
        told = await quota(user)
        assert told == await quota(admin, f"/admin/v1/users/{user.user.id}/quota")
        assert told["tokens/day"] == {
            **{"gateway": "*", "model": "*", "key_id": None, "shadow": False},
            **{"unit": "tokens", "window": "day", "resets_at": "2026-03-02T00:00:00Z"},
            **{"limit": 100, "used": 30, "reserved": 20, "left": 50},
        }
        assert (told["requests/minute"]["used"], told["requests/minute"]["left"]) == (2, 1)
        assert told["requests/minute"]["resets_at"] == "2026-03-01T12:01:00Z"
        assert (told["concurrent/moment"]["left"], told["concurrent/moment"]["resets_at"]) == (
            1,
            None,
        )
        house.now += timedelta(days=1)
        assert (await quota(user))["tokens/day"]["left"] == 100

    on_both(story)


def test_looking_changes_nothing(on_one: Any, valkey: Valkey) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.someone()
        await admin.post(LIMITS, {"scope": user.user.id, "gateway": "*", "tokens_per_day": 9})
        await quota(user)
        assert [key async for key in house.office.redis.scan_iter("rl:*")] == []

    on_one(story)


def test_counters_that_are_lost_are_read_from_the_rows(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.someone()
        amounts = {"tokens_per_day": 100, "cost_per_day": "2", "compute_seconds_per_day": 10}
        await admin.post(LIMITS, {"scope": user.user.id, "gateway": "*", **amounts})
        row = a_record(
            "r", user_id=user.user.id, timestamp=NOW, tokens_used=30, cost=Decimal("0.75")
        )
        await ledger.add(house.office.store, [row])
        told = await quota(user)
        left = {unit: (at["used"], at["left"]) for unit, at in told.items()}
        assert left == {
            "tokens/day": (30, 70),
            "cost/day": ("0.75", "1.25"),
            "compute_seconds/day": ("0.9", "9.1"),
        }

    on_both(story)


def test_a_key_sees_its_own_limits_and_not_those_of_others(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.someone()
        other = await house.caller(user.user, await house.key(user.user))
        assert user.key is not None
        scope = f"key:{user.key.id}"
        await admin.post(LIMITS, {"scope": scope, "gateway": "*", "tokens_per_day": 9})
        assert names((await quota(user)).values(), "key_id") == [user.key.id]
        assert await quota(other) == {}
        assert len(await quota(await house.caller(user.user, None))) == 1

    on_one(story)


def test_grants_count_while_they_last(on_one: Any) -> None:
    async def story(house: House) -> None:
        admin, user = await house.admin(), await house.someone()
        given = {"unit": "tokens", "amount": 50, "expires_at": later(days=1)}
        await admin.post(GRANTS, {"user": user.user.id, **given})
        (told,) = (await user.get("/me/quota")).json()["grants"]
        assert (told["amount"], told["left"], told["expires_at"]) == (
            *(50, 50),
            "2026-03-02T12:00:00Z",
        )
        house.now += timedelta(days=1)
        assert (await user.get("/me/quota")).json()["grants"] == []

    on_one(story)


def test_without_redis_nobody_knows_what_is_left(on_one: Any, valkey: Valkey) -> None:
    async def story(house: House) -> None:
        user = await house.someone()
        valkey.stop()
        try:
            refused = await user.get("/me/quota")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "counters" not in refused.text
        finally:
            valkey.start()

    on_one(story)


def test_a_bucket_is_named_alike_for_who_counts_and_who_looks() -> None:
    limit = Limit("*", "*", Unit.TOKENS, Window.DAY, 5)
    (counted,) = buckets([limit], "ollama", "m", "k", NOW.timestamp())
    assert bucket(limit, NOW.timestamp()) == counted


# Prices, and model mappings.


def test_prices_are_set_shown_and_removed(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        for model in ("b", "a*", "c"):
            given = {"prompt_per_million": "0.10", "completion_per_million": "2"}
            made = await admin.post(PRICES, {"model": model, **given})
        assert made.json() == {
            **{"model": "c", "prompt_per_million": "0.1", "completion_per_million": "2"},
            **{"cached_per_million": None, "compute_per_second": None},
            "updated_at": "2026-03-01T12:00:00Z",
        }
        assert names(await admin.every(PRICES, limit=1), "model") == ["a*", "b", "c"]
        for status in (204, 404):
            done = await admin.ask("DELETE", PRICES, params={"model": "b"})
            assert done.status_code == status

    on_both(story)


def test_mappings_are_kept_and_listed(on_both: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        given = {"gateway": "openai", "external_model": "gpt-4", "internal_model": "llama3"}
        made = (await admin.post(MAPPINGS, given)).json()
        again = (await admin.post(MAPPINGS, {**given, "internal_model": "qwen3"})).json()
        assert (again["id"], again["internal_model"]) == (made["id"], "qwen3")
        await admin.post(MAPPINGS, {**given, "external_model": "gpt-3"})
        assert names(await admin.every(MAPPINGS, limit=1), "external_model") == ["gpt-3", "gpt-4"]
        where = f"{MAPPINGS}/{made['id']}"
        assert (await admin.get(where)).json() == again
        assert (await admin.ask("DELETE", where)).status_code == 204
        assert (await admin.ask("DELETE", where)).status_code == 404
        for wrong in ({"external_model": "a*"}, {"internal_model": ""}):
            assert (await admin.post(MAPPINGS, {**given, **wrong})).status_code == 422
        actions = names(await admin.every("/admin/v1/audit", action="mappings"), "action")
        assert actions == ["mappings.unset", *["mappings.set"] * 3]

    on_both(story)
