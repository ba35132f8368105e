"""Limits and grants on a real database."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from parallama.config import Database
from parallama.db import Store
from parallama.db.manage import credentials, grants, limits, people
from parallama.db.manage.limits import Amount, Policy
from parallama.db.policies import COLUMNS, Cell, policy_of
from parallama.errors import Conflict, NotFound, UsageError
from parallama.limits import Grant, Limit, Unit, Window
from parallama.roles import Role
from tests.parallama.db_on_disk import NOW, Opened, a_minted, on

DAY: Cell = (Unit.TOKENS, Window.DAY)
HOUR: Cell = (Unit.TOKENS, Window.HOUR)
CALLS: Cell = (Unit.REQUESTS, Window.MINUTE)
COST: Cell = (Unit.COST, Window.MONTH)
TOMORROW = NOW + timedelta(days=1)
NOBODY = "7c1f2c1e-0000-4000-8000-000000000000"


async def anna(at: Opened) -> str:
    return (await people.create_user(at.desk(), "anna", Role.USER)).id


async def a_key(at: Opened, who: str = "anna", name: str = "laptop", *, seed: int = 1) -> str:
    return (await credentials.create_key(at.desk(), who, a_minted(seed), name=name)).id


async def put(
    at: Opened,
    whose: str,
    amounts: Mapping[Cell, Amount],
    *,
    gateway: str = "*",
    model: str = "*",
    shadow: bool = False,
) -> Policy:
    return await limits.set_limits(
        at.desk(), whose, gateway=gateway, model=model, amounts=amounts, shadow=shadow
    )


async def limits_of(store: Store, user: str) -> tuple[Limit, ...]:
    return tuple(replace(at, set_at=0.0) for at in (await policy_of(store, user)).limits)


def a_limit(
    cell: Cell,
    amount: int,
    *,
    gateway: str = "*",
    model: str = "*",
    key: str = "",
    shadow: bool = False,
) -> Limit:
    return Limit(gateway, model, *cell, amount, key, shadow)


def test_every_cell_is_kept_and_comes_back_in_parts(db: Database) -> None:
    cells: dict[Cell, Amount] = {
        (unit, window): Decimal(number) / 8 if unit is Unit.COST else number
        for number, (unit, window) in enumerate(COLUMNS)
    }

    async def work(at: Opened) -> None:
        user = await anna(at)
        assert (await put(at, "anna", cells)).amounts == cells
        assert set(await limits_of(at.store, user)) == {
            a_limit((unit, window), int(amount * unit.parts))
            for (unit, window), amount in cells.items()
        }

    on(db, work)


@pytest.mark.parametrize("amount", ["0", "0.000000001", "999999.999999999", "1000000", "12.50"])
def test_an_amount_of_money_is_kept_to_its_last_digit(db: Database, amount: str) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        assert (await put(at, "anna", {COST: Decimal(amount)})).amounts == {COST: Decimal(amount)}
        (limit,) = await limits_of(at.store, user)
        assert Decimal(limit.amount) / 10**9 == Decimal(amount)

    on(db, work)


def test_the_largest_amounts_are_those_that_counters_hold(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        for unit, window in COLUMNS:
            largest = 10**15 // unit.parts
            await put(at, "anna", {(unit, window): largest})
            with pytest.raises(UsageError, match=f"from 0 to {largest}, not {largest + 1}"):
                await put(at, "anna", {(unit, window): largest + 1})
        assert {limit.amount for limit in await limits_of(at.store, user)} == {10**15}

    on(db, work)


def test_only_the_named_cells_change(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        first = await put(at, "anna", {DAY: 1, HOUR: 2})
        second = await put(at, "anna", {HOUR: 3})
        assert second.amounts == {DAY: 1, HOUR: 3}
        assert second.id == first.id
        assert set(await limits_of(at.store, user)) == {a_limit(DAY, 1), a_limit(HOUR, 3)}

    on(db, work)


def test_own_limits_replace_the_roles_cell_by_cell(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        await put(at, "role:user", {DAY: 100, HOUR: 10})
        await put(at, "role:admin", {DAY: 7})
        await put(at, "anna", {DAY: 500})
        await put(at, "anna", {DAY: 5}, gateway="ollama", model="llama*")
        assert set(await limits_of(at.store, user)) == {
            a_limit(DAY, 500),
            a_limit(HOUR, 10),
            a_limit(DAY, 5, gateway="ollama", model="llama*"),
        }

    on(db, work)


def test_another_role_brings_other_defaults(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        await put(at, "role:user", {DAY: 100})
        await put(at, "role:operator", {DAY: 200})
        await people.update_user(at.desk(), "anna", role=Role.OPERATOR)
        assert await limits_of(at.store, user) == (a_limit(DAY, 200),)

    on(db, work)


def test_nobody_is_limited_until_somebody_says_so(db: Database) -> None:
    async def work(at: Opened) -> None:
        assert await limits_of(at.store, await anna(at)) == ()
        assert await limits_of(at.store, "nobody") == ()

    on(db, work)


def test_an_unknown_user_gets_no_role_defaults(db: Database) -> None:
    async def work(at: Opened) -> None:
        await put(at, "role:user", {DAY: 100})
        assert await limits_of(at.store, "nobody") == ()

    on(db, work)


def test_unset_returns_to_the_defaults(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        await put(at, "role:user", {DAY: 100})
        await put(at, "anna", {DAY: 1})
        await put(at, "anna", {DAY: 2}, gateway="openai")
        assert (await limits.unset_limits(at.desk(), "anna"))[1] == 2
        assert await limits_of(at.store, user) == (a_limit(DAY, 100),)
        assert (await limits.unset_limits(at.desk(), "anna"))[1] == 0

    on(db, work)


def test_a_keys_limits_stand_beside_its_users(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        key = await a_key(at)
        await people.create_user(at.desk(), "bob", Role.USER)
        await a_key(at, "bob", "phone", seed=2)
        await put(at, "role:user", {DAY: 100})
        await put(at, "anna", {HOUR: 10})
        await put(at, "key:phone", {DAY: 7})
        made = await put(at, "key:laptop", {DAY: 5})
        assert (made.user_id, made.username, made.key_id) == (user, "anna", key)
        assert made.scope == f"key:plm_{a_minted().public_id}"
        assert (await put(at, made.scope, {DAY: 6})).id == made.id
        assert (await put(at, f"key:{key}", {DAY: 6})).id == made.id
        assert set(await limits_of(at.store, user)) == {
            a_limit(DAY, 100),
            a_limit(HOUR, 10),
            a_limit(DAY, 6, key=key),
        }

    on(db, work)


def test_in_the_shadow_the_same_cell_is_another_one(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        real = await put(at, "anna", {DAY: 100})
        trial = await put(at, "anna", {DAY: 50, HOUR: 5}, shadow=True)
        assert (real.shadow, trial.shadow, real.id == trial.id) == (False, True, False)
        assert (await put(at, "anna", {DAY: 60}, shadow=True)).id == trial.id
        assert set(await limits_of(at.store, user)) == {
            a_limit(DAY, 100),
            a_limit(DAY, 60, shadow=True),
            a_limit(HOUR, 5, shadow=True),
        }
        assert (await limits.unset_limits(at.desk(), "anna", shadow=True))[1] == 1
        assert await limits_of(at.store, user) == (a_limit(DAY, 100),)
        with pytest.raises(NotFound, match="anna has no limits"):
            await limits.unset_limits(at.desk(), "anna", shadow=True)

    on(db, work)


def test_unset_without_a_word_takes_the_shadow_along(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        key = await a_key(at)
        for whose in ("anna", "key:laptop"):
            await put(at, whose, {DAY: 1})
            await put(at, whose, {DAY: 1}, shadow=True)
        scope, removed = await limits.unset_limits(at.desk(), "key:laptop")
        assert (scope.user_id, scope.key_id, removed) == (user, key, 2)
        assert set(await limits_of(at.store, user)) == {
            a_limit(DAY, 1),
            a_limit(DAY, 1, shadow=True),
        }
        assert (await limits.unset_limits(at.desk(), "anna"))[1] == 2
        assert await limits_of(at.store, user) == ()

    on(db, work)


def test_unset_takes_the_named_gateway_and_model_only(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        await put(at, "anna", {DAY: 1}, gateway="ollama")
        await put(at, "anna", {DAY: 2}, gateway="ollama", model="llama*")
        await put(at, "anna", {DAY: 3}, gateway="openai")
        await limits.unset_limits(at.desk(), "anna", gateway="ollama", model="llama*")
        await limits.unset_limits(at.desk(), "anna", gateway="openai")
        assert await limits_of(at.store, user) == (a_limit(DAY, 1, gateway="ollama"),)
        with pytest.raises(NotFound, match="anna has no limits"):
            await limits.unset_limits(at.desk(), "anna", gateway="openai")

    on(db, work)


def test_a_users_list_shows_the_roles_defaults_too(db: Database) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        await people.create_user(at.desk(), "bob", Role.ADMIN)
        for whose in ("anna", "bob", "role:user", "role:admin"):
            await put(at, whose, {CALLS: 1})

        async def scopes(whose: str | None) -> set[str]:
            return {policy.scope for policy in await limits.list_limits(at.engine, whose)}

        assert await scopes("anna") == {"anna", "role:user"}
        assert await scopes("role:admin") == {"role:admin"}
        assert await scopes(None) == {"anna", "bob", "role:user", "role:admin"}

    on(db, work)


def test_limits_are_listed_with_all_that_counts_for_the_same_calls(db: Database) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        await people.create_user(at.desk(), "bob", Role.ADMIN)
        for number, (who, name) in enumerate((("anna", "a1"), ("anna", "a2"), ("bob", "b1"))):
            await a_key(at, who, name, seed=number + 1)
        for whose in ("key:b1", "key:a2", "key:a1", "bob", "anna", "role:user", "role:admin"):
            await put(at, whose, {CALLS: 1})

        async def scopes(whose: str | None) -> list[str]:
            policies = await limits.list_limits(at.engine, whose)
            return [each.key_name or each.scope for each in policies]

        assert await scopes("anna") == ["role:user", "anna", "a1", "a2"]
        assert await scopes("key:a2") == ["role:user", "anna", "a2"]
        assert await scopes("role:user") == ["role:user"]
        assert await scopes(None) == [
            *("role:admin", "role:user", "anna", "a1", "a2", "bob", "b1"),
        ]

    on(db, work)


def test_limits_and_grants_go_with_their_user(db: Database) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        await a_key(at)
        await put(at, "anna", {DAY: 1})
        await put(at, "key:laptop", {DAY: 1})
        await grants.grant(at.desk(), "anna", Unit.TOKENS, 5, until=TOMORROW)
        await people.delete_user(at.desk(), "anna")
        assert await limits.list_limits(at.engine) == []
        assert await grants.list_grants(at.engine) == []

    on(db, work)


@pytest.mark.parametrize(
    ("whose", "amounts", "where", "error", "complaint"),
    [
        ("ghost", {DAY: 1}, {}, NotFound, "no user 'ghost'"),
        ("role:boss", {DAY: 1}, {}, NotFound, "no role 'boss': the roles are admin"),
        ("anna", {}, {}, UsageError, "at least one limit"),
        ("anna", {DAY: -1}, {}, UsageError, "from 0 to"),
        ("anna", {DAY: 10**15 + 1}, {}, UsageError, "from 0 to"),
        ("anna", {COST: Decimal("-0.01")}, {}, UsageError, "from 0 to 1000000, not -0.01"),
        ("anna", {COST: Decimal("NaN")}, {}, UsageError, "from 0 to 1000000, not NaN"),
        ("anna", {COST: Decimal("Infinity")}, {}, UsageError, "from 0 to 1000000"),
        ("anna", {COST: Decimal("1E+99")}, {}, UsageError, "from 0 to 1000000"),
        ("anna", {COST: Decimal("0.0000000001")}, {}, UsageError, "at most 9 decimals"),
        ("anna", {DAY: Decimal("1.5")}, {}, UsageError, "whole number"),
        ("key:ghost", {DAY: 1}, {}, NotFound, "no key 'ghost'"),
        ("key:twice", {DAY: 1}, {}, Conflict, "2 keys are named 'twice'"),
        ("anna", {DAY: 1}, {"gateway": "grok"}, UsageError, "no gateway 'grok'"),
        ("anna", {DAY: 1}, {"model": "a*b"}, UsageError, "only at the end"),
        ("anna", {DAY: 1}, {"model": ""}, UsageError, "1 to 255"),
    ],
)
def test_a_limit_that_nobody_could_mean_is_refused(
    db: Database,
    whose: str,
    amounts: dict[Cell, Amount],
    where: dict[str, str],
    error: type[Exception],
    complaint: str,
) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        await a_key(at, name="twice", seed=1)
        await a_key(at, name="twice", seed=2)
        with pytest.raises(error, match=complaint):
            await put(
                at, whose, amounts, gateway=where.get("gateway", "*"), model=where.get("model", "*")
            )
        assert await limits.list_limits(at.engine) == []

    on(db, work)


# Grants


@pytest.mark.parametrize(
    ("unit", "amount", "parts"),
    [
        (Unit.TOKENS, 200_000, 200_000),
        (Unit.REQUESTS, 1, 1),
        (Unit.COMPUTE_SECONDS, 90, 90_000),
        (Unit.COST, Decimal("2.500000001"), 2_500_000_001),
    ],
)
def test_a_grant_is_kept_and_comes_back_in_parts(
    db: Database, unit: Unit, amount: Amount, parts: int
) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        made = await grants.grant(
            at.desk(),
            "anna",
            unit,
            amount,
            until=TOMORROW,
            gateway="ollama",
            model="llama*",
        )
        assert (made.username, made.unit, made.amount) == ("anna", unit, amount)
        assert await grants.list_grants(at.engine, "anna") == [made]
        assert (await policy_of(at.store, user)).grants == (
            Grant(
                made.id,
                "ollama",
                "llama*",
                unit,
                parts,
                created_at=NOW.timestamp(),
                expires_at=TOMORROW.timestamp(),
            ),
        )

    on(db, work)


def test_grants_add_up_and_are_taken_back_one_by_one(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        await people.create_user(at.desk(), "bob", Role.USER)
        late = await grants.grant(at.desk(), "anna", Unit.TOKENS, 1, until=TOMORROW + timedelta(1))
        soon = await grants.grant(at.desk(), user, Unit.TOKENS, 2, until=TOMORROW)
        bobs = await grants.grant(at.desk(), "bob", Unit.REQUESTS, 3, until=TOMORROW)
        assert await grants.list_grants(at.engine) == [soon, late, bobs]
        assert await grants.list_grants(at.engine, after=TOMORROW) == [late]
        assert await grants.list_grants(at.engine, "bob", after=TOMORROW) == []
        assert [each.id for each in (await policy_of(at.store, user)).grants] == [soon.id, late.id]
        assert await grants.revoke_grant(at.desk(), soon.id.upper()) == soon
        assert await grants.list_grants(at.engine, "anna") == [late]
        for gone in (soon.id, NOBODY, "anna"):
            with pytest.raises(NotFound, match="there is no grant"):
                await grants.revoke_grant(at.desk(), gone)

    on(db, work)


_GIVEN = {"who": "anna", "unit": Unit.TOKENS, "amount": 1, "until": TOMORROW}


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"until": NOW}, UsageError, "cannot end in the past: 2026-03-01T12:00:00"),
        ({"until": NOW - timedelta(1)}, UsageError, "cannot end in the past"),
        ({"amount": 0}, UsageError, "grants nothing"),
        ({"amount": -1}, UsageError, "from 0 to"),
        ({"amount": 10**15 + 1}, UsageError, "from 0 to"),
        ({"unit": Unit.COST, "amount": Decimal("0.00")}, UsageError, "grants nothing"),
        ({"unit": Unit.COST, "amount": Decimal("0.0000000001")}, UsageError, "9 decimals"),
        ({"unit": Unit.CONCURRENT}, UsageError, "at once cannot be granted"),
        ({"who": "ghost"}, NotFound, "no user 'ghost'"),
        ({"who": "role:user"}, NotFound, "no user 'role:user'"),
        ({"gateway": "grok"}, UsageError, "no gateway 'grok'"),
        ({"model": "a*b"}, UsageError, "only at the end"),
    ],
)
def test_a_grant_that_nobody_could_mean_is_refused(
    db: Database, change: dict[str, object], error: type[Exception], complaint: str
) -> None:
    given: dict[str, Any] = _GIVEN | change

    async def work(at: Opened) -> None:
        await anna(at)
        with pytest.raises(error, match=complaint):
            await grants.grant(
                at.desk(),
                given.pop("who"),
                given.pop("unit"),
                given.pop("amount"),
                **given,
            )
        assert await grants.list_grants(at.engine) == []

    on(db, work)


def test_a_limit_says_since_when_it_is_set(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        await put(at, "role:user", {DAY: 100})
        later = NOW + timedelta(seconds=90)
        await limits.set_limits(at.desk(later), "anna", gateway="*", model="*", amounts={HOUR: 5})
        since = {each.window: each.set_at for each in (await policy_of(at.store, user)).limits}
        assert since == {Window.DAY: NOW.timestamp(), Window.HOUR: later.timestamp()}

    on(db, work)
