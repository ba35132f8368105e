"""
Keys and signatures of tokens (RFC 7518), by `cryptography`.

That takes 8 MB and 50 ms, so this is imported where a token has to be made or checked, and not by
a process that has not seen one.
"""

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from parallama.config import JwtAlgorithm as Algorithm

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

LEAST_RSA_BITS = 2048

_HASHES: Final[dict[str, HashAlgorithm]] = {"256": SHA256(), "384": SHA384(), "512": SHA512()}
_CURVES: Final[dict[str, ec.EllipticCurve]] = {
    "P-256": ec.SECP256R1(),
    "P-384": ec.SECP384R1(),
    "P-521": ec.SECP521R1(),
}
_CURVE_NAMES: Final = {curve.name: name for name, curve in _CURVES.items()}
_PKCS1 = padding.PKCS1v15()
_PSS: Final = {
    bits: padding.PSS(padding.MGF1(hash), hash.digest_size) for bits, hash in _HASHES.items()
}
_ECDSA: Final = {bits: ec.ECDSA(hash) for bits, hash in _HASHES.items()}
_CURVE_OF: Final = {"256": "secp256r1", "384": "secp384r1", "512": "secp521r1"}


def make(algorithm: Algorithm) -> PrivateKey:
    """A new key. Raises ValueError for HS256, which has none."""
    match algorithm:
        case "RS256":
            return rsa.generate_private_key(public_exponent=65537, key_size=LEAST_RSA_BITS)
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
        case "EdDSA":
            return ed25519.Ed25519PrivateKey.generate()
    raise ValueError(f"{algorithm} has no keys")


def load(pem: bytes) -> PrivateKey | None:
    """None for a kind of key that is not used. Raises ValueError where this is no private key."""
    try:
        # Checking primes takes a tenth of a second, and these are our own.
        key = load_pem_private_key(pem, None, unsafe_skip_rsa_key_validation=True)
    except (TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(str(error)) from None
    match key:
        case rsa.RSAPrivateKey() if key.key_size >= LEAST_RSA_BITS:
            return key
        case ec.EllipticCurvePrivateKey() if isinstance(key.curve, ec.SECP256R1):
            return key
        case ed25519.Ed25519PrivateKey():
            return key
    return None


def algorithm_of(key: PrivateKey) -> Algorithm:
    match key:
        case rsa.RSAPrivateKey():
            return "RS256"
        case ec.EllipticCurvePrivateKey():
            return "ES256"
    return "EdDSA"


def pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_bytes(key: PrivateKey) -> bytes:
    """The public half, the same bytes each time."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def to_jwk(key: PublicKey) -> dict[str, str]:
    match key:
        case rsa.RSAPublicKey():
            told = key.public_numbers()
            return {"kty": "RSA", "n": _number(told.n), "e": _number(told.e)}
        case ec.EllipticCurvePublicKey():
            point, size = key.public_numbers(), _bytes_of(key)
            curve = _CURVE_NAMES[key.curve.name]
            x, y = _number(point.x, size), _number(point.y, size)
            return {"kty": "EC", "crv": curve, "x": x, "y": y}
    return {"kty": "OKP", "crv": "Ed25519", "x": _text(key.public_bytes_raw())}


def from_jwk(given: dict[str, Any]) -> PublicKey | None:
    """None for what is no public key that signs, or one that is too weak."""
    try:
        match given["kty"]:
            case "RSA":
                numbers = rsa.RSAPublicNumbers(_int(given["e"]), _int(given["n"]))
                made = numbers.public_key()
                return made if made.key_size >= LEAST_RSA_BITS else None
            case "EC":
                curve, x, y = _CURVES[given["crv"]], _int(given["x"]), _int(given["y"])
                return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
            case "OKP" if given["crv"] == "Ed25519":
                return ed25519.Ed25519PublicKey.from_public_bytes(_bytes(given["x"]))
    except (ValueError, TypeError, KeyError, AttributeError, UnsupportedAlgorithm):
        pass
    return None


def sign(algorithm: Algorithm, key: Any, message: bytes) -> bytes:
    """With a private key, or for HS256 with the secret itself."""
    match algorithm, key:
        case "RS256", rsa.RSAPrivateKey():
            return key.sign(message, _PKCS1, _HASHES["256"])
        case "ES256", ec.EllipticCurvePrivateKey():
            r, s = decode_dss_signature(key.sign(message, _ECDSA["256"]))
            size = _bytes_of(key)
            return r.to_bytes(size, "big") + s.to_bytes(size, "big")
        case "EdDSA", ed25519.Ed25519PrivateKey():
            return key.sign(message)
        case "HS256", bytes():
            return hmac.digest(key, message, "sha256")
    raise ValueError(f"{type(key).__name__} is no key for {algorithm}")


def verify(algorithm: str, key: Any, message: bytes, signature: bytes) -> bool:
    """Whether who has the other half of `key` signed this. A key of another kind never did."""
    kind, bits = algorithm[:2], algorithm[2:]
    try:
        match kind, key:
            case "RS", rsa.RSAPublicKey():
                key.verify(signature, message, _PKCS1, _HASHES[bits])
            case "PS", rsa.RSAPublicKey():
                key.verify(signature, message, _PSS[bits], _HASHES[bits])
            case "ES", ec.EllipticCurvePublicKey():
                size = _bytes_of(key)
                if len(signature) != 2 * size or key.curve.name != _CURVE_OF[bits]:
                    return False
                r, s = signature[:size], signature[size:]
                der = encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big"))
                key.verify(der, message, _ECDSA[bits])
            case "Ed", ed25519.Ed25519PublicKey():
                key.verify(signature, message)
            case "HS", bytes():
                return hmac.compare_digest(signature, hmac.digest(key, message, f"sha{bits}"))
            case _:
                return False
    except (InvalidSignature, ValueError, KeyError):
        return False
    return True


def verify_ed25519(point: bytes, message: bytes, signature: bytes) -> bool:
    """The same by a key as OpenSSH has it."""
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(point)
    except ValueError:
        return False
    return verify("EdDSA", key, message, signature)


def _bytes_of(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> int:
    """How long a coordinate is, and each half of a signature."""
    return (key.key_size + 7) // 8


def _text(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return urlsafe_b64decode(text + "==")


def _number(value: int, size: int = 0) -> str:
    """In `size` bytes, or in as few as it takes."""
    return _text(value.to_bytes(size or (value.bit_length() + 7) // 8, "big"))


def _int(text: str) -> int:
    return int.from_bytes(_bytes(text), "big")
