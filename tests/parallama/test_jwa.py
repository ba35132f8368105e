"""Keys and signatures of tokens, held against PyJWT, which others use."""

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt import PyJWK
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm, get_default_algorithms

from parallama import jwa
from tests.examples import examples

THEIRS = get_default_algorithms()
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
P256, P384, P521 = map(ec.generate_private_key, (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()))
ED = ed25519.Ed25519PrivateKey.generate()
SECRET = b"s" * 32
KEYS: dict[str, Any] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), RSA),
    **{"ES256": P256, "ES384": P384, "ES512": P521, "EdDSA": ED},
}
ALGORITHMS = [*KEYS, "HS256"]
PUBLIC: dict[str, Any] = {**{name: key.public_key() for name, key in KEYS.items()}, "HS256": SECRET}
SIGNED = b"eyJhbGciOiJ4In0.e30"


def signature(algorithm: str, message: bytes = SIGNED) -> bytes:
    """By PyJWT."""
    return bytes(THEIRS[algorithm].sign(message, KEYS.get(algorithm, SECRET)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_others_signed_is_good_and_nothing_near_it(algorithm: str) -> None:
    key, made = PUBLIC[algorithm], signature(algorithm)
    assert jwa.verify(algorithm, key, SIGNED, made)
    assert not jwa.verify(algorithm, key, SIGNED + b".", made)
    for wrong in (made[:-1], made + b"\0", b"", bytes(len(made)), b"\xff" * len(made), made[::-1]):
        assert not jwa.verify(algorithm, key, SIGNED, wrong)


ORDER_OF_P256 = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ORDER_OF_ED25519 = 2**252 + 27742317777372353535851937790883648493


def test_numbers_out_of_their_range_are_no_second_spelling_of_a_signature() -> None:
    """Else what was seen, or revoked, could come again as another text."""
    made = signature("EdDSA")
    scalar = int.from_bytes(made[32:], "little") + ORDER_OF_ED25519
    assert not jwa.verify(
        "EdDSA", PUBLIC["EdDSA"], SIGNED, made[:32] + scalar.to_bytes(32, "little")
    )
    number = int.from_bytes(signature("RS256"), "big") + PUBLIC["RS256"].public_numbers().n
    if number < 1 << 2048:
        assert not jwa.verify("RS256", PUBLIC["RS256"], SIGNED, number.to_bytes(256, "big"))
    assert not jwa.verify("RS256", PUBLIC["RS256"], SIGNED, b"\0" + signature("RS256"))
    zero, order = bytes(32), ORDER_OF_P256.to_bytes(32, "big")
    r, s = signature("ES256")[:32], signature("ES256")[32:]
    for wrong in (zero + s, r + zero, zero + zero, order + s, r + order, order + order):
        assert not jwa.verify("ES256", PUBLIC["ES256"], SIGNED, wrong)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA", "HS256"])
def test_others_believe_what_we_sign(algorithm: Any) -> None:
    made = jwa.sign(algorithm, KEYS.get(algorithm, SECRET), SIGNED)
    assert THEIRS[algorithm].verify(SIGNED, PUBLIC[algorithm], made)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "none", "", "ES256K", "RS1", "HS1", "XX256"])
def test_a_key_is_good_for_its_own_kind_alone(algorithm: str) -> None:
    for name, key in PUBLIC.items():
        assert jwa.verify(algorithm, key, SIGNED, signature(name)) == (algorithm == name)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_the_text_of_a_public_key_is_no_secret(algorithm: str) -> None:
    for told in (jwa.public_bytes(KEYS[algorithm]), json.dumps(jwa.to_jwk(PUBLIC[algorithm]))):
        secret = told if isinstance(told, bytes) else told.encode()
        made = jwa.sign("HS256", secret, SIGNED)
        for claimed in ALGORITHMS:
            assert not jwa.verify(claimed, PUBLIC[algorithm], SIGNED, made)


def test_a_curve_belongs_to_its_hash() -> None:
    assert not jwa.verify("ES256", P384.public_key(), SIGNED, signature("ES384"))
    assert not jwa.verify("ES384", P256.public_key(), SIGNED, signature("ES256"))


def test_one_does_not_sign_with_anothers_key() -> None:
    with pytest.raises(ValueError, match="RSAPrivateKey is no key for HS256"):
        jwa.sign("HS256", RSA, SIGNED)


@pytest.mark.parametrize("algorithm", KEYS)
def test_public_keys_travel(algorithm: str) -> None:
    key = PUBLIC[algorithm]
    kinds = {"RSA": RSAAlgorithm, "EC": ECAlgorithm, "OKP": OKPAlgorithm}
    told = jwa.to_jwk(key)
    theirs = kinds[told["kty"]].to_jwk(key, as_dict=True)
    assert {name: theirs[name] for name in told} == told
    assert PyJWK.from_dict({**told, "alg": algorithm}).key == key
    assert jwa.from_jwk(json.loads(json.dumps(theirs))) == key


def test_a_key_with_a_small_exponent_travels_too() -> None:
    key = rsa.generate_private_key(public_exponent=3, key_size=2048).public_key()
    assert jwa.to_jwk(key)["e"] == "Aw"
    assert jwa.from_jwk(dict(jwa.to_jwk(key))) == key


WEAK = rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key()  # noqa: S505


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"kty": "oct", "k": "c2VjcmV0"},
        {"kty": ["RSA"]},
        jwa.to_jwk(WEAK),
        {**jwa.to_jwk(PUBLIC["RS256"]), "n": 7},
        {**jwa.to_jwk(PUBLIC["RS256"]), "e": "AA"},
        {**jwa.to_jwk(PUBLIC["ES256"]), "crv": "P-384"},
        {**jwa.to_jwk(PUBLIC["ES256"]), "crv": "secp256k1"},
        {**jwa.to_jwk(PUBLIC["ES256"]), "crv": ["P-256"]},
        {**jwa.to_jwk(PUBLIC["ES256"]), "x": jwa.to_jwk(PUBLIC["ES256"])["y"]},
        {**jwa.to_jwk(PUBLIC["EdDSA"]), "x": "AAAA"},
        {**jwa.to_jwk(PUBLIC["EdDSA"]), "crv": "X25519"},
    ],
)
def test_what_is_no_key_of_use(told: dict[str, Any]) -> None:
    assert jwa.from_jwk(told) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@examples(200)
@given(name=st.sampled_from([*KEYS]), changed=st.dictionaries(st.text(max_size=3), JSON))
def test_any_text_is_a_key_or_none(name: str, changed: dict[str, Any]) -> None:
    found = jwa.from_jwk({**jwa.to_jwk(PUBLIC[name]), **changed})
    assert found is None or isinstance(found, jwa.PublicKey)


@examples(200)
@given(algorithm=st.sampled_from(ALGORITHMS), made=st.binary(max_size=300))
def test_no_bytes_are_a_signature(algorithm: str, made: bytes) -> None:
    assert not jwa.verify(algorithm, PUBLIC[algorithm], SIGNED, made)
