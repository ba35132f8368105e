"""Users and keys on a real database."""

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import pytest

from parallama import keys
from parallama.config import Database
from parallama.db.accounts import Account, KeyRecord, find_account, find_key
from parallama.db.manage import credentials, limits, people, roles
from parallama.db.store import Store, Values
from parallama.errors import Conflict, NotFound, UsageError
from parallama.limits import Unit, Window
from parallama.roles import BUILT_IN, Role, permissions
from tests.parallama.db_on_disk import NOW, Opened, a_minted, on

LATER = NOW + timedelta(hours=1)
NOBODY = "7c1f2c1e-0000-4000-8000-000000000000"


async def anna(at: Opened, role: Role = Role.USER) -> people.User:
    return await people.create_user(at.desk(), "anna", role)


def test_a_user_is_found_by_name_and_by_id(db: Database) -> None:
    async def work(at: Opened) -> None:
        made = await anna(at)
        assert await people.get_user(at.engine, "anna") == made
        assert await people.get_user(at.engine, made.id.upper()) == made
        assert made.created_at == NOW
        with pytest.raises(NotFound, match="'Anna'"):
            await people.get_user(at.engine, "Anna")
        with pytest.raises(NotFound, match=NOBODY):
            await people.get_user(at.engine, NOBODY)

    on(db, work)


def test_a_name_is_taken_once_also_by_two_at_the_same_time(db: Database) -> None:
    async def work(at: Opened) -> None:
        made = await asyncio.gather(anna(at), anna(at), return_exceptions=True)
        assert {type(each) for each in made} == {Conflict, people.User}
        assert len(await people.list_users(at.engine)) == 1

    on(db, work)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a b",
        "a\tb",
        "a:b",
        "role:user",
        "a\nb",
        "a\x1b[2J",
        "a\u200bb",
        "\u00a0",
        "a" * 256,
        NOBODY,
    ],
)
def test_a_name_that_would_confuse_is_refused(db: Database, name: str) -> None:
    async def work(at: Opened) -> None:
        with pytest.raises(UsageError, match="a user name"):
            await people.create_user(at.desk(), name, Role.USER)

    on(db, work)


@pytest.mark.parametrize("name", ["a", "Zoë@example.org", "团队", "o'hara", "a" * 255, "-", "%"])
def test_other_names_are_kept_as_they_are(db: Database, name: str) -> None:
    async def work(at: Opened) -> None:
        await people.create_user(at.desk(), name, Role.USER)
        assert (await people.get_user(at.engine, name)).username == name

    on(db, work)


def test_two_spellings_of_one_accent_are_one_name(db: Database) -> None:
    async def work(at: Opened) -> None:
        await people.create_user(at.desk(), "Zoe\u0308", Role.USER)
        with pytest.raises(Conflict):
            await people.create_user(at.desk(), "Zo\u00eb", Role.USER)
        await people.get_user(at.engine, "Zoe\u0308")

    on(db, work)


def test_update_changes_what_is_given(db: Database) -> None:
    async def work(at: Opened) -> None:
        made = await anna(at)
        changed = await people.update_user(at.desk(LATER), "anna", role=Role.ADMIN)
        assert changed == replace(made, role=Role.ADMIN, updated_at=LATER)
        renamed = await people.update_user(at.desk(LATER), made.id, username="anne")
        assert renamed == replace(changed, username="anne")
        await people.create_user(at.desk(), "bob", Role.USER)
        with pytest.raises(Conflict, match="'bob'"):
            await people.update_user(at.desk(LATER), "anne", username="bob")
        admins = await at.store.read("SELECT username, is_admin FROM users ORDER BY username")
        assert admins == [("anne", True), ("bob", False)]

    on(db, work)


def test_a_key_says_all_that_decides_about_a_request(db: Database) -> None:
    async def work(at: Opened) -> KeyRecord | None:
        user = await anna(at, Role.OPERATOR)
        key = await credentials.create_key(
            at.desk(),
            "anna",
            a_minted(),
            name="laptop",
            expires_at=LATER,
            models=["llama*", "gemma", "gemma"],
            networks=["10.0.0.0/8", "::1"],
            gateways=["ollama"],
            scopes=["models:infer"],
        )
        found = await find_key(at.store, key.public_id)
        assert found == KeyRecord(
            id=key.id,
            public_id=a_minted().public_id,
            secret_hash=found.secret_hash if found else "",
            name="laptop",
            account=Account(user.id, "anna", Role.OPERATOR, BUILT_IN[Role.OPERATOR]),
            expires_at=LATER.timestamp(),
            models=("llama*", "gemma"),
            networks=("10.0.0.0/8", "::1/128"),
            gateways=("ollama",),
            scopes=frozenset({"models:infer"}),
        )
        return found

    found = on(db, work)
    secret = keys.parse(a_minted().token)
    assert found is not None
    assert secret is not None
    assert keys.verify(secret.secret, found.secret_hash)
    assert found.secret_hash not in repr(found)


def test_a_plain_key_is_not_restricted(db: Database) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        await credentials.create_key(at.desk(), "anna", a_minted())
        found = await find_key(at.store, a_minted().public_id)
        assert found is not None
        assert (found.expires_at, found.models, found.networks) == (None, None, None)
        assert await find_key(at.store, "000000000000") is None
        assert await find_key(at.store, "' OR ''='") is None

    on(db, work)


def test_the_secret_is_nowhere_in_the_file(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        await credentials.create_key(at.desk(), "anna", a_minted())

    on(tmp_path, work)
    secret = keys.parse(a_minted().token)
    assert secret is not None
    for file in tmp_path.iterdir():
        assert secret.secret.encode() not in file.read_bytes()


def test_revoking_and_disabling_show_in_the_record(db: Database) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        key = await credentials.create_key(at.desk(), "anna", a_minted())

        async def state() -> tuple[bool, bool]:
            found = await find_key(at.store, key.public_id)
            assert found is not None
            return found.revoked, found.account.disabled

        assert await state() == (False, False)
        await people.disable_user(at.desk(), "anna")
        assert await state() == (False, True)
        await people.enable_user(at.desk(), "anna")
        assert await state() == (False, False)
        revoked = await credentials.revoke_key(at.desk(), key.id)
        assert revoked.revoked_at == NOW
        again = await credentials.revoke_key(at.desk(LATER), key.id)
        assert again.revoked_at == NOW
        assert await state() == (True, False)

    on(db, work)


def test_a_key_goes_by_id_public_part_and_name(db: Database) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        key = await credentials.create_key(at.desk(), "anna", a_minted(), name="my laptop")
        for which in (key.id, key.public_id, f"plm_{key.public_id}", "my laptop"):
            assert await credentials.get_key(at.engine, which) == key
        with pytest.raises(NotFound):
            await credentials.get_key(at.engine, "laptop")

    on(db, work)


def test_a_whole_key_on_a_command_line_is_refused_without_repeating_it(db: Database) -> None:
    async def work(at: Opened) -> None:
        with pytest.raises(UsageError) as raised:
            await credentials.revoke_key(at.desk(), a_minted().token)
        assert a_minted().token not in str(raised.value)
        assert a_minted().public_id in str(raised.value)

    on(db, work)


def test_a_name_of_two_keys_means_the_one_that_still_works(db: Database) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        old = await credentials.create_key(at.desk(), "anna", a_minted(1), name="laptop")
        new = await credentials.create_key(at.desk(), "anna", a_minted(2), name="laptop")
        with pytest.raises(Conflict, match="2 keys are named 'laptop'"):
            await credentials.revoke_key(at.desk(), "laptop")
        await credentials.revoke_key(at.desk(), old.id)
        assert (await credentials.get_key(at.engine, "laptop")).id == new.id

    on(db, work)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"expires_at": NOW}, "in the past"),
        ({"models": []}, "at least one model"),
        ({"models": ["*a"]}, "only at the end"),
        ({"models": [""]}, "1 to 255"),
        ({"models": ["a\x00"]}, "visible"),
        ({"networks": []}, "at least one network"),
        ({"networks": ["10.0.0.1/8"]}, "has host bits set"),
        ({"networks": ["example.org"]}, "not a network"),
        ({"name": ""}, "1 to 255"),
        ({"name": NOBODY}, "look like an id"),
    ],
)
def test_a_key_that_nobody_could_mean_is_refused(
    db: Database, fields: dict[str, Any], complaint: str
) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        with pytest.raises(UsageError, match=complaint):
            await credentials.create_key(at.desk(), "anna", a_minted(), **fields)
        assert await credentials.list_keys(at.engine) == []

    on(db, work)


def test_keys_are_listed_for_all_or_for_one_user(db: Database) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        bob = await people.create_user(at.desk(), "bob", Role.USER)
        await credentials.create_key(at.desk(), "anna", a_minted(1))
        await credentials.create_key(at.desk(LATER), bob.id, a_minted(2))
        assert [key.username for key in await credentials.list_keys(at.engine)] == ["anna", "bob"]
        assert [key.username for key in await credentials.list_keys(at.engine, "bob")] == ["bob"]
        assert await people.count(at.engine) == (2, 2)
        with pytest.raises(NotFound):
            await credentials.list_keys(at.engine, "ghost")

    on(db, work)


def test_deleting_a_user_takes_keys_and_limits_along(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await anna(at)
        await credentials.create_key(at.desk(), "anna", a_minted())
        day = {(Unit.TOKENS, Window.DAY): 1}
        await limits.set_limits(at.desk(), "anna", gateway="*", model="*", amounts=day)
        assert await people.delete_user(at.desk(), "anna") == user
        assert await find_key(at.store, a_minted().public_id) is None
        assert await limits.list_limits(at.engine) == []
        await anna(at)

    on(db, work)


def test_a_user_who_is_deleted_while_we_read_is_gone(db: Database) -> None:
    """Not somebody who may do nothing: that would be another answer to the same key."""

    async def work(at: Opened) -> None:
        made = await anna(at)

        class Interrupted:
            def __init__(self) -> None:
                self.queries = 0

            async def read(self, query: str, values: Values = ()) -> list[tuple[Any, ...]]:
                self.queries += 1
                if self.queries == 2:
                    await people.delete_user(at.desk(), "anna")
                return await at.store.read(query, values)

        assert await find_account(at.store, made.id) is not None
        assert await find_account(cast(Store, Interrupted()), made.id) is None

    on(db, work)


def test_times_come_back_in_utc_whatever_zone_they_had(db: Database) -> None:
    moment = datetime(2026, 7, 1, 1, 30, 0, 1, tzinfo=timezone(timedelta(hours=2)))

    async def work(at: Opened) -> None:
        await people.create_user(at.desk(moment), "anna", Role.USER)
        user = await people.get_user(at.engine, "anna")
        assert user.created_at == moment
        assert user.created_at.utcoffset() == timedelta(0)
        assert await at.store.read("SELECT created_at FROM users") == [(moment,)]

    on(db, work)


def test_sqlite_keeps_times_as_text_that_sorts(tmp_path: Path) -> None:
    async def work(at: Opened) -> None:
        await people.create_user(at.desk(), "anna", Role.USER)

    on(tmp_path, work)
    with closing(sqlite3.connect(tmp_path / "parallama.db")) as connection:
        stored = connection.execute("SELECT created_at FROM users").fetchall()
    assert stored == [("2026-03-01 12:00:00.000000",)]


def test_a_time_without_a_zone_is_a_mistake(db: Database) -> None:
    async def work(at: Opened) -> None:
        with pytest.raises(Exception, match="a time without its zone"):
            await people.create_user(at.desk(NOW.replace(tzinfo=None)), "anna", Role.USER)

    on(db, work)


def test_a_rotated_key_is_one_key_and_the_old_secret_ends_with_the_grace(db: Database) -> None:
    async def work(at: Opened) -> None:
        await anna(at)
        first, second = a_minted(1), a_minted(2)
        made = await credentials.create_key(at.desk(), "anna", first, name="laptop")
        turned = await credentials.rotate_key(
            at.desk(LATER), "laptop", second, grace=timedelta(hours=1)
        )
        assert (turned.id, turned.public_id) == (made.id, second.public_id)
        old = await find_key(at.store, a_minted(1).public_id)
        new = await find_key(at.store, a_minted(2).public_id)
        assert old is not None
        assert new is not None
        assert (old.id, old.secret_hash) == (new.id, first.secret_hash)
        assert (new.secret_hash, new.expires_at) == (second.secret_hash, None)
        assert old.expires_at == (LATER + timedelta(hours=1)).timestamp()
        await credentials.rotate_key(at.desk(LATER), "laptop", a_minted(3), grace=timedelta(0))
        assert await find_key(at.store, a_minted(1).public_id) is None
        await credentials.revoke_key(at.desk(), "laptop")
        for seed in (2, 3):
            found = await find_key(at.store, a_minted(seed).public_id)
            assert found is not None
            assert found.revoked
        with pytest.raises(Conflict, match="revoked"):
            await credentials.rotate_key(at.desk(), "laptop", a_minted(4), grace=timedelta(0))

    on(db, work)


def test_roles_grant_together_and_a_role_that_is_gone_grants_nothing(db: Database) -> None:
    async def work(at: Opened) -> None:
        user = await people.create_user(at.desk(), "anna", Role.READONLY)

        async def granted() -> frozenset[str]:
            account = await find_account(at.store, user.id, roles=desk.roles)
            assert account is not None
            return account.permissions

        desk = replace(at.desk(), roles={**BUILT_IN, "auditor": permissions(["audit:read"])})
        await roles.create_role(desk, "tester", ["models:infer:ollama"])
        changed = await people.update_user(desk, "anna", more_roles=["tester", "auditor"])
        assert changed.more_roles == ("auditor", "tester")
        assert await granted() == BUILT_IN[Role.READONLY] | {"audit:read", "models:infer:ollama"}
        with pytest.raises(Conflict, match="still that of 1 users"):
            await roles.delete_role(desk, "tester")
        desk.roles = BUILT_IN
        assert "audit:read" not in await granted()
        with pytest.raises(NotFound, match="auditor"):
            await people.update_user(desk, "anna", more_roles=["auditor"])
        await people.update_user(desk, "anna", more_roles=[])
        await roles.delete_role(desk, "tester")
        assert await granted() == BUILT_IN[Role.READONLY]

    on(db, work)


def test_a_role_of_the_database_is_told_from_others(db: Database) -> None:
    async def work(at: Opened) -> None:
        for taken in (Role.USER, "tester"):
            if taken == "tester":
                await roles.create_role(at.desk(), "tester", ["audit:*"], description="x")
            with pytest.raises(Conflict, match="already"):
                await roles.create_role(at.desk(), taken, ["audit:read"])
        with pytest.raises(UsageError, match="no permission"):
            await roles.update_role(at.desk(), "tester", granted=["audit:burn"])
        with pytest.raises(Conflict, match="built in"):
            await roles.update_role(at.desk(), Role.ADMIN, granted=[])
        listed = await roles.list_roles(at.engine, BUILT_IN)
        assert [(each.name, each.origin) for each in listed] == [
            *((str(name), "built in") for name in BUILT_IN),
            ("tester", "database"),
        ]

    on(db, work)
