"""Signed tokens (JWT in the compact form): read strictly, and held against a key (pure)."""

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

LARGEST = 16_384
"""Characters of a token. Those of large companies list groups; none of them comes near it."""

PUBLIC_KEY_ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)

# A signature, too: without one there is nothing to believe. JWE has five parts, and is not read.
_FORM = re.compile(r"([0-9A-Za-z_-]{1,2048})\.([0-9A-Za-z_-]+)\.([0-9A-Za-z_-]{1,2048})")
_LOOKS_SO = re.compile(r"eyJ[0-9A-Za-z_=-]*\.[0-9A-Za-z_=-]*\.")
_LONGEST_TEXT = 255
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
# By how many letters are over: of the last of two 4 bits mean nothing, of the last of three 2.
_LAST = {0: _LETTERS, 2: _LETTERS[::16], 3: _LETTERS[::4]}

# What would change how a token has to be read, and what we therefore must not pass over (RFC 7515
# 4.1.11, RFC 7516). A key that a token brings along (jwk, jku, x5c, x5u) is never looked at.
_CHANGES_MEANING = frozenset({"crit", "b64", "zip", "enc"})


@dataclass(frozen=True, slots=True)
class Token:
    """What a token says, which nobody has to believe before its signature was checked."""

    algorithm: str
    kid: str
    type: str
    """In lower case and without `application/`; empty where it is not said."""
    claims: Mapping[str, Any]
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Key:
    """What signatures are checked with, and the only algorithms it is for."""

    algorithms: frozenset[str]
    material: Any = field(repr=False)


def looks_like_one(text: str) -> bool:
    """Whether `text` is meant to be a signed token, be it a good one or not."""
    return text.count(".") == 2


def holds_one(text: str) -> bool:
    """Whether a signed token stands somewhere in `text`."""
    return "eyJ" in text and _LOOKS_SO.search(text) is not None


def read(text: str) -> Token | None:
    """None for what is no signed token, or could be read in two ways."""
    match = _FORM.fullmatch(text) if len(text) <= LARGEST else None
    if match is None:
        return None
    header = _header(match[1])
    payload, signature = _decoded(match[2]), _decoded(match[3])
    if header is None or payload is None or signature is None:
        return None
    claims = _object(payload)
    if claims is None:
        return None
    return Token(*header, claims, text[: match.end(2)].encode(), signature)


def verify(token: Token, key: Key) -> bool:
    """Whether the key's owner signed this token, by an algorithm that the key is for."""
    if token.algorithm not in key.algorithms:
        return False
    from parallama import jwa

    return jwa.verify(token.algorithm, key.material, token.signed, token.signature)


def text_claim(claims: Mapping[str, Any], name: str) -> str | None:
    """Text that can be stored and shown; None for anything else."""
    value = claims.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= _LONGEST_TEXT:
        return None
    return value if value.isprintable() else None


def time_claim(claims: Mapping[str, Any], name: str) -> float | None:
    """Seconds since the epoch; None for anything else."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # A number of any size may stand there, and not each of them is a float.
    return float(value) if 0 <= value < 1e12 and math.isfinite(value) else None


def parse_jwks(raw: bytes) -> dict[str, Key]:
    """
    The keys that an issuer publishes and that signatures of ours may be checked with.

    Others are passed over: an issuer may also publish keys for encryption, or of kinds we do not
    know. Raises ValueError where this is no set of keys, or none of them is of use.
    """
    document = _object(raw)
    listed = document.get("keys") if document is not None else None
    if not isinstance(listed, list):
        raise ValueError("not a JSON Web Key Set: there is no list `keys`")
    found: dict[str, Key] = {}
    for each in listed:
        kid = text_claim(each, "kid") if isinstance(each, dict) else None
        key = _public_key(each) if kid is not None else None
        if kid is not None and key is not None:
            found.setdefault(kid, key)
    if not found:
        raise ValueError("no key in it has a `kid` and is for signatures we know")
    return found


@lru_cache(maxsize=256)
def _header(part: str) -> tuple[str, str, str] | None:
    """Algorithm, key and type. One key's tokens have it in common, so it is read once."""
    raw = _decoded(part)
    header = _object(raw) if raw is not None else None
    if header is None or not _CHANGES_MEANING.isdisjoint(header):
        return None
    algorithm, kid = text_claim(header, "alg"), text_claim(header, "kid")
    type = header.get("typ", "")
    if algorithm is None or kid is None or not isinstance(type, str):
        return None
    return algorithm, kid, type.lower().removeprefix("application/")


def _decoded(part: str) -> bytes | None:
    """None also where the same bytes would usually be written another way."""
    over = len(part) % 4
    if over == 1 or part[-1] not in _LAST[over]:
        return None
    return base64.urlsafe_b64decode(part + "==")


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = _DECODER.decode(raw.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) != len(pairs):
        raise ValueError("a name is there twice")
    return named


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_named_once, parse_constant=_no_constant)


def _public_key(given: dict[str, Any]) -> Key | None:
    if given.get("use", "sig") != "sig" or "verify" not in given.get("key_ops", ["verify"]):
        return None
    # `oct` is a secret, and who publishes a secret (`d`) has none any more.
    algorithms = _algorithms_of(given)
    if algorithms is None or "d" in given:
        return None
    from parallama import jwa

    material = jwa.from_jwk(given)
    if material is None:
        return None
    named = given.get("alg")
    fitting = frozenset(algorithms if named is None else {named} & set(algorithms))
    return Key(fitting, material) if fitting else None


def _algorithms_of(given: dict[str, Any]) -> tuple[str, ...] | None:
    match given.get("kty"), given.get("crv"):
        case "RSA", _:
            return PUBLIC_KEY_ALGORITHMS[:6]
        case "EC", "P-256":
            return ("ES256",)
        case "EC", "P-384":
            return ("ES384",)
        case "EC", "P-521":
            return ("ES512",)
        case "OKP", "Ed25519":
            return ("EdDSA",)
    return None
