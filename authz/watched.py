"""What Envoy remembers of answers that run, and how it is told to cut them (pure)."""

import hashlib
import struct
from base64 import urlsafe_b64encode
from dataclasses import dataclass

from parallama.db.accounts import Credential, TokenRecord
from parallama.dialects import refusal

SLOT = 128  # the number of the stream, the size of the word, and the word: `watch_word`
_HEAD = struct.Struct("<II")
_CUT = struct.Struct("<III")  # the number of the stream, a status, the size of a body

_STATUS, _CODE = 401, "credential_revoked"
_MESSAGE = "This request was stopped: its key or token was revoked, or its user disabled."

_KEY, TOKEN = "key", "token"


@dataclass(frozen=True, slots=True)
class Watched:
    """On what it depends that a stream goes on. `id` is a key's, or the digest of a token's."""

    dialect: str
    user: str
    kind: str
    id: str
    issued_at: float = 0.0


def watch_word(credential: Credential, dialect: str) -> str:
    """What Envoy keeps of a stream, and asks about: few plain letters, and no secret."""
    user = credential.account.id
    if isinstance(credential, TokenRecord):
        id = token_digest(credential.id, credential.issuer)
        return f"{dialect} {user} {TOKEN} {id} {credential.issued_at:.3f}"
    return f"{dialect} {user} {_KEY} {credential.id}"


def read_word(word: bytes) -> Watched:
    dialect, user, kind, id, *issued_at = word.decode().split(" ")
    return Watched(dialect, user, kind, id, *map(float, issued_at))


def streams_in(message: bytes) -> list[tuple[int, bytes]]:
    """The streams that run in a worker of Envoy: their numbers and words."""
    found = []
    for at in range(0, len(message), SLOT):
        number, size = _HEAD.unpack_from(message, at)
        start = at + _HEAD.size
        found.append((number, message[start : start + size]))
    return found


def cut(number: int, dialect: str) -> bytes:
    """To cut this stream. The words are for clients who were sent nothing yet."""
    body = refusal(dialect, _STATUS, _CODE, _MESSAGE)
    return _CUT.pack(number, _STATUS, len(body)) + body


def token_digest(id: str, issuer: str) -> str:
    """A token's id is its issuer's to choose, and may be long."""
    told = hashlib.sha256(f"{issuer}\0{id}".encode()).digest()
    return urlsafe_b64encode(told[:16]).rstrip(b"=").decode()
