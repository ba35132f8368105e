"""Whose token is it, and is it good? Every claim, and what is remembered for how long."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from authz.bearers import Bearers
from authz.decide import INVALID_TOKEN, STRANGER, Deny
from authz.keyring import Keyring
from parallama import keys
from parallama.changes import Change
from parallama.db.accounts import Account, Credential, Holder, KeyRecord, TokenRecord
from parallama.errors import Unavailable
from parallama.roles import permissions
from tests.authz.make import ACCOUNT, NOW
from tests.authz.tokens import (
    AUDIENCE,
    THEM,
    US,
    a_token,
    an_issuer,
    trusting,
)

ALGORITHMS = ("RS256", "ES256", "EdDSA")


class People:
    """Who holds tokens, and how often that was asked."""

    def __init__(self, holder: Holder | None = None) -> None:
        self.holder = holder or Holder(account=ACCOUNT)
        self.asked = 0
        self.away = False

    async def __call__(self, subject: str, _: Mapping[str, Any]) -> Holder | None:
        self.asked += 1
        if self.away:
            raise Unavailable("the database is away")
        return self.holder if subject == self.holder.account.id else None


def keyring_of(bearers: Bearers) -> Keyring:
    async def no_key(_: str) -> KeyRecord | None:
        raise AssertionError("a token was looked up as a key")

    return Keyring(no_key, bearers, size=100)


def found(text: str, bearers: Bearers | None = None) -> Credential | Deny:
    return asyncio.run(keyring_of(bearers or trusting(an_issuer())).find(text))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_good_token_is_its_users(algorithm: str) -> None:
    record = found(a_token(algorithm=algorithm), trusting(an_issuer(algorithm)))
    assert record == TokenRecord(
        id="token-1", issuer=US, account=ACCOUNT, issued_at=NOW, expires_at=NOW + 1800 + 30
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"iss": THEM},
        {"iss": None},
        {"iss": [US]},
        {"iss": US + "/"},
        {"iss": US.upper()},
        {"aud": "other"},
        {"aud": None},
        {"aud": AUDIENCE.upper()},
        {"aud": AUDIENCE + " "},
        {"aud": []},
        {"aud": ["other"]},
        {"aud": {"parallama": 1}},
        {"aud": [["parallama"]]},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "user-2"},
        {"sub": "' OR 1=1 --"},
        {"exp": None},
        {"exp": int(NOW) - 30},
        {"exp": str(int(NOW) + 1800)},
        {"exp": True},
        {"exp": 10**30},
        {"nbf": int(NOW) + 31},
        {"nbf": "0"},
        {"nbf": -1},
        {"iat": None},
        {"iat": int(NOW) + 31},
        {"iat": 10**30},
    ],
    ids=str,
)
def test_a_claim_that_is_not_right_is_not_accepted(fields: dict[str, Any]) -> None:
    assert found(a_token(**fields)) is INVALID_TOKEN


@pytest.mark.parametrize(
    "fields",
    [
        {"aud": [AUDIENCE, "other"]},
        {"exp": int(NOW) - 29},
        {"nbf": int(NOW) + 30},
        {"nbf": None},
        {"iat": NOW - 0.5},
    ],
    ids=str,
)
def test_what_the_clocks_may_differ_and_what_may_be_left_out_is_accepted(
    fields: dict[str, Any],
) -> None:
    assert isinstance(found(a_token(**fields)), TokenRecord)


@pytest.mark.parametrize(
    "header",
    [
        {"typ": None},
        {"typ": "JWT"},
        {"typ": "rt+jwt"},
        {"kid": "RS256-1"},
        {"kid": "../RS256-0"},
        {"kid": "RS256-0\r\nx-parallama-user: 1"},
    ],
    ids=str,
)
def test_a_header_that_is_not_right_is_not_accepted(header: dict[str, Any]) -> None:
    assert found(a_token(header=header)) is INVALID_TOKEN


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_the_configured_algorithms_are_accepted(algorithm: str) -> None:
    """Also where the key is a good one of the issuer's."""
    both = an_issuer(*ALGORITHMS)
    others = frozenset(ALGORITHMS) - {algorithm}
    pinned = trusting(type(both)(**{**fields_of(both), "algorithms": others}))
    assert found(a_token(algorithm=algorithm), pinned) is INVALID_TOKEN


def fields_of(issuer: Any) -> dict[str, Any]:
    return {name: getattr(issuer, name) for name in issuer.__dataclass_fields__}


def test_a_token_counts_for_the_issuer_whose_key_signed_it() -> None:
    """Two that are both trusted, with keys of the same name."""
    us, them = an_issuer(), an_issuer("ES256", name=THEM)
    bearers = trusting(us, them)
    assert isinstance(found(a_token(), bearers), TokenRecord)
    assert isinstance(found(a_token(algorithm="ES256", iss=THEM), bearers), TokenRecord)
    assert found(a_token(iss=THEM), bearers) is INVALID_TOKEN
    assert found(a_token(algorithm="ES256"), bearers) is INVALID_TOKEN


def test_who_is_nobody_here_is_told_only_where_somebody_else_vouches() -> None:
    token = a_token(sub="user-2")
    assert found(token, trusting(an_issuer())) is INVALID_TOKEN
    assert found(token, trusting(an_issuer(outside=True))) is STRANGER


def test_a_revoked_token_is_not_accepted() -> None:
    people = People(Holder(account=ACCOUNT, revoked=frozenset({"token-1"})))
    bearers = trusting(an_issuer(find_holder=people))
    assert found(a_token(), bearers) is INVALID_TOKEN
    assert isinstance(found(a_token(jti="token-2"), bearers), TokenRecord)


def test_a_token_from_before_all_were_revoked_is_not_accepted() -> None:
    account = Account(ACCOUNT.id, "anna", "user", ACCOUNT.permissions, tokens_valid_from=NOW - 5)
    bearers = trusting(an_issuer(find_holder=People(Holder(account=account))))
    assert found(a_token(iat=NOW - 6), bearers) is INVALID_TOKEN
    assert isinstance(found(a_token(iat=NOW - 5), bearers), TokenRecord)


def test_a_token_without_an_id_has_one_that_does_not_change_with_its_signature() -> None:
    """An ES256 signature can be written in two ways, and each signing gives another one."""
    bearers = trusting(an_issuer("ES256"))
    first, second = (found(a_token(algorithm="ES256", jti=None), bearers) for _ in range(2))
    assert isinstance(first, TokenRecord)
    assert first == second
    assert len(first.id) == 64


def test_scopes_bound_what_a_token_permits() -> None:
    bound = permissions(["models:read"])
    people = People(Holder(account=ACCOUNT, scopes=bound))
    record = found(a_token(), trusting(an_issuer(find_holder=people)))
    assert isinstance(record, TokenRecord)
    assert record.scopes == bound


# What is remembered.


def test_the_second_call_asks_nobody() -> None:
    people = People()
    keyring = keyring_of(trusting(an_issuer(find_holder=people)))

    async def story() -> None:
        assert keyring.at_once(a_token()) is None
        first = await keyring.find(a_token())
        assert keyring.at_once(a_token()) == first
        assert keyring.at_once(a_token(jti="another")) != first
        assert people.asked == 1
        assert keys.digest(a_token()) in keyring._cache._known

    asyncio.run(story())


def test_a_token_is_remembered_by_all_of_it() -> None:
    keyring = keyring_of(trusting(an_issuer()))

    async def story() -> None:
        await keyring.find(a_token())
        assert isinstance(keyring.at_once(a_token()), TokenRecord)
        wrong = a_token()[:-6] + "AAAAAA"
        assert keyring.at_once(wrong) is INVALID_TOKEN
        assert await keyring.find(wrong) is INVALID_TOKEN

    asyncio.run(story())


@pytest.mark.parametrize(
    ("change", "asked_again", "verified_again"),
    [
        (Change("token", "token-1"), True, True),
        (Change("token", "another"), True, False),
        (Change("user", ACCOUNT.id), True, True),
        (Change("user", "user-2"), False, False),
        (Change("key", "key-1"), False, False),
        (Change("limits", ACCOUNT.id), False, False),
        (Change("everything"), True, True),
    ],
    ids=str,
)
def test_a_change_is_forgotten_where_it_belongs(
    change: Change, asked_again: bool, verified_again: bool
) -> None:
    people = People()
    keyring = keyring_of(trusting(an_issuer(find_holder=people)))

    async def story() -> None:
        await keyring.find(a_token())
        keyring.at_once(a_token())
        keyring.on_change(change)
        assert (keys.digest(a_token()) not in keyring._cache._known) is verified_again
        await keyring.find(a_token(jti="token-3"))
        assert (people.asked == 2) is asked_again

    asyncio.run(story())


def test_a_token_revoked_before_it_was_first_seen_here_is_not_accepted() -> None:
    """Its user is remembered, from another token; the signal names a token that nobody knows."""
    people = People()
    keyring = keyring_of(trusting(an_issuer(find_holder=people)))

    async def story() -> None:
        await keyring.find(a_token(jti="another"))
        people.holder = Holder(account=ACCOUNT, revoked=frozenset({"token-1"}))
        keyring.on_change(Change("token", "token-1"))
        assert keyring.at_once(a_token()) is None
        assert await keyring.find(a_token()) is INVALID_TOKEN
        assert keyring.at_once(a_token()) is INVALID_TOKEN

    asyncio.run(story())


def test_without_the_signal_nothing_is_remembered() -> None:
    people = People()
    keyring = keyring_of(trusting(an_issuer(find_holder=people)))

    async def story() -> None:
        await keyring.find(a_token())
        keyring.at_once(a_token())
        keyring.pause()
        assert keyring.at_once(a_token()) is None
        await keyring.find(a_token())
        assert keyring.at_once(a_token()) is None
        keyring.resume()
        await keyring.find(a_token())
        assert keyring.at_once(a_token()) is not None

    asyncio.run(story())


def test_a_withdrawn_key_ends_what_was_verified_with_it() -> None:
    keyring = keyring_of(trusting(an_issuer(), an_issuer("ES256", name=THEM)))
    theirs = a_token(algorithm="ES256", iss=THEM)

    async def story() -> None:
        for token in (a_token(), theirs):
            await keyring.find(token)
            assert keyring.at_once(token) is not None
        keyring.forget_tokens_of(THEM)
        assert keys.digest(theirs) not in keyring._cache._known
        assert keys.digest(a_token()) in keyring._cache._known

    asyncio.run(story())


def test_a_database_that_is_away_is_said() -> None:
    people = People()
    people.away = True
    with pytest.raises(Unavailable):
        found(a_token(), trusting(an_issuer(find_holder=people)))
