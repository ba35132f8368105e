"""Public keys as OpenSSH writes them: read, named, compared (pure)."""

import binascii
from base64 import b64decode, b64encode
from dataclasses import dataclass

from parallama import keys
from parallama.errors import UsageError

KIND = "ssh-ed25519"

# A length, the kind, a length: what stands before the 32 bytes of the key itself.
_HEAD = b"\0\0\0\x0b" + KIND.encode() + b"\0\0\0\x20"
_BLOB_BYTES = len(_HEAD) + 32
_TEXT_LENGTH = _BLOB_BYTES // 3 * 4
_LONGEST_FILE = 16 * 1024


@dataclass(frozen=True, slots=True)
class PublicKey:
    """`blob` is all that OpenSSH says of the key, kind included; `comment` may be empty."""

    blob: bytes
    comment: str = ""

    @property
    def public_id(self) -> str:
        """What it is found by."""
        return public_id(self.blob)

    @property
    def line(self) -> str:
        """As it is stored: without the comment, so that each key has one."""
        return f"{KIND} {b64encode(self.blob).decode()}"


def public_id(blob: bytes) -> str:
    return keys.public_id_of(blob)


def point(blob: bytes) -> bytes:
    """The 32 bytes that a signature is checked with."""
    return blob[len(_HEAD) :]


def parse_blob(text: str) -> bytes | None:
    """What the base64 of an ed25519 key stands for; None for everything else."""
    if len(text) != _TEXT_LENGTH or not text.isascii():
        return None
    try:
        blob = b64decode(text, validate=True)
    except binascii.Error:
        return None
    return blob if len(blob) == _BLOB_BYTES and blob.startswith(_HEAD) else None


def read(text: str) -> PublicKey:
    """The one key in a file such as ~/.ollama/id_ed25519.pub. Raises UsageError."""
    if "PRIVATE KEY" in text[:_LONGEST_FILE]:
        raise UsageError("this is a private key, which belongs to its owner alone: name the .pub")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) != 1 or len(text) > _LONGEST_FILE:
        raise UsageError(f"a public key file has one line, such as: {KIND} AAAA... comment")
    kind, _, rest = lines[0].strip().partition(" ")
    encoded, _, comment = rest.strip().partition(" ")
    blob = parse_blob(encoded)
    if kind != KIND or blob is None:
        raise UsageError(
            f"not a public key of the kind that the ollama command has: {KIND} AAAA..."
        )
    return PublicKey(blob, comment.strip())
