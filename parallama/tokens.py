"""Access tokens: JSON web tokens (RFC 9068) that say who, and never what they may do (pure)."""

import json
import math
from base64 import urlsafe_b64encode
from typing import Any

from parallama.config import Authentication
from parallama.signing import Keys

TYPE = "at+jwt"
"""Of no other token that we sign: what was signed for another purpose is no access token."""


def issue(
    keys: Keys,
    *,
    user_id: str,
    jti: str,
    now: float,
    settings: Authentication,
    valid_from: float | None = None,
) -> str:
    """
    A token of ours. `valid_from` is the user's `tokens_valid_from`: this one is no older, although
    both may fall into one second.
    """
    from parallama.jwa import sign

    at = int(now)
    claims = {
        "iss": settings.token_issuer,
        "aud": settings.token_audience,
        "sub": user_id,
        "jti": jti,
        "iat": max(at, math.ceil(valid_from or 0)),
        "nbf": at,
        "exp": at + settings.access_token_expire_minutes * 60,
    }
    signer = keys.signer
    header = {"alg": signer.algorithm, "typ": TYPE, "kid": signer.kid}
    signed = b".".join((_part(header), _part(claims)))
    return b".".join((signed, _encoded(sign(signer.algorithm, signer.key, signed)))).decode()


def _part(told: dict[str, Any]) -> bytes:
    return _encoded(json.dumps(told, separators=(",", ":")).encode())


def _encoded(raw: bytes) -> bytes:
    return urlsafe_b64encode(raw).rstrip(b"=")
