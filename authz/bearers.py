"""Access tokens: whose are they, and are they good? Ours, and those of issuers that are trusted."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from authz import jws
from authz.decide import INVALID_TOKEN, STRANGER, Deny
from authz.keysets import KeySet
from parallama.cache import Cache
from parallama.changes import Change
from parallama.clock import Clock
from parallama.db.accounts import Holder, TokenRecord

FindHolder = Callable[[str, Mapping[str, Any]], Awaitable[Holder | None]]
RolesOf = Callable[[Mapping[str, Any]], tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trusted:
    """
    An issuer, and what its tokens have to be like.

    `find_holder` says whose a token is, by its `sub` and all its claims. Tokens of one holder that
    differ in what `roles_of` says of them are asked about apart.
    """

    name: str
    audience: str
    algorithms: frozenset[str]
    types: frozenset[str]
    keys: KeySet
    find_holder: FindHolder
    roles_of: RolesOf = lambda _: ()
    outside: bool = False


_Whose = tuple[str, str, tuple[str, ...]]  # issuer, subject, roles


@dataclass(frozen=True, slots=True)
class _Verified:
    issuer: str
    subject: str
    id: str
    issued_at: float
    expires_at: float
    outside: bool


class Bearers:
    """
    Verifies tokens. Whose they are is remembered until a change signal names the user.

    Nothing about a token that is not good is told to who sent it: one answer is for all.
    """

    def __init__(
        self, issuers: Mapping[str, Trusted], *, size: int, skew: float, clock: Clock
    ) -> None:
        """`skew` is how far an issuer's clock may be from ours, in seconds."""
        self._issuers = issuers
        self._skew = skew
        self._clock = clock
        self._holders: Cache[_Whose, Holder] = Cache(size=size)

    def at_once(self, text: str) -> TokenRecord | Deny | None:
        """None where a store or an issuer has to be asked."""
        read = self._read(text)
        if read is None:
            return INVALID_TOKEN
        issuer, token = read
        key = issuer.keys.get(token.kid)
        if key is None:
            return None
        verified = self._verified(issuer, token, key)
        if verified is None:
            return INVALID_TOKEN
        holder = self._holders.peek(_whose(issuer, token))
        return None if holder is None else self._judged(verified, holder)

    async def find(self, text: str) -> TokenRecord | Deny:
        """Raises Unavailable."""
        read = self._read(text)
        if read is None:
            return INVALID_TOKEN
        issuer, token = read
        key = await issuer.keys.find(token.kid)
        verified = None if key is None else self._verified(issuer, token, key)
        if verified is None:
            return INVALID_TOKEN
        load = partial(issuer.find_holder, verified.subject, token.claims)
        holder = await self._holders.get(_whose(issuer, token), load)
        if holder is None:
            return STRANGER if issuer.outside else INVALID_TOKEN
        return self._judged(verified, holder)

    def _read(self, text: str) -> tuple[Trusted, jws.Token] | None:
        """A token and who it says it is from: only that issuer's keys count for it."""
        token = jws.read(text)
        name = token.claims.get("iss") if token is not None else None
        issuer = self._issuers.get(name) if isinstance(name, str) else None
        return None if token is None or issuer is None else (issuer, token)

    def _verified(self, issuer: Trusted, token: jws.Token, key: jws.Key) -> _Verified | None:
        """All that can be said without knowing whose it is."""
        claims = token.claims
        audience = claims.get("aud")
        subject = jws.text_claim(claims, "sub")
        issued_at, expires_at = jws.time_claim(claims, "iat"), jws.time_claim(claims, "exp")
        not_before = jws.time_claim(claims, "nbf") if "nbf" in claims else issued_at
        if subject is None or issued_at is None or expires_at is None or not_before is None:
            return None
        now = self._clock()
        good = (
            token.algorithm in issuer.algorithms
            and token.type in issuer.types
            and (audience == issuer.audience or _is_among(issuer.audience, audience))
            and max(issued_at, not_before) <= now + self._skew
            and now < expires_at + self._skew
            and jws.verify(token, key)  # the dearest comes last
        )
        id = jws.text_claim(claims, "jti") or hashlib.sha256(token.signed).hexdigest()
        until = expires_at + self._skew
        return (
            _Verified(issuer.name, subject, id, issued_at, until, issuer.outside) if good else None
        )

    def _judged(self, verified: _Verified, holder: Holder) -> TokenRecord | Deny:
        since = holder.account.tokens_valid_from
        if since is not None and verified.issued_at < since:
            return INVALID_TOKEN
        if verified.id in holder.revoked:
            return INVALID_TOKEN
        return TokenRecord(
            id=verified.id,
            issuer=verified.issuer,
            issued_at=verified.issued_at,
            account=holder.account,
            expires_at=verified.expires_at,
            scopes=holder.scopes,
            outside=verified.outside,
        )

    def on_change(self, change: Change) -> None:
        match change.kind:
            case "user":
                self._holders.forget(lambda _, holder: holder.account.id == change.id)
            # Whose it is need not be known here, and who comes back is asked about once.
            case "token" | "everything":
                self._holders.forget_all()

    def pause(self) -> None:
        self._holders.pause()

    def resume(self) -> None:
        self._holders.resume()


def _whose(issuer: Trusted, token: jws.Token) -> _Whose:
    return issuer.name, token.claims["sub"], issuer.roles_of(token.claims)


def _is_among(wanted: str, given: object) -> bool:
    return isinstance(given, list) and wanted in given
