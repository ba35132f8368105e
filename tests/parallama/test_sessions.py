"""Sessions on real databases and a real Valkey: log-in, refresh, replay, end."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from sqlalchemy import select, update

from parallama import keys, passwords, signing
from parallama.changes import Change
from parallama.config import Config, Database
from parallama.db import database
from parallama.db.accounts import find_account
from parallama.db.expired import remove_expired
from parallama.db.manage import audit, people, sessions
from parallama.db.manage.schema import managed
from parallama.db.manage.sessions import Refused, Session, Sessions
from parallama.db.manage.tables import refresh_tokens, users
from parallama.desk import Actor, Desk
from parallama.errors import NotFound, UsageError
from parallama.lockout import Locked, Lockout
from tests.examples import examples
from tests.parallama.db_on_disk import NOW, Opened, on, settings
from tests.valkey import Valkey

PASSWORD = "correct horse battery"
HASH = passwords.hash(PASSWORD, rounds=10)
ADDRESS = "192.0.2.7"
GRACE = timedelta(seconds=10)
TOKEN_LIFE = timedelta(minutes=30)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey(tmp_path_factory.mktemp("v"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def valkey(shared: Valkey) -> Valkey:
    shared.flush()
    return shared


@pytest.fixture(scope="module")
def signing_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "signing"
    signing.ensure(folder, algorithm="EdDSA", now=NOW.timestamp())
    return folder


def configured(signing_dir: Path, **fields: Any) -> Config:
    told = {
        "jwt_algorithm": "EdDSA",
        "signing_keys_dir": str(signing_dir),
        "password_hash_rounds": 10,
        **fields,
    }
    return Config.model_validate({"authentication": told})


@dataclass
class House:
    """A database with a user `anna`, and who lets people in."""

    at: Opened
    sessions: Sessions
    config: Config
    now: datetime = NOW

    def desk(self, after: timedelta = timedelta()) -> Desk:
        by = Actor("", "api", address=ADDRESS)
        return Desk(engine=self.at.engine, now=self.now + after, by=by)

    async def login(self, name: str = "anna", password: str = PASSWORD) -> Session:
        return await self.sessions.login(self.desk(), name, password, address=ADDRESS)

    async def refresh(self, token: str, after: timedelta = timedelta()) -> Session:
        return await self.sessions.refresh(self.desk(after), token)

    async def refused(self, token: str, after: timedelta = timedelta()) -> None:
        with pytest.raises(Refused):
            await self.refresh(token, after)

    async def revoked(self) -> set[str]:
        """Ids of access tokens."""
        rows = await self.at.store.read("SELECT jti FROM revoked_tokens")
        return {str(jti) for (jti,) in rows}

    async def records(self) -> list[audit.Entry]:
        return [entry async for entry in audit.entries(self.at.engine, audit.Which())]


def jti(session: Session) -> str:
    return str(claims(session)["jti"])


def claims(session: Session) -> dict[str, Any]:
    told: dict[str, Any] = jwt.decode(
        session.access_token, options={"verify_signature": False, "verify_exp": False}
    )
    return told


Story = Callable[[House], Awaitable[None]]
Housed = Callable[..., None]


@pytest.fixture
def housed(valkey: Valkey, signing_dir: Path) -> Housed:
    def run(at: Database, story: Story, **fields: Any) -> None:
        config = configured(signing_dir, **fields)

        async def work(opened: Opened) -> None:
            async with AsyncExitStack() as stack:
                house = await a_house(stack, valkey, config, opened)
                await people.create_user(opened.desk(NOW - timedelta(days=1)), "anna")
                await put_hash(opened, "anna", HASH)
                await story(house)

        on(at, work)

    return run


async def a_house(stack: AsyncExitStack, valkey: Valkey, config: Config, opened: Opened) -> House:
    told = config.authentication
    redis = await stack.enter_async_context(valkey.client())
    lockout = await stack.enter_async_context(aclosing(Lockout(redis, told, timeout=5.0)))
    checker = passwords.Checker(threads=2)
    stack.callback(checker.close)
    made = Sessions(
        told,
        signing=signing.KeyFolder(config, clock=NOW.timestamp),
        lockout=lockout,
        checker=checker,
        random_bytes=os.urandom,
    )
    return House(opened, made, config)


async def put_hash(at: Opened, name: str, hash: str | None) -> None:
    async with at.engine.begin() as connection:
        query = update(users).where(users.c.username == name).values(password_hash=hash)
        await connection.execute(query)


async def hash_of(at: Opened, name: str) -> str:
    query = select(users.c.password_hash).where(users.c.username == name)
    async with at.engine.connect() as connection:
        return str((await connection.execute(query)).scalar_one())


# Log-in.


def test_a_login_gives_two_tokens_and_leaves_a_record(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        session = await house.login()
        user = await people.get_user(house.at.engine, "anna")
        assert (session.user_id, session.username) == (user.id, "anna")
        assert (session.expires_in, session.refresh_expires_in) == (1800, 30 * 86_400)
        told = claims(session)
        assert told["sub"] == user.id
        assert told["exp"] == NOW.timestamp() + 1800
        assert keys.parse(session.refresh_token, keys.REFRESH_PREFIX) is not None
        assert keys.parse(session.refresh_token) is None  # no API key
        for secret in (session.access_token, session.refresh_token):
            assert secret not in repr(session)
        last = (await house.records())[-1]
        assert (last.action, last.actor, last.actor_id) == ("sessions.create", "anna", user.id)
        assert last.address == ADDRESS

    housed(db, story)


def test_no_token_is_stored(tmp_path: Path, housed: Housed) -> None:
    async def story(house: House) -> None:
        first = await house.login()
        second = await house.refresh(first.refresh_token)
        stored = (tmp_path / "parallama.db").read_bytes()
        stored += (tmp_path / "parallama.db-wal").read_bytes()
        assert jti(second).encode() in stored
        for session in (first, second):
            for secret in (session.access_token, session.refresh_token, PASSWORD):
                assert secret.encode() not in stored
                assert secret[17:60].encode() not in stored

    housed(settings(tmp_path), story)


WRONG = [
    ("anna", "wrong horse battery"),
    ("anna", ""),
    ("nobody", PASSWORD),
    ("without", PASSWORD),
    ("without", ""),
    ("disabled", PASSWORD),
    ("ANNA", PASSWORD),
    ("anna ", PASSWORD),
    ("anna", PASSWORD + "\x00"),
    ("' OR 1=1 --", PASSWORD),
    ("\ud800", PASSWORD),
    ("anna\x00", PASSWORD),
    ("x" * 10_000, PASSWORD),
    ("anna", "x" * 10_000),
]


def test_whatever_is_wrong_the_answer_is_the_same(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        for other in ("without", "disabled"):
            await people.create_user(house.desk(), other)
        await put_hash(house.at, "disabled", HASH)
        await people.disable_user(house.desk(), "disabled")
        for name, password in WRONG:
            with pytest.raises(Refused) as told:
                await house.login(name, password)
            assert str(told.value) == "not accepted: log in with your name and password"
        await house.login()

    housed(db, story)


def test_a_name_is_the_same_however_its_accents_are_written(tmp_path: Path, housed: Housed) -> None:
    async def story(house: House) -> None:
        await people.create_user(house.desk(), "zo\u00eb")
        await put_hash(house.at, "zo\u00eb", HASH)
        assert (await house.login("zoe\u0308")).username == "zo\u00eb"

    housed(settings(tmp_path), story)


def test_what_was_typed_is_not_logged(
    tmp_path: Path, housed: Housed, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(house: House) -> None:
        with caplog.at_level(logging.INFO):
            with pytest.raises(Refused):
                await house.login("hunter2hunter2", "in the wrong field")
            with pytest.raises(Refused):
                await house.login("anna", "wrong horse battery")
        lines = [str(record.__dict__) for record in caplog.records]
        assert any("'user': 'anna'" in line and ADDRESS in line for line in lines)
        for secret in ("hunter2hunter2", "in the wrong field", "wrong horse battery"):
            assert not any(secret in line for line in lines)

    housed(settings(tmp_path), story)


@pytest.mark.parametrize("name", ["anna", "nobody"])
def test_guessing_ends_whether_the_user_exists_or_not(
    tmp_path: Path, housed: Housed, name: str
) -> None:
    async def story(house: House) -> None:
        results = await asyncio.gather(
            *(house.login(name, f"wrong horse {number}") for number in range(12)),
            return_exceptions=True,
        )
        kinds = sorted(type(result).__name__ for result in results)
        assert kinds == ["Locked"] * 10 + ["Refused"] * 2
        with pytest.raises(Locked):
            await house.login(name, PASSWORD)  # not even with the right one

    housed(settings(tmp_path), story, login_attempts=2)


def test_who_knows_the_password_never_waits(tmp_path: Path, housed: Housed) -> None:
    async def story(house: House) -> None:
        for _ in range(5):
            with pytest.raises(Refused):
                await house.login(password="wrong horse battery")
            await house.login()

    housed(settings(tmp_path), story, login_attempts=3)


def test_a_hash_of_another_cost_is_made_anew_at_login(tmp_path: Path, housed: Housed) -> None:
    async def story(house: House) -> None:
        await house.login()
        stored = await hash_of(house.at, "anna")
        assert passwords.cost_of(stored) == 11
        await house.login()
        assert await hash_of(house.at, "anna") == stored

    housed(settings(tmp_path), story, password_hash_rounds=11)


def test_the_event_loop_goes_on_while_passwords_are_checked(tmp_path: Path, housed: Housed) -> None:
    async def story(house: House) -> None:
        before = time.process_time()
        await asyncio.to_thread(passwords.hash, PASSWORD, rounds=12)
        takes = time.process_time() - before
        login = asyncio.create_task(house.login())
        longest, last = 0.0, time.perf_counter()
        cpu = time.thread_time()
        while not login.done():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        assert (await login).username == "anna"
        assert time.thread_time() - cpu < takes / 2  # what the loop's own thread worked

    housed(settings(tmp_path), story, password_hash_rounds=12)


# Refresh.


def test_a_refresh_token_is_used_once(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        first = await house.login()
        second = await house.refresh(first.refresh_token)
        third = await house.refresh(second.refresh_token, after=timedelta(days=29))
        assert len({at.refresh_token for at in (first, second, third)}) == 3
        assert len({jti(at) for at in (first, second, third)}) == 3
        assert await house.revoked() == set()

    housed(db, story)


def test_a_replayed_token_ends_the_whole_session(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        other = await house.login()
        first = await house.login()
        second = await house.refresh(first.refresh_token)
        desk = house.desk(GRACE)
        with pytest.raises(Refused):
            await house.sessions.refresh(desk, first.refresh_token)
        assert desk.changes == [Change("user", first.user_id)]
        assert await house.revoked() == {jti(first), jti(second)}
        await house.refused(second.refresh_token, GRACE)
        assert (await house.records())[-1].action == "sessions.replay"
        await house.refresh(other.refresh_token, GRACE)  # another session of the same user

    housed(db, story)


def test_two_uses_at_once_both_get_a_token_and_one_is_good_afterwards(
    db: Database, housed: Housed
) -> None:
    async def story(house: House) -> None:
        for _ in range(3):
            first = await house.login()
            both = await asyncio.gather(*(house.refresh(first.refresh_token) for _ in range(2)))
            live = await live_tokens(house, first)
            assert len(live) == 1
            [last] = [at for at in both if jti(at) in live]
            [other] = [at for at in both if jti(at) not in live]
            await house.refresh(last.refresh_token, after=GRACE)
            await house.refused(other.refresh_token, after=GRACE)
            await house.refused(last.refresh_token, after=GRACE)

    housed(db, story)


async def live_tokens(house: House, of: Session) -> set[str]:
    family = (
        select(refresh_tokens.c.family_id).where(refresh_tokens.c.id == jti(of)).scalar_subquery()
    )
    query = select(refresh_tokens.c.id).where(
        refresh_tokens.c.family_id == family,
        refresh_tokens.c.replaced_at.is_(None),
        refresh_tokens.c.revoked_at.is_(None),
    )
    async with house.at.engine.connect() as connection:
        return {row.id for row in await connection.execute(query)}


def test_who_never_saw_the_answer_asks_again(db: Database, housed: Housed) -> None:
    """A process that is killed between the commit and its answer is, for a client, this."""

    async def story(house: House) -> None:
        first = await house.login()
        await house.refresh(first.refresh_token)
        again = await house.refresh(first.refresh_token, after=GRACE - timedelta(seconds=1))
        await house.refresh(again.refresh_token, after=timedelta(minutes=25))

    housed(db, story)


def test_two_who_take_turns_within_the_grace_do_not_prolong_it(
    db: Database, housed: Housed
) -> None:
    async def story(house: House) -> None:
        first = await house.login()
        mine = await house.refresh(first.refresh_token)
        almost = GRACE - timedelta(seconds=1)
        theirs = await house.refresh(first.refresh_token, after=almost)
        mine = await house.refresh(mine.refresh_token, after=almost)
        await house.refused(theirs.refresh_token, after=GRACE)
        await house.refused(mine.refresh_token, after=GRACE)

    housed(db, story)


@pytest.mark.parametrize("change", ["expire", "disable", "delete", "log-out", "password"])
def test_what_ends_sessions_ends_refresh_tokens(db: Database, housed: Housed, change: str) -> None:
    async def story(house: House) -> None:
        first = await house.login()
        second = await house.refresh(first.refresh_token)
        after = timedelta()
        match change:
            case "expire":
                after = timedelta(days=30)
            case "disable":
                await people.disable_user(house.desk(), "anna")
            case "delete":
                await people.delete_user(house.desk(), "anna")
            case "log-out":
                await people.log_out(house.desk(), "anna")
            case "password":
                told = house.config.authentication
                new = "another good one 7"
                await people.set_password(house.desk(), "anna", new, settings=told)
        await house.refused(second.refresh_token, after)
        await house.refused(first.refresh_token, after)
        if change == "disable":
            await people.enable_user(house.desk(), "anna")
            await house.refresh(second.refresh_token)

    housed(db, story)


def test_what_is_no_token_of_ours_is_refused(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        session = await house.login()
        of_nobody = keys.mint_refresh(os.urandom).token
        known_id = replace(keys.mint_refresh(lambda n: b"\1" * n))
        minted = keys.mint(os.urandom, rounds=4).token
        token = session.refresh_token
        stolen_id = token[:17] + keys.mint_refresh(os.urandom).token[17:60]
        tokens = [
            *("", "x", of_nobody, known_id.token, minted, session.access_token, token[:-1]),
            *(token + "x", token.swapcase(), f" {token}", f"{token}\n", f"{token}\x00"),
            *("plr_' OR 1=1", "\ud800", "x" * 1_000_000, with_checksum(stolen_id)),
        ]
        for wrong in tokens:
            await house.refused(wrong)
            await house.sessions.logout(house.desk(), wrong)
        await house.refresh(token)

    housed(db, story)


def with_checksum(body: str) -> str:
    token = body + keys._checksum(body)
    assert keys.parse(token, keys.REFRESH_PREFIX) is not None
    return token


def test_a_log_out_ends_the_session_and_its_access_tokens(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        other = await house.login()
        long_ago = await house.login()
        first = await house.refresh(long_ago.refresh_token, after=timedelta(days=1))
        second = await house.refresh(first.refresh_token, after=timedelta(days=1))
        desk = house.desk(timedelta(days=1, minutes=1))
        await house.sessions.logout(desk, second.refresh_token)
        assert desk.changes == [Change("user", first.user_id)]
        # The oldest one has expired by itself.
        assert await house.revoked() == {jti(first), jti(second)}
        await house.refused(second.refresh_token, timedelta(days=1))
        await house.sessions.logout(desk, second.refresh_token)
        await house.refresh(other.refresh_token)

    housed(db, story)


def test_a_log_out_by_the_access_token_is_the_same(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        session = await house.login()
        told = house.config.authentication
        await sessions.end_session(house.desk(), jti(session), told)
        await house.refused(session.refresh_token)
        for unknown in ("", "x" * 300, "00000000-0000-4000-8000-000000000000"):
            await sessions.end_session(house.desk(), unknown, told)

    housed(db, story)


def test_a_log_out_of_a_user_refuses_every_token_of_before_and_none_of_after(
    db: Database, housed: Housed
) -> None:
    async def story(house: House) -> None:
        house.now = NOW + timedelta(milliseconds=300)
        before = await house.login()
        desk = house.desk(timedelta(milliseconds=300))
        user = await people.log_out(desk, "anna")
        assert Change("user", user.id) in desk.changes
        house.now = NOW + timedelta(milliseconds=900)
        after = await house.login()
        account = await find_account(house.at.store, user.id)
        assert account is not None
        assert account.tokens_valid_from is not None
        assert claims(before)["iat"] < account.tokens_valid_from <= claims(after)["iat"]
        assert claims(after)["nbf"] <= house.now.timestamp()

    housed(db, story)


# Single tokens.


def test_one_access_token_is_revoked_and_its_session_goes_on(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        session = await house.login()
        told = house.config.authentication
        desk = house.desk()
        await sessions.revoke_token(desk, jti(session), told)
        await sessions.revoke_token(house.desk(), jti(session), told)  # twice is as good
        assert desk.changes == [Change("token", jti(session))]
        rows = await house.at.store.read("SELECT jti, issuer, user_id FROM revoked_tokens")
        assert rows == [(jti(session), "parallama", session.user_id)]
        await house.refresh(session.refresh_token)

    housed(db, story)


def test_a_token_of_another_issuer_is_revoked_by_both_names(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        told = house.config.authentication
        issuer = "https://id.example.org"
        await sessions.revoke_token(house.desk(), "abc'; --", told, issuer=issuer)
        await sessions.revoke_token(house.desk(), "abc'; --", told)
        rows = await house.at.store.read("SELECT jti, issuer, user_id FROM revoked_tokens")
        assert sorted(rows) == [("abc'; --", issuer, None), ("abc'; --", "parallama", None)]
        for wrong in ("", "x" * 256, "a\x00b", "\ud800"):
            with pytest.raises(UsageError):
                await sessions.revoke_token(house.desk(), wrong, told)

    housed(db, story)


def test_what_expired_is_removed(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        told = house.config.authentication
        session = await house.login()
        await sessions.revoke_token(house.desk(), jti(session), told)
        for number in range(5):
            session = await house.refresh(session.refresh_token, timedelta(days=number))
        assert await remove_expired(house.at.store, NOW + timedelta(minutes=20)) == 0
        assert await remove_expired(house.at.store, NOW + timedelta(hours=1)) == 1
        assert await house.revoked() == set()
        # The first two, and the one of the day after.
        assert await remove_expired(house.at.store, NOW + timedelta(days=31, seconds=1)) == 3
        await house.refresh(session.refresh_token, timedelta(days=31, seconds=1))

    housed(db, story)


# Passwords.


def test_a_new_password_is_good_and_the_old_one_is_not(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        new = "another good one 7"
        change = house.sessions.change_password
        session = await house.login()
        desk = house.desk()
        with pytest.raises(Refused):
            await change(desk, "anna", current="wrong horse battery", new=new, address=ADDRESS)
        with pytest.raises(UsageError, match="12 characters"):
            await change(desk, "anna", current=PASSWORD, new="short", address=ADDRESS)
        await house.refresh(session.refresh_token)  # nothing has happened yet
        await change(desk, "anna", current=PASSWORD, new=new, address=ADDRESS)
        with pytest.raises(Refused):
            await house.login()
        assert (await house.login(password=new)).username == "anna"
        record = [at for at in await house.records() if at.action == "users.set-password"]
        assert len(record) == 1
        assert not any("$2b$" in str(at) or new in str(at) for at in record)

    housed(db, story)


def test_a_user_without_a_password_cannot_log_in(db: Database, housed: Housed) -> None:
    async def story(house: House) -> None:
        told = house.config.authentication
        user = await people.set_password(house.desk(), "anna", None, settings=told)
        assert not user.has_password
        with pytest.raises(Refused):
            await house.login()
        with pytest.raises(NotFound):
            await people.set_password(house.desk(), "nobody", PASSWORD, settings=told)

    housed(db, story)


# Families, in any order of uses.


class Family(RuleBasedStateMachine):
    """
    The tokens of one log-in, by generations: the use of the newest token begins another one, and
    for the time of grace the token that began it, and those that came of it, give more of it.
    """

    house: House
    run: Callable[[Awaitable[Any]], Any]

    @initialize()
    def begin(self) -> None:
        self.house.now = NOW
        session = self.run(self.house.login())
        self.issued = [(session.refresh_token, 0, NOW)]  # token, generation, when
        self.newest = 0
        self.used: dict[int, int] = {}  # generation: which of its tokens began the next
        self.began = NOW
        self.alive = True

    @rule(seconds=st.sampled_from([0, 1, 5, 9, 10, 11, 1500, 15 * 86_400]))
    def wait(self, seconds: int) -> None:
        self.house.now += timedelta(seconds=seconds)

    @rule(back=st.integers(0, 4))
    def use(self, back: int) -> None:
        which = max(0, len(self.issued) - 1 - back)
        token, generation, at = self.issued[which]
        now, current = self.house.now, self.issued[self.newest][1]
        in_grace = now < self.began + GRACE
        if not self.alive or now >= at + timedelta(days=30):
            self.run(self.house.refused(token))
            return
        if which == self.newest:
            self.used[generation] = which
            self.began = now
            self._taken(token, generation + 1)
        elif in_grace and (generation == current or self.used.get(current - 1) == which):
            self._taken(token, current)
        else:
            self.run(self.house.refused(token))
            self.alive = False

    def _taken(self, token: str, generation: int) -> None:
        session = self.run(self.house.refresh(token))
        self.newest = len(self.issued)
        self.issued.append((session.refresh_token, generation, self.house.now))

    def teardown(self) -> None:
        """Beyond the grace one token is left at most, and whoever tries another ends that, too."""
        if not hasattr(self, "issued"):
            return
        self.house.now += GRACE
        *others, (last, _, at) = self.issued
        expired = self.house.now >= at + timedelta(days=30)
        for token, _, issued in others:
            self.run(self.house.refused(token))
            self.alive = self.alive and self.house.now >= issued + timedelta(days=30)
        if self.alive and not expired:
            self.run(self.house.refresh(last))
        else:
            self.run(self.house.refused(last))


def test_at_no_time_are_two_branches_of_a_session_alive(
    tmp_path: Path, valkey: Valkey, signing_dir: Path
) -> None:
    config = configured(signing_dir, refresh_grace_seconds=int(GRACE.total_seconds()))
    at = settings(tmp_path)
    on(at, lambda opened: people.create_user(opened.desk(), "anna"))
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def opened() -> House:
            store = await stack.enter_async_context(database(at))
            engine = await stack.enter_async_context(managed(at))
            both = Opened(store, engine)
            await put_hash(both, "anna", HASH)
            return await a_house(stack, valkey, config, both)

        house = runner.run(opened())
        machine = type("Story", (Family,), {"house": house, "run": staticmethod(runner.run)})
        try:
            run_state_machine_as_test(machine, settings=examples(20, stateful_step_count=10))
        finally:
            runner.run(stack.aclose())
