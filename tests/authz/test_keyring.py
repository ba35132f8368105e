"""Keys are found in a real database, remembered by their digest, and forgotten in time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from authz.decide import UNKNOWN_KEY
from authz.keyring import Keyring
from parallama import keys
from parallama.changes import Change
from parallama.db.accounts import KeyRecord, find_key
from parallama.db.manage import credentials, people
from parallama.errors import Unavailable
from parallama.roles import Role
from tests.authz.make import MINTED, TOKEN, WRONG, a_key, no_tokens
from tests.parallama.db_on_disk import Opened, a_minted, on

UNKNOWN = a_minted(99).token


class Asking:
    """The database, and how often it was asked for what."""

    def __init__(self, at: Opened) -> None:
        self._at = at
        self.asked: list[str] = []

    async def __call__(self, public_id: str) -> KeyRecord | None:
        self.asked.append(public_id)
        return await find_key(self._at.store, public_id)


Story = Callable[[Keyring, Asking, Opened], Awaitable[None]]


def with_keys(folder: Path, story: Story, *, size: int = 100) -> None:
    """Anna with the key TOKEN, ben with a key of seed 8."""

    async def told(at: Opened) -> None:
        for name, minted in (("anna", MINTED), ("ben", a_minted(8))):
            await people.create_user(at.desk(), name, Role.USER)
            await credentials.create_key(at.desk(), name, minted, name=name)
        asking = Asking(at)
        await story(Keyring(asking, no_tokens(), size=size), asking, at)

    on(folder, told)


async def found(keyring: Keyring, token: str = TOKEN) -> KeyRecord:
    record = await keyring.find(token)
    assert isinstance(record, KeyRecord)
    return record


def test_a_token_is_checked_once_and_then_remembered(tmp_path: Path) -> None:
    async def story(keyring: Keyring, asking: Asking, at: Opened) -> None:
        assert keyring.at_once(TOKEN) is None
        record = await found(keyring)
        assert record.account.username == "anna"
        assert await found(keyring) is record
        assert keyring.at_once(TOKEN) is record
        assert asking.asked == [MINTED.public_id]

    with_keys(tmp_path, story)


def test_neither_the_token_nor_its_secret_is_kept(tmp_path: Path) -> None:
    async def story(keyring: Keyring, asking: Asking, at: Opened) -> None:
        await found(keyring)
        secret = TOKEN[17:60]
        assert TOKEN[:4] + asking.asked[0] in TOKEN  # what is looked up is the public part
        kept = repr(vars(keyring)) + repr(vars(keyring._cache))
        assert secret not in kept
        assert keys.digest(TOKEN) in keyring._cache._known

    with_keys(tmp_path, story)


def test_a_wrong_secret_is_never_remembered_not_even_beside_the_right_one(tmp_path: Path) -> None:
    async def story(keyring: Keyring, asking: Asking, at: Opened) -> None:
        assert await keyring.find(WRONG) is UNKNOWN_KEY
        assert keyring.at_once(WRONG) is None
        await found(keyring)
        assert await keyring.find(WRONG) is UNKNOWN_KEY
        assert keyring.at_once(WRONG) is None
        assert len(asking.asked) == 3

    with_keys(tmp_path, story)


@pytest.mark.parametrize(
    "token",
    ["", "x", TOKEN[:-1], TOKEN + "0", TOKEN[:-1] + "!", TOKEN.upper(), " " + TOKEN, TOKEN * 1000],
)
def test_what_has_not_the_form_of_a_key_costs_no_look_up(tmp_path: Path, token: str) -> None:
    async def never(public_id: str) -> KeyRecord | None:
        raise AssertionError("looked up")

    keyring = Keyring(never, no_tokens(), size=1)
    assert keyring.at_once(token) is UNKNOWN_KEY
    assert asyncio.run(keyring.find(token)) is UNKNOWN_KEY


def test_memory_is_bounded(tmp_path: Path) -> None:
    async def story(keyring: Keyring, asking: Asking, at: Opened) -> None:
        await found(keyring)
        await found(keyring, a_minted(8).token)
        assert keyring.at_once(TOKEN) is None
        assert keyring.at_once(a_minted(8).token) is not None

    with_keys(tmp_path, story, size=1)


@pytest.mark.parametrize(
    ("kind", "whose", "forgets_anna", "forgets_ben"),
    [
        ("key", "anna", True, False),
        ("user", "anna", True, False),
        ("user", "ben", False, True),
        ("limits", "anna", False, False),
        ("everything", None, True, True),
    ],
)
def test_a_change_is_forgotten_where_it_belongs(
    tmp_path: Path, kind: str, whose: str | None, forgets_anna: bool, forgets_ben: bool
) -> None:
    async def story(keyring: Keyring, asking: Asking, at: Opened) -> None:
        anna, ben = await found(keyring), await found(keyring, a_minted(8).token)
        record = {"anna": anna, "ben": ben}.get(whose or "")
        named = "" if record is None else record.id if kind == "key" else record.account.id
        keyring.on_change(Change(kind, named))  # type: ignore[arg-type]
        assert (keyring.at_once(TOKEN) is None) is forgets_anna
        assert (keyring.at_once(a_minted(8).token) is None) is forgets_ben

    with_keys(tmp_path, story)


def test_a_revoked_key_is_seen_as_revoked_after_the_signal(tmp_path: Path) -> None:
    async def story(keyring: Keyring, asking: Asking, at: Opened) -> None:
        record = await found(keyring)
        await credentials.revoke_key(at.desk(), "anna")
        assert (await found(keyring)).revoked is False  # nobody said so yet
        keyring.on_change(Change("key", record.id))
        assert (await found(keyring)).revoked is True

    with_keys(tmp_path, story)


def test_a_change_of_the_role_is_seen_after_the_signal(tmp_path: Path) -> None:
    async def story(keyring: Keyring, asking: Asking, at: Opened) -> None:
        record = await found(keyring)
        await people.update_user(at.desk(), "anna", role=Role.READONLY)
        keyring.on_change(Change("user", record.account.id))
        assert (await found(keyring)).account.role == Role.READONLY

    with_keys(tmp_path, story)


def test_what_was_read_before_a_change_is_not_remembered(tmp_path: Path) -> None:
    """The change comes after the look-up and before the secret was checked."""

    async def story(_: Keyring, asking: Asking, at: Opened) -> None:
        looked_up = asyncio.Event()
        changed = asyncio.Event()

        async def slow(public_id: str) -> KeyRecord | None:
            record = await asking(public_id)
            looked_up.set()
            await changed.wait()
            return record

        keyring = Keyring(slow, no_tokens(), size=10)
        finding = asyncio.create_task(keyring.find(TOKEN))
        await looked_up.wait()
        await credentials.revoke_key(at.desk(), "anna")
        keyring.on_change(Change("key", "its id, which nobody remembers yet"))
        changed.set()
        assert isinstance(await finding, KeyRecord)
        assert keyring.at_once(TOKEN) is None
        assert (await found(keyring)).revoked is True

    with_keys(tmp_path, story)


def test_without_the_signal_nothing_is_remembered(tmp_path: Path) -> None:
    async def story(keyring: Keyring, asking: Asking, at: Opened) -> None:
        await found(keyring)
        keyring.pause()
        assert keyring.at_once(TOKEN) is None
        await found(keyring)
        await people.disable_user(at.desk(), "anna")
        assert (await found(keyring)).account.disabled
        await people.enable_user(at.desk(), "anna")
        keyring.resume()
        assert keyring.at_once(TOKEN) is None
        await found(keyring)
        assert keyring.at_once(TOKEN) is not None

    with_keys(tmp_path, story)


def test_a_look_up_from_before_the_signal_was_found_is_not_remembered(tmp_path: Path) -> None:
    async def story(_: Keyring, asking: Asking, at: Opened) -> None:
        looked_up, go_on = asyncio.Event(), asyncio.Event()

        async def slow(public_id: str) -> KeyRecord | None:
            record = await asking(public_id)
            looked_up.set()
            await go_on.wait()
            return record

        keyring = Keyring(slow, no_tokens(), size=10)
        keyring.pause()
        finding = asyncio.create_task(keyring.find(TOKEN))
        await looked_up.wait()
        keyring.resume()
        go_on.set()
        await finding
        assert keyring.at_once(TOKEN) is None

    with_keys(tmp_path, story)


def test_a_database_that_is_away_is_said_and_not_remembered_as_no() -> None:
    away = True

    async def sometimes(public_id: str) -> KeyRecord | None:
        if away:
            raise Unavailable("the database is away")
        return a_key()

    async def story() -> None:
        nonlocal away
        keyring = Keyring(sometimes, no_tokens(), size=10)
        with pytest.raises(Unavailable):
            await keyring.find(TOKEN)
        away = False
        assert await keyring.find(TOKEN) == a_key()

    asyncio.run(story())


def test_many_at_once_with_one_new_token_are_all_told_the_same(tmp_path: Path) -> None:
    async def story(keyring: Keyring, asking: Asking, at: Opened) -> None:
        records = await asyncio.gather(*(keyring.find(TOKEN) for _ in range(20)))
        assert {at.account.username for at in records if isinstance(at, KeyRecord)} == {"anna"}
        assert len(records) == 20

    with_keys(tmp_path, story)


def test_an_unknown_id_takes_as_long_as_a_wrong_secret(tmp_path: Path) -> None:
    """Or else the time of an answer would say which ids exist. Measured in CPU time."""

    async def cost(keyring: Keyring, token: str) -> float:
        costs = []
        for _ in range(9):
            begun = time.process_time()
            assert await keyring.find(token) is UNKNOWN_KEY
            costs.append(time.process_time() - begun)
        return min(costs)

    async def story(keyring: Keyring, asking: Asking, at: Opened) -> None:
        await cost(keyring, WRONG)  # warm
        wrong, unknown = await cost(keyring, WRONG), await cost(keyring, UNKNOWN)
        malformed = await cost(keyring, TOKEN[:-1])
        assert wrong > 3 * malformed  # so that the next line could fail
        assert wrong / 2 < unknown < wrong * 2

    with_keys(tmp_path, story)
