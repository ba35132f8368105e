"""API keys: form, checksum, hashing."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama import keys

TOKEN = keys.mint(lambda count: bytes(range(count)), rounds=4).token


def test_a_token_has_the_published_form() -> None:
    minted = keys.mint(os.urandom, rounds=4)
    assert re.fullmatch(keys.PATTERN, minted.token)
    assert minted.token.startswith(f"plm_{minted.public_id}_")


def test_the_form_never_changes_for_the_same_bytes() -> None:
    """Keys that people hold must stay valid in every later version."""
    assert TOKEN == "plm_VMcaXWHEX8yi_003aUlTJC7tjlCTQj2uNU3MFagCXG9LRKRcwGkBIDlf2Zozd0"


def test_a_secret_carries_every_bit_it_was_given() -> None:
    lowest = keys.parse(keys.mint(lambda count: bytes(count), rounds=4).token)
    highest = keys.parse(keys.mint(lambda count: b"\xff" * count, rounds=4).token)
    assert lowest is not None
    assert highest is not None
    assert lowest.secret == "0" * 43
    assert _number(highest.secret) == 2**256 - 1


@given(st.binary(min_size=64, max_size=64))
def test_what_is_minted_parses(noise: bytes) -> None:
    minted = _mint(noise)
    parsed = keys.parse(minted)
    assert parsed is not None
    assert minted == f"plm_{parsed.public_id}_{parsed.secret}{minted[-6:]}"


@given(st.integers(0, len(TOKEN) - 1), st.sampled_from("0aZ_ -\n\u0660\u212a"))
def test_one_changed_character_is_refused(at: int, character: str) -> None:
    changed = TOKEN[:at] + character + TOKEN[at + 1 :]
    assert keys.parse(changed) is None or changed == TOKEN


@pytest.mark.parametrize(
    "token",
    ["", "plm_", TOKEN + "0", TOKEN[:-1], " " + TOKEN, TOKEN + "\n", TOKEN.upper(), "é" * 68],
)
def test_what_is_no_key_is_refused(token: str) -> None:
    assert keys.parse(token) is None


def test_verify_knows_the_secret_and_no_other() -> None:
    hashed = keys.hash_secret("a" * 43, 4)
    assert keys.verify("a" * 43, hashed)
    assert not keys.verify("a" * 42 + "b", hashed)
    assert not keys.verify("", hashed)


@pytest.mark.parametrize("damaged", ["", "x", "$2b$04$short", "$9z$04$" + "a" * 53])
def test_a_damaged_hash_fits_no_secret(damaged: str) -> None:
    assert not keys.verify("a" * 43, damaged)


def test_the_stored_hash_is_that_of_the_secret() -> None:
    minted = keys.mint(os.urandom, rounds=4)
    parsed = keys.parse(minted.token)
    assert parsed is not None
    assert keys.verify(parsed.secret, minted.secret_hash)
    assert minted.secret_hash.startswith("$2b$04$")


def test_repr_shows_no_secret() -> None:
    minted = keys.mint(os.urandom, rounds=4)
    parsed = keys.parse(minted.token)
    assert parsed is not None
    for shown in (repr(minted), str(minted), repr(parsed)):
        assert parsed.secret not in shown
        assert minted.secret_hash not in shown
        assert minted.public_id in shown


def test_the_digest_is_of_the_whole_token() -> None:
    assert keys.digest(TOKEN) != keys.digest(TOKEN[:-1] + "1")
    assert len(keys.digest(TOKEN)) == 32


def test_the_published_expression_is_in_the_documentation() -> None:
    assert keys.PATTERN in Path("docs/cli.md").read_text(encoding="utf-8")


def _mint(noise: bytes) -> str:
    source = iter(noise)
    return keys.mint(lambda count: bytes(next(source) for _ in range(count)), rounds=4).token


def _number(text: str) -> int:
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    total = 0
    for character in text:
        total = total * 62 + digits.index(character)
    return total


def test_a_refresh_token_is_written_like_a_key_and_is_none() -> None:
    minted = keys.mint_refresh(lambda count: b"\x07" * count)
    assert re.fullmatch(keys.PATTERN.replace("plm_", "plr_"), minted.token)
    assert keys.parse(minted.token) is None
    parsed = keys.parse(minted.token, keys.REFRESH_PREFIX)
    assert parsed is not None
    assert parsed.public_id == minted.public_id
    assert minted.secret_hash == keys.digest(minted.token).hex()
    key = keys.mint(lambda count: b"\x07" * count, rounds=4).token
    assert keys.parse(key, keys.REFRESH_PREFIX) is None
    assert minted.token not in repr(minted)
