"""Who users are for other issuers: linked by people, and found by authz."""

import pytest

from parallama.config import Database
from parallama.db.accounts import find_identity
from parallama.db.manage import audit, identities, people
from parallama.errors import Conflict, NotFound, UsageError
from parallama.roles import Role
from tests.parallama.commands import Parallama
from tests.parallama.db_on_disk import Opened, on

SSO = "https://sso.test"


def test_a_user_is_linked_found_and_unlinked(db: Database) -> None:
    async def story(at: Opened) -> None:
        user = await people.create_user(at.desk(), "anna", Role.USER)
        desk = at.desk()
        made = await identities.link(desk, "anna", issuer=SSO, subject="s-1")
        assert [(change.kind, change.id) for change in desk.changes] == [("user", user.id)]
        assert await identities.list_identities(at.engine) == [made]
        assert await identities.list_identities(at.engine, "anna") == [made]
        assert await find_identity(at.store, SSO, "s-1") == user.id
        assert await find_identity(at.store, SSO + "/", "s-1") is None
        desk = at.desk()
        assert await identities.unlink(desk, issuer=SSO, subject="s-1") == made
        assert [(change.kind, change.id) for change in desk.changes] == [("user", user.id)]
        assert await find_identity(at.store, SSO, "s-1") is None
        actions = [each.action async for each in audit.entries(at.engine, audit.Which())]
        assert actions == ["users.create", "users.link", "users.unlink"]

    on(db, story)


def test_somebody_is_one_user(db: Database) -> None:
    async def story(at: Opened) -> None:
        for name in ("anna", "ben"):
            await people.create_user(at.desk(), name, Role.USER)
        await identities.link(at.desk(), "anna", issuer=SSO, subject="s-1")
        with pytest.raises(Conflict, match="already"):
            await identities.link(at.desk(), "ben", issuer=SSO, subject="s-1")
        await identities.link(at.desk(), "ben", issuer="https://other.test", subject="s-1")
        assert len(await identities.list_identities(at.engine)) == 2

    on(db, story)


def test_with_the_user_go_all_identities(db: Database) -> None:
    async def story(at: Opened) -> None:
        await people.create_user(at.desk(), "anna", Role.USER)
        await identities.link(at.desk(), "anna", issuer=SSO, subject="s-1")
        await people.delete_user(at.desk(), "anna")
        assert await find_identity(at.store, SSO, "s-1") is None

    on(db, story)


@pytest.mark.parametrize("subject", ["", "a" * 256, "a\n"])
def test_what_no_token_can_say_is_refused(db: Database, subject: str) -> None:
    async def story(at: Opened) -> None:
        await people.create_user(at.desk(), "anna", Role.USER)
        with pytest.raises(UsageError):
            await identities.link(at.desk(), "anna", issuer=SSO, subject=subject)
        with pytest.raises(NotFound):
            await identities.link(at.desk(), "nobody", issuer=SSO, subject="s-1")
        with pytest.raises(NotFound):
            await identities.unlink(at.desk(), issuer=SSO, subject="s-1")

    on(db, story)


def test_commands_link_show_and_unlink(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    which = ("--issuer", SSO, "--subject", "s-1")
    made = cli.json("identities", "add", "anna", *which)
    assert (made["username"], made["issuer"], made["subject"]) == ("anna", SSO, "s-1")
    assert cli.json("identities", "list", "--user", "anna") == [made]
    assert cli.json("identities", "remove", *which) == made
    assert cli.json("identities", "list") == []
    assert "nobody here" in cli.refused(3, "identities", "remove", *which)
