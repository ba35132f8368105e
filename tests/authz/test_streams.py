"""Which answers that run are to be cut, as a database knows it."""

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert

from authz.streams import Streams
from authz.watched import SLOT, read_word, watch_word
from parallama.changes import Change
from parallama.config import Database
from parallama.db.accounts import KeyRecord, TokenRecord
from parallama.db.manage import credentials, people
from parallama.db.manage.tables import revoked_tokens
from parallama.db.store import Store
from parallama.desk import Desk
from parallama.errors import Unavailable
from tests.authz.make import ACCOUNT, a_key
from tests.parallama.db_on_disk import NOW, Opened, a_minted, on

LONG_ID = "7c1f2c1e-0000-4000-8000-000000000000"
ISSUER = "https://gateway.example"


def a_token(user: str, *, id: str = "jti-1", issued_at: float = NOW.timestamp()) -> TokenRecord:
    account = replace(ACCOUNT, id=user)
    return TokenRecord(id=id, issuer=ISSUER, issued_at=issued_at, account=account)


def message(*words: str) -> bytes:
    """As streams.wat puts it together, with the numbers from 7 on."""
    return b"".join(
        struct.pack(f"<II{SLOT - 8}s", number, len(word), word.encode())
        for number, word in enumerate(words, 7)
    )


async def judged(streams: Streams, *words: str) -> dict[int, Any]:
    """The bodies for those that are to be cut."""
    answer = streams.judge(message(*words))
    told = answer if isinstance(answer, bytes) else await answer
    found = {}
    while told:
        number, status, size = struct.unpack_from("<III", told)
        assert status == 401
        found[number] = json.loads(told[12 : 12 + size])
        told = told[12 + size :]
    return found


class Counting:
    """A database that can go away, and counts."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.reads = 0
        self.away = False

    async def read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        self.reads += 1
        if self.away:
            raise Unavailable("the database is away")
        return await self._store.read(query, values)


async def a_user(at: Opened, name: str = "anna", seed: int = 1) -> tuple[str, str]:
    """Ids of a user and of their key."""
    user = await people.create_user(at.desk(), name, "user")
    key = await credentials.create_key(at.desk(), user.id, a_minted(seed))
    return user.id, key.id


def word_of(user: str, key: str, dialect: str = "openai") -> str:
    return watch_word(a_key(user_id=user, id=key), dialect)


@pytest.mark.parametrize(
    "credential",
    [
        pytest.param(a_key(user_id=LONG_ID, id=LONG_ID), id="key"),
        pytest.param(a_token(LONG_ID, id="x" * 1000), id="token"),
    ],
)
def test_a_word_fits_into_its_slot_and_is_read_again(credential: KeyRecord | TokenRecord) -> None:
    word = watch_word(credential, "anthropic")
    assert len(word.encode()) <= SLOT - 8
    watched = read_word(word.encode())
    assert (watched.dialect, watched.user, watched.kind) == (
        "anthropic",
        LONG_ID,
        "token" if credential.kind == "token" else "key",
    )


def test_tokens_of_two_issuers_are_not_mistaken_for_each_other() -> None:
    token = a_token(LONG_ID)
    other = replace(token, issuer="https://elsewhere.example")
    assert watch_word(token, "openai") != watch_word(other, "openai")


def test_only_streams_of_a_revoked_key_are_cut_in_their_dialect(db: Database) -> None:
    async def work(at: Opened) -> None:
        anna, bob = await a_user(at), await a_user(at, "bob", 2)
        streams = Streams(at.store, size=100)
        words = [word_of(*anna), word_of(*bob), word_of(*anna, dialect="ollama")]
        assert await judged(streams, *words) == {}
        await credentials.revoke_key(at.desk(), anna[1])
        streams.on_change(Change("key", anna[1]))
        found = await judged(streams, *words)
        assert found.keys() == {7, 9}
        assert found[7]["error"]["code"] == "credential_revoked"
        assert "revoked" in found[9]["error"]

    on(db, work)


Make = Callable[[Desk, str], Awaitable[object]]


@pytest.mark.parametrize("make", [people.disable_user, people.delete_user])
@pytest.mark.parametrize("by_token", [False, True])
def test_streams_of_a_disabled_or_deleted_user_are_cut(
    db: Database, make: Make, by_token: bool
) -> None:
    async def work(at: Opened) -> None:
        user, key = await a_user(at)
        word = watch_word(a_token(user), "openai") if by_token else word_of(user, key)
        streams = Streams(at.store, size=100)
        assert await judged(streams, word) == {}
        await make(at.desk(), user)
        streams.on_change(Change("user", user))
        assert await judged(streams, word)

    on(db, work)


def test_streams_of_revoked_tokens_are_cut(db: Database) -> None:
    async def work(at: Opened) -> None:
        user, _ = await a_user(at)
        words = [watch_word(a_token(user, id=id), "openai") for id in ("one", "two", "of nobody")]
        streams = Streams(at.store, size=100)
        assert await judged(streams, *words) == {}
        later = NOW + timedelta(hours=1)
        rows = [
            {"jti": id, "issuer": ISSUER, "user_id": whose, "expires_at": later, "revoked_at": NOW}
            for id, whose in (("two", user), ("of nobody", None))
        ]
        async with at.engine.begin() as connection:
            await connection.execute(insert(revoked_tokens), rows)
        streams.on_change(Change("token", "two"))
        assert (await judged(streams, *words)).keys() == {8, 9}

    on(db, work)


def test_logging_out_cuts_streams_of_older_tokens_and_of_no_keys(db: Database) -> None:
    async def work(at: Opened) -> None:
        user, key = await a_user(at)
        since = NOW.timestamp() + 1
        words = [
            watch_word(a_token(user, issued_at=since - 1), "openai"),
            watch_word(a_token(user, issued_at=since), "openai"),
            word_of(user, key),
        ]
        streams = Streams(at.store, size=100)
        await people.log_out(at.desk(), user)
        assert (await judged(streams, *words)).keys() == {7}

    on(db, work)


def test_what_stands_is_asked_once_until_a_signal_names_it(db: Database) -> None:
    async def work(at: Opened) -> None:
        anna, bob = await a_user(at), await a_user(at, "bob", 2)
        store = Counting(at.store)
        streams = Streams(store, size=100)  # type: ignore[arg-type]
        words = [word_of(*anna), word_of(*bob)]

        async def reads() -> int:
            before = store.reads
            assert await judged(streams, *words) == {}
            return store.reads - before

        assert (await reads(), await reads()) == (1, 0)
        for change in (Change("limits", anna[0]), Change("prices"), Change("key", "another")):
            streams.on_change(change)
            assert await reads() == 0
        for change in (Change("key", anna[1]), Change("user", bob[0]), Change("everything")):
            streams.on_change(change)
            assert (await reads(), await reads()) == (1, 0)
        streams.pause()
        assert (await reads(), await reads()) == (1, 1)
        streams.resume()
        assert (await reads(), await reads()) == (1, 0)

    on(db, work)


def test_what_was_read_before_a_signal_is_not_remembered(db: Database) -> None:
    async def work(at: Opened) -> None:
        anna = await a_user(at)
        streams = Streams(at.store, size=100)
        asking = asyncio.ensure_future(judged(streams, word_of(*anna)))
        await asyncio.sleep(0)  # it has been asked
        streams.on_change(Change("key", anna[1]))
        assert await asking == {}
        await credentials.revoke_key(at.desk(), anna[1])
        assert await judged(streams, word_of(*anna))

    on(db, work)


def test_while_the_database_is_away_streams_go_on(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(at: Opened) -> None:
        anna = await a_user(at)
        await credentials.revoke_key(at.desk(), anna[1])
        store = Counting(at.store)
        streams = Streams(store, size=100)  # type: ignore[arg-type]
        store.away = True
        assert await judged(streams, word_of(*anna)) == {}
        assert await judged(streams, word_of(*anna)) == {}
        assert [record.message for record in caplog.records] == [
            "answers that run are not checked"
        ], "said once"
        store.away = False
        assert await judged(streams, word_of(*anna))

    on(db, work)


def test_many_are_asked_about_in_portions_and_memory_is_bounded(db: Database) -> None:
    async def work(at: Opened) -> None:
        anna = await a_user(at)
        strangers = [word_of(anna[0], f"{n:08x}{LONG_ID[8:]}") for n in range(1200)]
        streams = Streams(at.store, size=1)
        strangers.append(word_of(anna[0], "no-id-at-all"))
        assert len(await judged(streams, word_of(*anna), *strangers)) == 1201
        bob, carl = await a_user(at, "bob", 2), await a_user(at, "carl", 3)
        for each in (bob, carl, anna):
            assert await judged(streams, word_of(*each)) == {}

    on(db, work)
