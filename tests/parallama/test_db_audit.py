"""The audit log on a real database: each change leaves its record, and none is ever lost."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import delete, text, update
from sqlalchemy.exc import DBAPIError

from parallama.config import Database
from parallama.db.manage import audit, credentials, grants, limits, people, prices, roles
from parallama.db.manage.tables import audit_log
from parallama.desk import Actor, plain
from parallama.errors import Conflict, ParallamaError
from parallama.limits import Unit, Window
from parallama.prices import Price
from tests.parallama.db_on_disk import NOW, Opened, a_minted, on

LATER = NOW + timedelta(days=1)
ALICE = Actor("alice", "api", "7c1f2c1e-0000-4000-8000-00000000000a", "10.1.2.3", "r-1")


async def entries(at: Opened, which: audit.Which = audit.Which()) -> list[audit.Entry]:  # noqa: B008
    return [entry async for entry in audit.entries(at.engine, which)]


def test_every_change_says_who_when_what_before_and_after(db: Database) -> None:
    async def work(at: Opened) -> None:
        desk = replace(at.desk(), by=ALICE)
        user = await people.create_user(desk, "anna")
        after = await people.update_user(desk, "anna", role="operator")
        created, updated = await entries(at)
        assert (created.action, created.before, created.after) == (
            "users.create",
            None,
            plain(user),
        )
        assert (updated.action, updated.before, updated.after) == (
            "users.update",
            plain(user),
            plain(after),
        )
        for entry in (created, updated):
            assert (entry.subject, entry.subject_id) == ("anna", user.id)
            assert (entry.at, entry.actor, entry.actor_id) == (NOW, ALICE.name, ALICE.id)
            assert (entry.via, entry.address, entry.request_id) == ("api", "10.1.2.3", "r-1")

    on(db, work)


async def _everything(at: Opened) -> None:
    desk = at.desk()
    await people.create_user(desk, "anna")
    await people.update_user(desk, "anna", username="anne")
    await people.disable_user(desk, "anne")
    await people.enable_user(desk, "anne")
    await credentials.create_key(desk, "anne", a_minted(1), name="laptop")
    await credentials.update_key(desk, "laptop", models=["llama*"])
    await credentials.rotate_key(desk, "laptop", a_minted(2), grace=timedelta(hours=1))
    await credentials.revoke_key(desk, "laptop")
    day = {(Unit.COST, Window.DAY): Decimal("1.5")}
    await limits.set_limits(desk, "anne", gateway="*", model="*", amounts=day)
    await limits.unset_limits(desk, "anne")
    granted = await grants.grant(desk, "anne", Unit.TOKENS, 5, until=LATER)
    await grants.revoke_grant(desk, granted.id)
    await prices.set_price(desk, Price("llama3", Decimal(1), Decimal(2)))
    await prices.unset_price(desk, "llama3")
    await roles.create_role(desk, "tester", ["audit:read"])
    await roles.update_role(desk, "tester", description="reads")
    await roles.delete_role(desk, "tester")
    await people.delete_user(desk, "anne")


ACTIONS = [
    *("users.create", "users.update", "users.disable", "users.enable"),
    *("keys.create", "keys.update", "keys.rotate", "keys.revoke"),
    *("limits.set", "limits.unset", "grants.create", "grants.revoke"),
    *("prices.set", "prices.unset"),
    *("roles.create", "roles.update", "roles.delete", "users.delete"),
]


def test_no_change_goes_without_its_record_and_none_shows_a_secret(db: Database) -> None:
    async def work(at: Opened) -> None:
        await _everything(at)
        made = await entries(at)
        assert [entry.action for entry in made] == ACTIONS
        for minted in (a_minted(1), a_minted(2)):
            for secret in (minted.token, minted.secret_hash, minted.token[18:]):
                assert secret not in repr(made)

    on(db, work)


def test_what_is_undone_leaves_no_record(db: Database) -> None:
    async def work(at: Opened) -> None:
        desk = at.desk()
        await people.create_user(desk, "anna")
        with pytest.raises(Conflict):
            await people.create_user(desk, "anna")
        with pytest.raises(ParallamaError):
            await people.update_user(desk, "anna", more_roles=["nobody-knows"])
        assert len(await entries(at)) == 1
        assert desk.changes == []

    on(db, work)


@pytest.mark.parametrize(
    "command",
    [
        update(audit_log).values(actor="nobody"),
        delete(audit_log),
        delete(audit_log).where(audit_log.c.id == 1),
    ],
)
def test_the_database_itself_refuses_to_rewrite_it(db: Database, command: object) -> None:
    async def work(at: Opened) -> None:
        await people.create_user(at.desk(), "anna")
        with pytest.raises(DBAPIError, match="append-only"):
            async with at.engine.begin() as connection:
                await connection.execute(command)  # type: ignore[call-overload]
        (entry,) = await entries(at)
        assert entry.actor == "tester"

    on(db, work)


def test_entries_are_chosen_and_read_in_pages(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_PAGE", 4)

    async def work(at: Opened) -> None:
        await _everything(at)
        await people.create_user(replace(at.desk(LATER), by=ALICE), "bob")
        whole = await entries(at)
        assert [entry.action for entry in whole] == [*ACTIONS, "users.create"]
        chosen = [
            (audit.Which(action="keys"), 4),
            (audit.Which(action="keys.rotate"), 1),
            (audit.Which(action="key"), 0),
            (audit.Which(actor="alice"), 1),
            (audit.Which(actor=ALICE.id), 1),
            (audit.Which(subject="bob"), 1),
            (audit.Which(since=LATER), 1),
            (audit.Which(until=LATER), len(ACTIONS)),
        ]
        for which, count in chosen:
            assert len(await entries(at, which)) == count, which
        newest = audit.entries(at.engine, audit.Which(), newest_first=True, limit=6)
        assert [entry async for entry in newest] == whole[::-1][:6]
        beyond = audit.entries(at.engine, audit.Which(), after=whole[2].id, limit=5)
        assert [entry async for entry in beyond] == whole[3:8]

    on(db, work)


def test_text_is_not_a_command(db: Database) -> None:
    async def work(at: Opened) -> None:
        odd = "x'); DROP TABLE audit_log; --"
        assert await entries(at, audit.Which(actor=odd, subject=odd, action=odd)) == []
        async with at.engine.connect() as connection:
            await connection.execute(text("SELECT count(*) FROM audit_log"))

    on(db, work)
