"""A few seconds of what `make fuzz-check` does."""

import asyncio

import pytest

from authz.service import Authz
from tests.authz.make import a_check
from tests.authz.tokens import a_token
from tests.fuzz_check import Mutator, fuzz, holds_a_credential


def test_changed_questions_let_nobody_in_and_break_nothing() -> None:
    told = asyncio.run(fuzz(1, lambda asked: asked < 4000))
    assert told.asked == 4000
    assert min(told.allowed, told.refused, told.no_question) > 50


def test_it_would_notice_an_open_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Authz, "check", lambda *_: b"")
    with pytest.raises(AssertionError):
        asyncio.run(fuzz(1, lambda asked: asked < 100))


def test_it_knows_who_may_come_in() -> None:
    good = a_check(headers={"authorization": f"Bearer {a_token()}"})
    assert holds_a_credential(good.SerializeToString())
    assert not holds_a_credential(a_check(headers={}).SerializeToString())
    assert not holds_a_credential(b"\xff")


def test_one_seed_asks_the_same_again() -> None:
    first, second = (Mutator(3).questions() for _ in range(2))
    assert [next(first) for _ in range(50)] == [next(second) for _ in range(50)]
