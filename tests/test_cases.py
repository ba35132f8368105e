"""The table of acceptance cases names tests that exist."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = re.findall(r"(?m)^\| (\d+) \| (.+) \| (.+) \|$", (ROOT / "tests/CASES.md").read_text())
WITHOUT = {"51": "Parallama has no metrics yet."}


@cache
def defined_in(path: str) -> set[str]:
    return set(re.findall(r"(?m)^(?:async )?def (test_\w+)", (ROOT / path).read_text("utf-8")))


def test_every_case_is_there() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 53))


@pytest.mark.parametrize(("number", "tests"), [(number, tests) for number, _, tests in ROWS])
def test_a_case_has_tests(number: str, tests: str) -> None:
    if number in WITHOUT:
        assert tests == WITHOUT[number]
        return
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
    assert " ".join(f"`{path}::{name}`" for path, name in named) == tests
    assert named
    assert [name for path, name in named if name not in defined_in(path)] == []
