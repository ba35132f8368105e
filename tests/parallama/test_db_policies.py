"""Limits on a real database."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from parallama.db.manage import limits, people
from parallama.db.manage.limits import Policy
from parallama.db.policies import COLUMNS, Cell, limits_of
from parallama.errors import NotFound, UsageError
from parallama.limits import Limit, Unit, Window
from parallama.roles import Role
from tests.parallama.db_on_disk import NOW, Opened, on

DAY: Cell = (Unit.TOKENS, Window.DAY)
HOUR: Cell = (Unit.TOKENS, Window.HOUR)
CALLS: Cell = (Unit.REQUESTS, Window.MINUTE)


async def anna(at: Opened) -> str:
    return (await people.create_user(at.engine, "anna", Role.USER, now=NOW)).id


async def put(
    at: Opened,
    whose: str,
    amounts: Mapping[Cell, int],
    *,
    gateway: str = "*",
    model: str = "*",
) -> Policy:
    return await limits.set_limits(
        at.engine, whose, gateway=gateway, model=model, amounts=amounts, now=NOW
    )


def a_limit(cell: Cell, amount: int, *, gateway: str = "*", model: str = "*") -> Limit:
    return Limit(gateway, model, *cell, amount)


def test_every_cell_is_kept_and_comes_back(tmp_path: Path) -> None:
    cells = {cell: number for number, cell in enumerate(COLUMNS)}

    async def work(at: Opened) -> None:
        user = await anna(at)
        assert (await put(at, "anna", cells)).amounts == cells
        assert set(await limits_of(at.store, user)) == {
            a_limit(cell, amount) for cell, amount in cells.items()
        }

    assert len(cells) == len(Unit) * len(Window)
    on(tmp_path, work)


def test_only_the_named_cells_change(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        first = await put(at, "anna", {DAY: 1, HOUR: 2})
        second = await put(at, "anna", {HOUR: 3})
        assert second.amounts == {DAY: 1, HOUR: 3}
        assert second.id == first.id
        assert set(await limits_of(at.store, user)) == {a_limit(DAY, 1), a_limit(HOUR, 3)}

    on(tmp_path, work)


def test_own_limits_replace_the_roles_cell_by_cell(tmp_path: Path) -> None:
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

    on(tmp_path, work)


def test_another_role_brings_other_defaults(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        await put(at, "role:user", {DAY: 100})
        await put(at, "role:operator", {DAY: 200})
        await people.update_user(at.engine, "anna", now=NOW, role=Role.OPERATOR)
        assert await limits_of(at.store, user) == (a_limit(DAY, 200),)

    on(tmp_path, work)


def test_nobody_is_limited_until_somebody_says_so(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        assert await limits_of(at.store, await anna(at)) == ()
        assert await limits_of(at.store, "nobody") == ()

    on(tmp_path, work)


def test_an_unknown_user_gets_no_role_defaults(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        await put(at, "role:user", {DAY: 100})
        assert await limits_of(at.store, "nobody") == ()

    on(tmp_path, work)


def test_unset_returns_to_the_defaults(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        await put(at, "role:user", {DAY: 100})
        await put(at, "anna", {DAY: 1})
        await put(at, "anna", {DAY: 2}, gateway="openai")
        assert (await limits.unset_limits(at.engine, "anna"))[1] == 2
        assert await limits_of(at.store, user) == (a_limit(DAY, 100),)
        assert (await limits.unset_limits(at.engine, "anna"))[1] == 0

    on(tmp_path, work)


def test_unset_takes_the_named_gateway_and_model_only(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        await put(at, "anna", {DAY: 1}, gateway="ollama")
        await put(at, "anna", {DAY: 2}, gateway="ollama", model="llama*")
        await put(at, "anna", {DAY: 3}, gateway="openai")
        await limits.unset_limits(at.engine, "anna", gateway="ollama", model="llama*")
        await limits.unset_limits(at.engine, "anna", gateway="openai")
        assert await limits_of(at.store, user) == (a_limit(DAY, 1, gateway="ollama"),)
        with pytest.raises(NotFound, match="anna has no limits"):
            await limits.unset_limits(at.engine, "anna", gateway="openai")

    on(tmp_path, work)


def test_a_users_list_shows_the_roles_defaults_too(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        await people.create_user(at.engine, "bob", Role.ADMIN, now=NOW)
        for whose in ("anna", "bob", "role:user", "role:admin"):
            await put(at, whose, {CALLS: 1})

        async def scopes(whose: str | None) -> set[str]:
            return {policy.scope for policy in await limits.list_limits(at.engine, whose)}

        assert await scopes("anna") == {"anna", "role:user"}
        assert await scopes("role:admin") == {"role:admin"}
        assert await scopes(None) == {"anna", "bob", "role:user", "role:admin"}

    on(tmp_path, work)


@pytest.mark.parametrize(
    ("whose", "amounts", "where", "error", "complaint"),
    [
        ("ghost", {DAY: 1}, {}, NotFound, "no user 'ghost'"),
        ("role:boss", {DAY: 1}, {}, NotFound, "no role 'boss': the roles are admin"),
        ("anna", {}, {}, UsageError, "at least one limit"),
        ("anna", {DAY: -1}, {}, UsageError, "from 0 to"),
        ("anna", {DAY: 10**15 + 1}, {}, UsageError, "from 0 to"),
        ("anna", {DAY: 1}, {"gateway": "grok"}, UsageError, "no gateway 'grok'"),
        ("anna", {DAY: 1}, {"model": "a*b"}, UsageError, "only at the end"),
        ("anna", {DAY: 1}, {"model": ""}, UsageError, "1 to 255"),
    ],
)
def test_a_limit_that_nobody_could_mean_is_refused(
    tmp_path: Path,
    whose: str,
    amounts: dict[Cell, int],
    where: dict[str, str],
    error: type[Exception],
    complaint: str,
) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        with pytest.raises(error, match=complaint):
            await put(at, whose, amounts, **where)
        assert await limits.list_limits(at.engine) == []

    on(tmp_path, work)
