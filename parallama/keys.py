"""API keys, and refresh tokens like them: form, making, keeping (pure but for bcrypt)."""

import hashlib
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import bcrypt

PREFIX = "plm_"
REFRESH_PREFIX = "plr_"

PATTERN = r"plm_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}"
"""Finds keys in text; published for secret scanners. `parse` also checks the checksum."""

_TOKEN = re.compile(
    r"(?P<body>(?P<prefix>pl[mr]_)(?P<id>[0-9A-Za-z]{12})_(?P<secret>[0-9A-Za-z]{43}))"
    r"(?P<sum>[0-9A-Za-z]{6})"
)
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 12
_SECRET_LENGTH = 43  # 62 ** 43 > 2 ** 256
_SECRET_BYTES = 32
_SUM_LENGTH = 6  # 62 ** 6 > 2 ** 32


@dataclass(frozen=True, slots=True)
class Minted:
    """A new key. `token` is for its owner's eyes, once; the rest is stored."""

    token: str = field(repr=False)
    public_id: str
    secret_hash: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """The two halves of a well-formed token: what it is found by, and what proves it."""

    public_id: str
    secret: str = field(repr=False)


def mint(random_bytes: Callable[[int], bytes], *, rounds: int) -> Minted:
    """
    A key with 256 bits of secret from `random_bytes`, hashed at bcrypt cost `rounds`.

    A low cost is enough: it slows down guessing, and 256 bits cannot be guessed.
    """
    token, public_id, secret = _make(random_bytes, PREFIX)
    return Minted(token, public_id, hash_secret(secret, rounds))


def mint_refresh(random_bytes: Callable[[int], bytes]) -> Minted:
    """A refresh token. It is used once: nothing would be won by a hash that takes time."""
    token, public_id, _ = _make(random_bytes, REFRESH_PREFIX)
    return Minted(token, public_id, digest(token).hex())


def _make(random_bytes: Callable[[int], bytes], prefix: str) -> tuple[str, str, str]:
    # Four bytes more than the id can hold: no digit is noticeably likelier than another.
    public_id = _base62(int.from_bytes(random_bytes(13)) % 62**_ID_LENGTH, _ID_LENGTH)
    secret = _base62(int.from_bytes(random_bytes(_SECRET_BYTES)), _SECRET_LENGTH)
    body = f"{prefix}{public_id}_{secret}"
    return body + _checksum(body), public_id, secret


def parse(token: str, prefix: str = PREFIX) -> ParsedKey | None:
    """None unless `token` has the form of a key and its checksum is right; nothing is looked up."""
    match = _TOKEN.fullmatch(token)
    if match is None or match["prefix"] != prefix or match["sum"] != _checksum(match["body"]):
        return None
    return ParsedKey(match["id"], match["secret"])


def public_id_of(data: bytes) -> str:
    """Stands for `data`, such as the public half of a key, as a public id."""
    return _base62(int.from_bytes(hashlib.sha256(data).digest()) % 62**_ID_LENGTH, _ID_LENGTH)


def hash_secret(secret: str, rounds: int) -> str:
    return bcrypt.hashpw(secret.encode(), bcrypt.gensalt(rounds)).decode()


def verify(secret: str, secret_hash: str) -> bool:
    """Whether `secret` is the one behind the hash, in constant time. A damaged hash fits none."""
    try:
        return bcrypt.checkpw(secret.encode(), secret_hash.encode())
    except ValueError:
        return False


def digest(token: str) -> bytes:
    """Stands for the whole token where it must be remembered without being kept."""
    return hashlib.sha256(token.encode()).digest()


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _SUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))
