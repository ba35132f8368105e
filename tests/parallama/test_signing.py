"""Signing keys: which one signs at what time, and files that are not as they should be."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from parallama import signing
from parallama.config import Authentication, Config
from parallama.config import JwtAlgorithm as Algorithm
from parallama.errors import ConfigError
from parallama.signing import KeyFolder, Keys, Named, Timing, plan
from parallama.tokens import TYPE, issue
from tests.examples import examples

NOW = 1_800_000_000.0
HOUR = 3600.0
TIMING = Timing(publish_before=HOUR, accept_after=1830.0)
SECRET = "made-up-secret-of-more-than-32-bytes"
ASYMMETRIC: tuple[Algorithm, ...] = ("RS256", "ES256", "EdDSA")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "signing"


def load(folder: Path, algorithm: Algorithm = "EdDSA", now: float = NOW) -> Keys:
    return Keys.load(folder, algorithm=algorithm, now=now, timing=TIMING)


def prepared(folder: Path, algorithm: Algorithm = "EdDSA", now: float = NOW) -> Keys:
    signing.ensure(folder, algorithm=algorithm, now=now)
    return load(folder, algorithm, now)


def rotated(folder: Path, now: float, *, at_once: bool = False) -> tuple[str, list[str]]:
    new, removed = signing.rotate(
        folder, algorithm="EdDSA", now=now, timing=TIMING, at_once=at_once
    )
    return new.kid, [named.kid for named in removed]


def a_token(keys: Keys, **fields: Any) -> str:
    told = {"user_id": "u", "jti": "j", "now": NOW, "settings": Authentication(), **fields}
    return issue(keys, **told)


def read(token: str, keys: Keys) -> dict[str, Any]:
    """As anybody else would, with another's code and our published keys."""
    kid = jwt.get_unverified_header(token)["kid"]
    if keys.algorithm == "HS256":
        key: Any = keys.public[kid]
    else:
        key = jwt.PyJWKSet.from_dict(keys.jwks())[kid]
    options: Any = {"verify_exp": False, "verify_nbf": False, "verify_iat": False}
    found: dict[str, Any] = jwt.decode(
        token, key, algorithms=[keys.algorithm], audience="parallama", options=options
    )
    return found


# Time alone decides.


@given(
    made=st.lists(st.integers(0, 20_000), min_size=1, max_size=6),
    publish_before=st.integers(0, 5_000),
    accept_after=st.integers(0, 5_000),
)
@examples(100)
def test_what_was_signed_is_accepted_for_its_life_and_what_signs_was_published_before(
    made: list[int], publish_before: int, accept_after: int
) -> None:
    keys = [Named(float(at), f"k{number}") for number, at in enumerate(made)]
    timing = Timing(float(publish_before), float(accept_after))
    oldest = min(keys, key=lambda key: (key.made, key.kid))
    signed_at: dict[Named, int] = {}
    told = plan(keys, now=-1.0, timing=timing)
    for now in range(0, 32_000, 97):
        there = [key for key in keys if key.made <= now]
        if not there:
            continue
        told = plan(there, now=float(now), timing=timing)
        assert told.signer is not None
        signed_at[told.signer] = now
        assert told.signer in told.accepted
        assert set(told.accepted) | set(told.over) == set(there)
        assert told.signer == oldest or told.signer.made + publish_before <= now
        for key, at in signed_at.items():  # a token lives no longer than it is accepted
            assert key in told.accepted or now >= at + accept_after
    assert told.accepted == (told.signer,)  # in the end nothing else is left


def test_a_plan_holds_until_it_says() -> None:
    keys = [Named(0.0, "a"), Named(100_000.0, "b")]
    at = 100_000.0
    seen = []
    while at < float("inf"):
        told = plan(keys, now=at, timing=TIMING)
        before = plan(keys, now=min(told.changes_at - 0.001, 1e9), timing=TIMING)
        assert (before.signer, before.accepted) == (told.signer, told.accepted)
        seen.append((at - 100_000, told.signer, len(told.accepted)))
        at = told.changes_at
    assert seen == [(0, keys[0], 2), (3600, keys[1], 2), (3600 + 1830, keys[1], 1)]


def test_no_key_no_plan() -> None:
    assert plan([], now=NOW, timing=TIMING).signer is None


# Tokens.


@pytest.mark.parametrize("algorithm", [*ASYMMETRIC, "HS256"])
def test_a_token_says_who_and_when_and_nothing_else(folder: Path, algorithm: Algorithm) -> None:
    keys = Keys.shared(SECRET) if algorithm == "HS256" else prepared(folder, algorithm)
    token = a_token(keys, now=NOW + 0.9)
    assert jwt.get_unverified_header(token) == {
        "typ": TYPE,
        "alg": algorithm,
        "kid": keys.signer.kid,
    }
    assert read(token, keys) == {
        "iss": "parallama",
        "aud": "parallama",
        "sub": "u",
        "jti": "j",
        "iat": int(NOW),
        "nbf": int(NOW),
        "exp": int(NOW) + 1800,
    }


def test_a_token_is_no_older_than_what_its_user_ended_in_the_same_second(folder: Path) -> None:
    keys = prepared(folder)
    token = read(a_token(keys, valid_from=NOW + 1), keys)
    assert token["iat"] == NOW + 1
    assert token["nbf"] == NOW
    assert read(a_token(keys, valid_from=NOW - 5), keys)["iat"] == NOW


@pytest.mark.parametrize("algorithm", ASYMMETRIC)
def test_what_is_published_is_public(folder: Path, algorithm: Algorithm) -> None:
    [told] = prepared(folder, algorithm).jwks()["keys"]
    assert told["use"] == "sig"
    assert told["alg"] == algorithm
    assert not told.keys() & {"d", "p", "q", "dp", "dq", "qi", "k"}


def test_a_shared_secret_is_never_published() -> None:
    assert Keys.shared(SECRET).jwks() == {"keys": []}
    assert SECRET not in repr(Keys.shared(SECRET))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="31 bytes"):
        Keys.shared("x" * 31)


# Rotation.


def test_a_new_key_is_published_at_once_signs_later_and_the_old_one_stays_for_its_tokens(
    folder: Path,
) -> None:
    old = prepared(folder)
    last_kid = old.signer.kid
    new_kid, removed = rotated(folder, NOW + 10)
    assert removed == []
    assert load(folder, now=NOW + 10).signer.kid == last_kid
    assert set(load(folder, now=NOW + 10).public) == {last_kid, new_kid}
    switched = NOW + 10 + HOUR
    assert load(folder, now=switched - 1).signer.kid == last_kid
    assert load(folder, now=switched).signer.kid == new_kid
    token = a_token(old)
    assert read(token, load(folder, now=switched + 1829))["sub"] == "u"
    assert set(load(folder, now=switched + 1830).public) == {new_kid}
    _, removed = rotated(folder, switched + 1830)
    assert removed == [last_kid]
    assert last_kid not in "".join(at.name for at in folder.iterdir())


def test_a_key_that_was_stolen_is_gone_at_once(folder: Path) -> None:
    old = prepared(folder)
    new_kid, removed = rotated(folder, NOW + 10, at_once=True)
    keys = load(folder, now=NOW + 10)
    assert keys.signer.kid == new_kid
    assert set(keys.public) == {new_kid}
    assert removed == [old.signer.kid]


def test_another_algorithm_has_keys_of_its_own(folder: Path) -> None:
    prepared(folder, "ES256")
    with pytest.raises(ConfigError, match="no key for EdDSA"):
        load(folder)
    keys = prepared(folder, "EdDSA")
    assert len(keys.public) == 1
    assert len(load(folder, "ES256").public) == 1


def test_many_who_make_a_first_key_at_once_make_one(folder: Path) -> None:
    def make() -> None:
        signing.ensure(folder, algorithm="EdDSA", now=NOW)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(folder.iterdir())) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    [key] = folder.iterdir()
    assert key.stat().st_mode & 0o777 == 0o600


# A process that runs.


def running(folder: Path, clock: Callable[[], float], **fields: Any) -> KeyFolder:
    told = {"signing_keys_dir": str(folder), "jwt_algorithm": "EdDSA", **fields}
    return KeyFolder(Config.model_validate({"authentication": told}), clock=clock)


def test_a_process_learns_of_a_rotation(folder: Path) -> None:
    now = NOW
    known = running(folder, lambda: now)
    signing.ensure(folder, algorithm="EdDSA", now=NOW)
    first = known.keys()
    assert known.keys() is first  # nothing is read again
    new_kid, _ = rotated(folder, NOW + 1)
    assert new_kid in known.keys().public
    assert known.keys().signer.kid == first.signer.kid
    now = NOW + 1 + HOUR  # its time comes without anybody touching the folder
    assert known.keys().signer.kid == new_kid


def test_a_process_looks_again_once_a_broken_file_is_mended(folder: Path) -> None:
    now = NOW
    known = running(folder, lambda: now)
    good = prepared(folder).signer.kid
    broken = folder / "20260101T000000Z-copied.pem"
    broken.touch(0o600)
    with pytest.raises(ConfigError, match=str(broken)):
        known.keys()
    # Written in place: the folder's own time stays.
    broken.write_bytes(pem(ec.generate_private_key(ec.SECP256R1())))
    now = NOW + 1
    assert known.keys().signer.kid == good


def test_a_secret_needs_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.touch(0o600)
    file.write_text(SECRET)
    told = {"jwt_algorithm": "HS256", "jwt_secret_key_file": str(file)}
    known = running(tmp_path / "nowhere", time.time, **told)
    assert known.keys().signer.algorithm == "HS256"


def test_a_secret_counts_for_nothing_beside_another_algorithm(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.touch(0o600)
    file.write_text(SECRET)
    folder = tmp_path / "signing"
    kid = prepared(folder).signer.kid
    known = running(folder, lambda: NOW, jwt_secret_key_file=str(file)).keys()
    assert known.algorithm == "EdDSA"
    assert known.public.keys() == {kid}


def test_a_first_key_is_made_only_where_the_folder_is_ours(tmp_path: Path) -> None:
    ours = Config.model_validate({"state_dir": str(tmp_path)})
    signing.prepare(ours, now=NOW)
    assert load(tmp_path / "signing", "RS256").algorithm == "RS256"
    theirs = {"signing_keys_dir": str(tmp_path / "keys")}
    signing.prepare(Config.model_validate({"authentication": theirs}), now=NOW)
    assert not (tmp_path / "keys").exists()


# What is wrong with a folder is said, with the file's name.


def pem(key: Any, password: bytes | None = None) -> bytes:
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption

    how = NoEncryption() if password is None else BestAvailableEncryption(password)
    told: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)
    return told


WEAK = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505
GOOD_NAME = "20260101T000000Z-a.pem"


def put(folder: Path, name: str, content: bytes, mode: int = 0o600) -> Path:
    folder.mkdir(mode=0o700)
    file = folder / name
    file.write_bytes(content)
    file.chmod(mode)
    return file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a private key in PEM"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not a private key"),
        (pem(ec.generate_private_key(ec.SECP256R1()), b"secret"), "without a password"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "of a kind that is not used"),
        (pem(WEAK), "2048 bits"),
        (b"\xff" * 100_000, "not a private key in PEM"),
    ],
    ids=["empty", "broken", "encrypted", "curve", "short", "binary"],
)
def test_a_file_that_is_no_key_is_named(folder: Path, content: bytes, said: str) -> None:
    file = put(folder, GOOD_NAME, content)
    with pytest.raises(ConfigError, match=said) as told:
        load(folder)
    assert str(file) in str(told.value)


@pytest.mark.parametrize("name", ["key.pem", "20260101-a.pem", "20269901T000000Z-a.pem", "20260101T000000Z-.pem", "20260101T000000Z-ä.pem"])  # fmt: skip  # noqa: E501
def test_a_file_with_another_name_is_named(folder: Path, name: str) -> None:
    file = put(folder, name, pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(ConfigError, match="not named as a key is") as told:
        load(folder)
    assert str(file) in str(told.value)


def test_two_files_for_one_key_are_refused(folder: Path) -> None:
    content = pem(ec.generate_private_key(ec.SECP256R1()))
    put(folder, GOOD_NAME, content)
    again = folder / "20260102T000000Z-a.pem"
    again.touch(0o600)
    again.write_bytes(content)
    with pytest.raises(ConfigError, match="two files for the key a"):
        load(folder, "ES256")


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620])
def test_a_key_that_others_may_use_is_refused(folder: Path, mode: int) -> None:
    file = put(folder, GOOD_NAME, b"", mode)
    with pytest.raises(ConfigError, match="chmod 600") as told:
        load(folder)
    assert str(file) in str(told.value)


@pytest.mark.parametrize("mode", [0o702, 0o720])
def test_a_folder_that_others_may_change_is_refused(folder: Path, mode: int) -> None:
    prepared(folder)
    folder.chmod(mode)
    with pytest.raises(ConfigError, match="chmod go-w"):
        load(folder)


def test_a_folder_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"{folder} does not exist: .*signing-keys rotate"):
        load(folder)


def test_a_file_in_the_place_of_the_folder_is_named(folder: Path) -> None:
    folder.touch()
    for use in (lambda: load(folder), lambda: prepared(folder)):
        with pytest.raises(ConfigError, match=str(folder)):
            use()


def test_half_written_files_are_passed_over(folder: Path) -> None:
    put(folder, f".{GOOD_NAME}", b"half")
    (folder / "README").touch()
    assert prepared(folder).signer.algorithm == "EdDSA"
