"""Signs requests as the `ollama` command does with OLLAMA_AUTH=1, by its own ed25519 key."""

import time
from base64 import b64encode
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat


@dataclass(frozen=True)
class OllamaCommand:
    """`base` is the path in OLLAMA_HOST, which is part of the address and not of what is signed."""

    base: str = ""
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def public_key_file(self) -> str:
        """What ~/.ollama/id_ed25519.pub holds."""
        encoded = self.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        return f"{encoded.decode()} anna@laptop\n"

    def call(self, method: str, path: str, *, at: float | None = None) -> tuple[str, str]:
        """The target of a request and its header `authorization`."""
        stamp = int(time.time() if at is None else at)
        signature = self.sign(f"{method},{path}?ts={stamp}")
        return f"{self.base}{path}?ts={stamp}", f"{self.encoded_key}:{signature}"

    @property
    def encoded_key(self) -> str:
        return self.public_key_file.split()[1]

    def sign(self, message: str) -> str:
        return b64encode(self.key.sign(message.encode())).decode()
