"""Passwords: which are refused, and that a check takes as long for whoever does not exist."""

import asyncio
import threading
import time
import unicodedata
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama import passwords
from parallama.errors import Unavailable, UsageError
from tests.examples import examples

GOOD = "correct horse battery"
ROUNDS = 6
"""Of a test: what counts is the sum of them."""


def check(password: str, username: str = "anna") -> None:
    passwords.check(password, username=username, min_length=12)


@pytest.mark.parametrize(
    "password",
    [GOOD, "x7#Kp2!mQ9zL", "пароль из букв", "a" * 60 + "bcdefghi", "anna likes bees", "ä" * 3 + "bcdefghij"],  # noqa: E501
)  # fmt: skip
def test_a_good_password_is_taken(password: str) -> None:
    check(password)


@pytest.mark.parametrize(
    ("password", "said"),
    [
        ("", "12 characters or more: this has 0"),
        ("elevenchars", "this has 11"),
        ("x" * 73, "72 bytes or less, .*: this has 73"),
        ("abcdefghjklä" * 6, "this has 78"),
        ("abcdabcdabcdabcd", "5 different"),
        ("AaBbCcDdAaBbCcDd", "5 different"),
        ("tab\tin the middle", "visible"),
        ("zero\x00in the middle", "visible"),
        ("half \ud800 a pair", "visible"),
        ("Anna-Anna-12345", "would be guessed"),
        ("password1234", "would be guessed"),
        ("Parallama2026", "would be guessed"),
        ("qwertyuiop12", "would be guessed"),
        ("123456789012", "would be guessed"),
    ],
)
def test_a_weak_or_broken_password_is_refused_and_not_repeated(password: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as told:
        check(password)
    assert not password or password not in str(told.value)


def test_a_user_name_counts_however_its_accents_are_written() -> None:
    name = unicodedata.normalize("NFD", "Zoë-Brontë")
    with pytest.raises(UsageError, match="would be guessed"):
        check("zoë-brontë12", username=name)


@given(st.text(max_size=100), st.text(max_size=40))
@examples(200)
def test_a_password_that_is_taken_is_one_that_can_be_checked(password: str, username: str) -> None:
    try:
        check(password, username)
    except UsageError:
        return
    stored = passwords.hash(password, rounds=4)
    other = unicodedata.normalize("NFD", password)
    assert passwords.verify(other, stored, rounds=4)
    assert not passwords.verify(password + "x", stored, rounds=4)


def test_what_cannot_be_a_password_fits_nobody() -> None:
    stored = passwords.hash(GOOD, rounds=4)
    longest = passwords.hash("x" * 72, rounds=4)
    assert not passwords.verify("x" * 73, longest, rounds=4)
    for wrong in ("", "\x00", "\ud800", "x" * 1_000_000):
        assert not passwords.verify(wrong, stored, rounds=4)
        assert not passwords.verify(wrong, None, rounds=4)
    for damaged in ("", "secret", stored[:-1], "$2b$12$"):
        assert not passwords.verify(GOOD, damaged, rounds=4)


def rounds_of(check: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many rounds of bcrypt it took in all, which is what takes the time."""
    costs: list[int] = []
    real = passwords.bcrypt.checkpw

    def counted(password: bytes, hashed: bytes) -> bool:
        costs.append(int(hashed.split(b"$")[2]))
        return real(password, hashed)

    with monkeypatch.context() as patch:
        patch.setattr(passwords.bcrypt, "checkpw", counted)
        check()
    return sum(1 << cost for cost in costs)


@pytest.mark.parametrize("password", [GOOD, "wrong", "", "x" * 100_000])
def test_a_check_takes_the_same_work_whoever_is_asked_for(
    password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = passwords.hash(GOOD, rounds=ROUNDS)
    older = passwords.hash(GOOD, rounds=4)
    work = {
        rounds_of(partial(passwords.verify, password, stored, rounds=ROUNDS), monkeypatch)
        for stored in (known, older, None, "damaged")
    }
    assert work == {1 << ROUNDS}


def test_few_are_checked_at_once_a_few_wait_and_the_others_are_told() -> None:
    let_go = threading.Event()
    at_once: list[int] = []
    running = 0
    lock = threading.Lock()

    def slow() -> None:
        nonlocal running
        with lock:
            running += 1
            at_once.append(running)
        assert let_go.wait(10)
        with lock:
            running -= 1

    async def one(checker: passwords.Checker) -> None:
        async with checker.place():
            await checker.run(slow)

    async def story() -> None:
        checker = passwords.Checker(threads=2)
        tasks = [asyncio.create_task(one(checker)) for _ in range(50)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        before = time.perf_counter()
        let_go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.perf_counter() - before < 5
        refused = [result for result in results if result is not None]
        assert len(refused) == 50 - 2 * 17
        assert all(isinstance(error, Unavailable) for error in refused)
        async with checker.place():  # places are given back
            pass
        checker.close()

    asyncio.run(story())
    assert max(at_once) == 2
