"""Requests that the `ollama` command signs with its own key: is the signature good, and new?"""

import hashlib
import re
from base64 import b64decode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from authz.decide import Allow, Asked, Deny, Signature
from parallama import sshkeys
from parallama.cache import Cache
from parallama.changes import Change
from parallama.clock import Clock
from parallama.db.accounts import KeyRecord
from parallama.lanes import Script
from parallama.pipeline import Pipeline
from parallama.roles import GATEWAYS

STAMP = "ts"
"""The parameter of the query that the upstream has no use for."""

SEEN = Script.load("authz", "seen.lua")

# One answer for whatever is wrong: who guesses learns nothing. The command shows it to its user
# because the status is 403; of a 401 it would show the status alone.
UNACCEPTED = Deny(
    403,
    "signature_refused",
    "This signed request was not accepted. Is your public key registered (parallama keys add-ssh), "
    "and is your clock right? Of requests that are alike, one is accepted each second.",
)

_HEADER = re.compile(r"([A-Za-z0-9+/]{68}):([A-Za-z0-9+/]{86}==)")
_STAMP = re.compile(r"ts=([0-9]{1,12})")

# The command asks this twice in one second (`ollama run`), and the same request has the same
# signature: who repeats it at once, from the same address, learns nothing new.
_ASKED_TWICE = ("POST", "/api/show")
_AT_ONCE_SECONDS = 1.5

# Clocks of replicas differ by less.
_SKEW_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Signed:
    """What a signed request says: the key, when, and what for."""

    blob: bytes
    at: int
    message: bytes
    signature: bytes = field(repr=False)


def parse(asked: Asked, signature: Signature) -> Signed | None:
    """
    None for what the command does not send. The time stamp is all of the query.

    The command calls models: where a body says whom to make an admin, it has to be vouched for.
    """
    if asked.gateway not in GATEWAYS:
        return None
    parts, stamp = _HEADER.fullmatch(signature.text), _STAMP.fullmatch(asked.query)
    blob = sshkeys.parse_blob(parts[1]) if parts else None
    if parts is None or stamp is None or blob is None:
        return None
    message = f"{asked.method},{asked.path}?{asked.query}".encode()
    return Signed(blob, int(stamp[1]), message, b64decode(parts[2]))


def is_genuine(signed: Signed) -> bool:
    """Whether whoever has the private half of this key, registered or not, signed this."""
    from parallama import jwa

    return jwa.verify_ed25519(sshkeys.point(signed.blob), signed.message, signed.signature)


def told(decision: Allow | Deny) -> Allow | Deny:
    """What was decided about the key, as the command can make use of it."""
    if isinstance(decision, Allow):
        return replace(decision, signed=True)
    return replace(decision, status=403) if decision.status == 401 else decision


class Signatures:
    """
    Finds the registered key behind a signed request, once for each request.

    `window` is how many seconds a time stamp may be from now. What was signed is remembered, by all
    replicas together, for as long as its stamp is good. Registered keys are remembered here, until
    a change signal names one or its user.
    """

    def __init__(
        self,
        find_key: Callable[[str], Awaitable[KeyRecord | None]],
        memory: Pipeline,
        *,
        window: int,
        size: int,
        clock: Clock,
    ) -> None:
        self._find_key = find_key
        self._memory = memory
        self._window = window
        self._clock = clock
        self._cache: Cache[bytes, KeyRecord] = Cache(size=size)

    async def find(self, asked: Asked, signature: Signature) -> KeyRecord | None:
        """None for a signature that is not good, not new or of a key nobody knows. May raise
        Unavailable: what cannot be remembered is not accepted."""
        signed = parse(asked, signature)
        if signed is None or abs(self._clock() - signed.at) > self._window:
            return None
        # First of all: who has no key of ours makes us ask neither of the stores.
        if not is_genuine(signed):
            return None
        record = await self._registered(signed.blob)
        return record if record and await self._is_new(asked, signed) else None

    async def _registered(self, blob: bytes) -> KeyRecord | None:
        line = sshkeys.PublicKey(blob).line

        async def load() -> KeyRecord | None:
            record = await self._find_key(sshkeys.public_id(blob))
            # An id is short: somebody may make a key that has another one's.
            fits = record is not None and record.kind == "ssh" and record.secret_hash == line
            return record if fits else None

        return await self._cache.get(blob, load)

    async def _is_new(self, asked: Asked, signed: Signed) -> bool:
        """Envoy asks again when an answer got lost: that is the same request, by its id."""
        now = self._clock()
        name = hashlib.sha256(signed.blob + signed.message).hexdigest()
        keep = 2 * self._window + _SKEW_SECONDS
        mine = f"{asked.request_id} {now:.3f} {asked.address}"
        first = await self._memory.run(SEEN, [f"signed:{{{name}}}"], [mine, keep])
        if first is None:
            return True
        request_id, at, address = first.decode().split(" ")
        if asked.request_id and request_id == asked.request_id:
            return True
        twice = (asked.method, asked.path) == _ASKED_TWICE and address == asked.address
        return twice and now - float(at) < _AT_ONCE_SECONDS

    def on_change(self, change: Change) -> None:
        match change.kind:
            case "key":
                self._cache.forget(lambda _, record: record.id == change.id)
            case "user":
                self._cache.forget(lambda _, record: record.account.id == change.id)
            case "everything":
                self._cache.forget_all()

    def pause(self) -> None:
        self._cache.pause()

    def resume(self) -> None:
        self._cache.resume()
