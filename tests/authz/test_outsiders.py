"""People of another issuer: found, made once, and never more than they are here."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from authz.outsiders import Outsiders, roles_of
from parallama.config import Authentication, Database, Issuer
from parallama.db import database
from parallama.db.accounts import find_holder
from parallama.db.manage import audit, people, roles, sessions
from parallama.roles import BUILT_IN, Role, permissions
from tests.authz.make import NOW
from tests.parallama.db_on_disk import Opened, on

SSO = "https://sso.test"
CLAIMS = {"preferred_username": "anna", "groups": ["staff"]}


def settings(**fields: Any) -> Issuer:
    return Issuer.model_validate(
        {
            "issuer": SSO,
            "audience": "parallama",
            "jwks_url": "https://sso.test/jwks",
            "create_users": True,
            **fields,
        }
    )


def of(at: Opened, **fields: Any) -> Outsiders:
    return Outsiders(settings(**fields), at.store, roles=BUILT_IN, clock=lambda: NOW)


async def names(at: Opened) -> list[str]:
    return [user.username for user in await people.list_users(at.engine)]


# Which roles does a token say?

MAPPED = {"role_claim": "groups", "roles": {"ops": "operator", "staff": "user", "x": "operator"}}


@pytest.mark.parametrize(
    ("fields", "claims", "expected"),
    [
        ({}, {}, ("user",)),
        ({"default_role": None}, {}, ()),
        ({"default_role": "readonly"}, {"groups": ["ops"]}, ("readonly",)),
        (MAPPED, {}, ("user",)),
        ({**MAPPED, "default_role": None}, {}, ()),
        ({**MAPPED, "default_role": None}, {"groups": ["Ops", "OPS", "ops "]}, ()),
        ({**MAPPED, "default_role": None}, {"groups": {"ops": True}}, ()),
        ({**MAPPED, "default_role": None}, {"groups": [["ops"], 7, None]}, ()),
        (MAPPED, {"groups": ["staff", "ops", "x"]}, ("operator", "user")),
        (MAPPED, {"groups": "staff ops"}, ("operator", "user")),
        (MAPPED, {"groups": "ops"}, ("operator",)),
        (
            {**MAPPED, "role_claim": "realm_access.roles"},
            {"realm_access": {"roles": ["ops"]}},
            ("operator",),
        ),
        (
            {**MAPPED, "role_claim": "https://x.test/roles"},
            {"https://x.test/roles": ["ops"]},
            ("operator",),
        ),
        ({**MAPPED, "role_claim": "a.b", "default_role": None}, {"a": "b"}, ()),
    ],
    ids=str,
)
def test_roles_are_those_that_the_configuration_names(
    fields: dict[str, Any], claims: Mapping[str, Any], expected: tuple[str, ...]
) -> None:
    assert roles_of(settings(**fields), claims) == expected


# Who is it here?


def test_who_is_not_added_is_nobody(db: Database) -> None:
    async def story(at: Opened) -> None:
        await people.create_user(at.desk(), "anna", Role.ADMIN)
        assert await of(at, create_users=False).find("s-1", CLAIMS) is None
        assert await names(at) == ["anna"]

    on(db, story)


def test_who_comes_first_becomes_a_user_once(db: Database) -> None:
    async def story(at: Opened) -> None:
        holder = await of(at).find("s-1", CLAIMS)
        assert holder is not None
        assert (holder.account.username, holder.account.role) == ("anna", "user")
        assert holder.scopes is None
        again = await of(at).find("s-1", {**CLAIMS, "preferred_username": "renamed"})
        assert again is not None
        assert again.account.id == holder.account.id
        assert await names(at) == ["anna"]

    on(db, story)


def test_it_is_on_record_who_was_made_and_why(db: Database) -> None:
    async def story(at: Opened) -> None:
        holder = await of(at).find("s-1", CLAIMS)
        assert holder is not None
        (record,) = [each async for each in audit.entries(at.engine, audit.Which())]
        assert (record.actor, record.via, record.action) == (SSO, "gateway", "users.create")
        assert (record.subject, record.subject_id) == ("anna", holder.account.id)
        assert record.after == {
            "username": "anna",
            "roles": ["user"],
            "issuer": SSO,
            "subject": "s-1",
        }

    on(db, story)


def test_many_at_once_make_one_user(db: Database) -> None:
    """On two connections, as two replicas do it."""

    async def story(at: Opened) -> None:
        async with database(db) as other:
            apart = Outsiders(settings(), other, roles=BUILT_IN, clock=lambda: NOW)
            found = await asyncio.gather(
                *(each.find("s-1", CLAIMS) for each in (of(at), apart) * 4)
            )
        assert len({holder and holder.account.id for holder in found}) == 1
        assert found[0] is not None
        assert await names(at) == ["anna"]

    on(db, story)


def test_a_name_that_is_taken_is_somebody_elses(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Or else whoever may choose a name at the issuer could choose to be our administrator."""

    async def story(at: Opened) -> None:
        await people.create_user(at.desk(), "anna", Role.ADMIN)
        assert await of(at).find("s-1", CLAIMS) is None
        assert await of(at).find("s-1", CLAIMS) is None
        assert await names(at) == ["anna"]
        assert await of(at).find("s-2", {"preferred_username": "ben"}) is not None
        assert await of(at).find("s-3", {"preferred_username": "ben"}) is None

    on(db, story)
    assert "user not created" in caplog.text


@pytest.mark.parametrize(
    "name", [None, "", "two words", "role:admin", "a" * 256, "x\0", 7, ["anna"], "\ud800"]
)
def test_a_name_that_nobody_can_have_makes_no_user(db: Database, name: Any) -> None:
    async def story(at: Opened) -> None:
        assert await of(at).find("s-1", {"preferred_username": name}) is None
        assert await names(at) == []

    on(db, story)


@pytest.mark.parametrize("subject", ["'; DROP TABLE users; --", "%", "?", "*\r\n", "ü", "a" * 255])
def test_a_subject_is_any_text(db: Database, subject: str) -> None:
    async def story(at: Opened) -> None:
        first = await of(at).find(subject, CLAIMS)
        assert first is not None
        assert await of(at).find(subject, {}) is not None
        assert await of(at, create_users=False).find(subject + "x", {}) is None

    on(db, story)


def test_of_another_issuer_the_same_subject_is_somebody_else(db: Database) -> None:
    async def story(at: Opened) -> None:
        await of(at).find("s-1", CLAIMS)
        other = of(at, issuer="https://other.test")
        assert await other.find("s-1", CLAIMS) is None
        holder = await other.find("s-1", {"preferred_username": "ben"})
        assert holder is not None
        assert holder.account.username == "ben"

    on(db, story)


# What may they do?


def test_a_new_user_has_the_roles_that_the_first_token_said(db: Database) -> None:
    async def story(at: Opened) -> None:
        holder = await of(at, **MAPPED).find("s-1", {**CLAIMS, "groups": ["staff", "ops"]})
        assert holder is not None
        user = await people.get_user(at.engine, "anna")
        assert (user.role, user.more_roles) == ("operator", ("user",))
        assert holder.account.permissions == BUILT_IN[Role.OPERATOR]

    on(db, story)


def test_a_token_permits_what_it_says_and_never_changes_its_user(db: Database) -> None:
    async def story(at: Opened) -> None:
        outsiders = of(at, **MAPPED)
        await outsiders.find("s-1", CLAIMS)
        promoted = await outsiders.find("s-1", {**CLAIMS, "groups": ["ops"]})
        assert promoted is not None
        assert promoted.scopes == BUILT_IN[Role.OPERATOR]
        assert promoted.account.permissions == BUILT_IN[Role.USER]
        assert (await people.get_user(at.engine, "anna")).role == "user"

    on(db, story)


def test_a_role_of_the_database_counts_as_it_is_now(db: Database) -> None:
    async def story(at: Opened) -> None:
        outsiders = of(at, role_claim="groups", roles={"staff": "reader"})
        await roles.create_role(at.desk(), "reader", ["models:read"])
        holder = await outsiders.find("s-1", CLAIMS)
        assert holder is not None
        assert holder.scopes == holder.account.permissions == permissions(["models:read"])
        await roles.update_role(at.desk(), "reader", granted=["usage:read"])
        holder = await outsiders.find("s-1", CLAIMS)
        assert holder is not None
        assert holder.scopes == permissions(["usage:read"])

    on(db, story)


def test_a_role_that_is_gone_grants_nothing(db: Database) -> None:
    async def story(at: Opened) -> None:
        holder = await of(at, role_claim="groups", roles={"staff": "gone"}).find("s-1", CLAIMS)
        assert holder is not None
        assert holder.scopes == holder.account.permissions == frozenset()

    on(db, story)


# Revoked tokens.


def test_revoked_tokens_are_those_of_the_issuer(db: Database) -> None:
    """Of an outside issuer nobody may have known whose they are."""

    async def story(at: Opened) -> None:
        ours = await people.create_user(at.desk(), "ben", Role.USER)
        told = Authentication()
        await sessions.revoke_token(at.desk(), "t-1", told, issuer=SSO)
        await sessions.revoke_token(at.desk(), "t-2", told, issuer="https://other.test")
        await sessions.revoke_token(at.desk(), "t-3", told)
        holder = await of(at).find("s-1", CLAIMS)
        assert holder is not None
        assert holder.revoked == {"t-1"}
        own = await find_holder(at.store, ours.id, told.token_issuer)
        assert own is not None
        assert own.revoked == {"t-3"}
        assert await find_holder(at.store, "nobody", told.token_issuer) is None

    on(db, story)
