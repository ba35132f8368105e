"""Signed tokens for the tests of authz: good by default, with any part of them made wrong."""

import base64
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from authz.bearers import Bearers, FindHolder, RolesOf, Trusted
from authz.jws import Key
from authz.keysets import KeySet
from parallama.db.accounts import Holder
from tests.authz.make import ACCOUNT, NOW

US, THEM = "https://us.test", "https://sso.test"
AUDIENCE = "parallama"


def private(algorithm: str = "RS256", seed: int = 0) -> Any:
    """A key of its own for each `seed`."""
    return _private(algorithm, seed)


@lru_cache
def _private(algorithm: str, seed: int) -> Any:
    match algorithm:
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
        case "EdDSA":
            return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(65537, 2048)


def jwk(algorithm: str = "RS256", seed: int = 0, **fields: Any) -> dict[str, Any]:
    public = private(algorithm, seed).public_key()
    kind: Any = {"ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}.get(algorithm, RSAAlgorithm)
    told = {
        name: value
        for name, value in kind.to_jwk(public, as_dict=True).items()
        if name != "key_ops"
    }
    return {**told, "kid": f"{algorithm}-{seed}", "use": "sig", **fields}


def jwks(*listed: Mapping[str, Any]) -> bytes:
    return json.dumps({"keys": listed or [jwk()]}).encode()


def claims(**fields: Any) -> dict[str, Any]:
    """None leaves one out."""
    all_of_them = {
        "iss": US,
        "aud": AUDIENCE,
        "sub": ACCOUNT.id,
        "jti": "token-1",
        "iat": int(NOW),
        "nbf": int(NOW),
        "exp": int(NOW) + 1800,
        **fields,
    }
    return {name: value for name, value in all_of_them.items() if value is not None}


def a_token(
    *,
    algorithm: str = "RS256",
    seed: int = 0,
    key: Any = None,
    header: Mapping[str, Any] | None = None,
    **fields: Any,
) -> str:
    said = {"alg": algorithm, "typ": "at+jwt", "kid": f"{algorithm}-{seed}", **(header or {})}
    signer = key or private(algorithm, seed)
    return signed(
        json.dumps({name: value for name, value in said.items() if value is not None}),
        json.dumps(claims(**fields)),
        algorithm=algorithm,
        key=signer,
    )


def encoded(raw: bytes | str) -> str:
    """As parts of a token are."""
    given = raw.encode() if isinstance(raw, str) else raw
    return base64.urlsafe_b64encode(given).rstrip(b"=").decode()


def signed(
    header: bytes | str, payload: bytes | str, *, algorithm: str = "RS256", key: Any = None
) -> str:
    """Any bytes, with a signature that is right."""
    message = f"{encoded(header)}.{encoded(payload)}"
    signer: Any = jwt.get_algorithm_by_name(algorithm)
    return f"{message}.{encoded(signer.sign(message.encode(), key or private(algorithm)))}"


class KnownKeys(KeySet):
    """Keys that need no loading."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        async def load() -> Mapping[str, Key]:
            raise AssertionError("loaded")

        super().__init__(load, name=US, monotonic=lambda: 0.0, on_withdrawn=lambda: None)
        self._take(keys)
        self._tried_at = 0.0


def keys_of(*algorithms: str) -> KnownKeys:
    return KnownKeys(
        {
            f"{each}-0": Key(frozenset({each}), private(each).public_key())
            for each in algorithms or ("RS256",)
        }
    )


async def anna(subject: str, _: Mapping[str, Any]) -> Holder | None:
    return Holder(account=ACCOUNT) if subject == ACCOUNT.id else None


def an_issuer(
    *algorithms: str,
    name: str = US,
    find_holder: FindHolder = anna,
    types: frozenset[str] = frozenset({"at+jwt"}),
    roles_of: RolesOf = lambda _: (),
    outside: bool = False,
) -> Trusted:
    return Trusted(
        name=name,
        audience=AUDIENCE,
        algorithms=frozenset(algorithms or ("RS256",)),
        types=types,
        keys=keys_of(*algorithms),
        find_holder=find_holder,
        roles_of=roles_of,
        outside=outside,
    )


def trusting(
    *issuers: Trusted, clock: Callable[[], float] = lambda: NOW, skew: float = 30
) -> Bearers:
    return Bearers({each.name: each for each in issuers}, size=100, skew=skew, clock=clock)
