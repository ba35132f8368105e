"""Tokens are read in one way or not at all, and held against keys that are for them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from authz import jws
from tests.authz.tokens import a_token, claims, encoded, jwk, jwks, private, signed
from tests.examples import examples

HEADER = json.dumps({"alg": "RS256", "typ": "at+jwt", "kid": "RS256-0"})
CLAIMS = json.dumps(claims())
ALGORITHMS = ("RS256", "ES256", "EdDSA")


def known(algorithm: str = "RS256") -> jws.Key:
    return jws.Key(frozenset({algorithm}), private(algorithm).public_key())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_token_is_read_and_verified(algorithm: str) -> None:
    token = jws.read(a_token(algorithm=algorithm))
    assert token is not None
    assert (token.algorithm, token.kid, token.type) == (algorithm, f"{algorithm}-0", "at+jwt")
    assert token.claims == claims()
    assert jws.verify(token, known(algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_changed_token_is_not_verified(algorithm: str, part: int) -> None:
    parts = a_token(algorithm=algorithm).split(".")
    other = a_token(algorithm=algorithm, jti="another", header={"x": "y"}).split(".")
    parts[part] = other[part]
    token = jws.read(".".join(parts))
    assert token is None or not jws.verify(token, known(algorithm))


def test_a_key_is_for_its_own_algorithms_alone() -> None:
    token = jws.read(a_token())
    assert token is not None
    assert not jws.verify(token, jws.Key(frozenset({"RS512"}), private().public_key()))
    assert not jws.verify(token, jws.Key(frozenset({"RS256"}), private(seed=1).public_key()))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "..",
        "a.b",
        "a.b.c.d",
        a_token() + ".",
        "." + a_token(),
        a_token() + "=",
        a_token() + "\n",
        a_token().replace(".", ".."),
        a_token().rpartition(".")[0] + ".",
        a_token().partition(".")[0] + ".." + a_token().rpartition(".")[2],
        "A" * jws.LARGEST + ".B.C",
        encoded(HEADER) + "." + "A" * jws.LARGEST + ".AAAA",
        signed(HEADER, "[]"),
        signed(HEADER, "7"),
        signed(HEADER, ""),
        signed(HEADER, b"\xff\xfe"),
        signed(HEADER, CLAIMS.encode("utf-16")),
        signed(HEADER, "\ufeff" + CLAIMS),
        signed(HEADER, CLAIMS + " {}"),
        signed(HEADER, CLAIMS[:-1] + ', "sub": "somebody else"}'),
        signed(HEADER, '{"a": {"b": 1, "b": 2}}'),
        signed(HEADER, '{"exp": NaN}'),
        signed(HEADER, '{"exp": Infinity}'),
        signed(HEADER, '{"exp": ' + "9" * 5000 + "}"),
        signed(HEADER, '{"a":' * 2000 + "1" + "}" * 2000),
        signed(HEADER, '{"a":' + "[" * 5000 + "]" * 5000 + "}"),
        signed("[]", CLAIMS),
        signed("{}", CLAIMS),
        signed('{"alg": "RS256"}', CLAIMS),
        signed('{"alg": "RS256", "kid": ""}', CLAIMS),
        signed('{"alg": "RS256", "kid": 7}', CLAIMS),
        signed('{"alg": "RS256", "kid": "a\\u0000b"}', CLAIMS),
        signed('{"alg": "RS256", "kid": "' + "k" * 256 + '"}', CLAIMS),
        signed('{"alg": ["RS256"], "kid": "a"}', CLAIMS),
        signed('{"alg": "RS256", "kid": "a", "typ": 7}', CLAIMS),
        signed('{"alg": "none", "alg": "RS256", "kid": "a"}', CLAIMS),
        *(
            signed(HEADER[:-1] + f', "{name}": {value}}}', CLAIMS)
            for name, value in [
                ("crit", '["exp"]'),
                ("crit", "[]"),
                ("b64", "false"),
                ("zip", '"DEF"'),
                ("enc", '"A128GCM"'),
            ]
        ),
    ],
    ids=len,
)
def test_what_could_be_read_in_two_ways_is_not_read(text: str) -> None:
    assert jws.read(text) is None


def test_other_spellings_of_the_same_bytes_are_not_read() -> None:
    """Of 256 bytes the last character has 4 bits that mean nothing."""
    token = a_token()
    assert jws.read(token) is not None
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    read = [jws.read(token[:-1] + each) for each in letters]
    assert sum(each is not None for each in read) == 4  # other bits, which mean something


def test_the_type_is_compared_as_media_types_are() -> None:
    token = jws.read(a_token(header={"typ": "application/AT+jwt"}))
    assert token is not None
    assert token.type == "at+jwt"


@pytest.mark.parametrize(
    "value", [None, True, -1, "1772366400", [1], {}, 1e12, 10**400, 1e300, -0.5]
)
def test_what_is_no_time_is_none(value: Any) -> None:
    assert jws.time_claim({"exp": value}, "exp") is None


@pytest.mark.parametrize("value", [0, 1772366400, 1772366400.25])
def test_a_time_is_one(value: float) -> None:
    assert jws.time_claim({"exp": value}, "exp") == value


@pytest.mark.parametrize("value", [None, "", "a" * 256, "a\0b", "a\nb", "\ud800", 7, ["a"]])
def test_what_is_no_text_is_none(value: Any) -> None:
    assert jws.text_claim({"sub": value}, "sub") is None


# Sets of keys.


def test_keys_are_taken_by_what_they_are_for() -> None:
    raw = jwks(
        jwk(),
        jwk("ES256"),
        jwk("EdDSA"),
        jwk(seed=1, alg="RS512"),
        jwk(seed=2, use="enc"),
        jwk(seed=3, key_ops=["encrypt"]),
        jwk(seed=4, kid=None),
        jwk(seed=5, alg="HS256"),
        jwk(seed=6, kty="oct", k="c2VjcmV0"),
        jwk(seed=7, d="AQAB"),
        jwk(seed=8, n="AQAB"),
        jwk("ES256", seed=9, crv="secp256k1"),
        jwk("ES256", seed=10, x="AAAA"),
        {"kty": "RSA", "kid": "nothing"},
        "not a key",  # type: ignore[arg-type]
    )
    found = jws.parse_jwks(raw)
    assert {kid: sorted(key.algorithms) for kid, key in found.items()} == {
        "RS256-0": ["PS256", "PS384", "PS512", "RS256", "RS384", "RS512"],
        "ES256-0": ["ES256"],
        "EdDSA-0": ["EdDSA"],
        "RS256-1": ["RS512"],
    }


def test_of_two_keys_with_one_name_the_first_counts() -> None:
    found = jws.parse_jwks(jwks(jwk(), jwk(seed=1, kid="RS256-0")))
    assert found["RS256-0"].material == private().public_key()


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b'{"keys": {}}', b'{"keys": []}', b"<html>", b"\xff", b"[" * 9999]
)
def test_what_is_no_set_of_keys_is_said(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"key|keys"):
        jws.parse_jwks(raw)


@given(st.binary(max_size=300))
@examples(300)
def test_no_bytes_are_too_odd_for_a_set_of_keys(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"key|keys"):
        jws.parse_jwks(raw)


@given(st.text(max_size=200) | st.from_regex(r"[\w-]{0,40}\.[\w-]{0,40}\.[\w-]{0,40}"))
@examples(300)
def test_no_text_is_too_odd_to_be_read(text: str) -> None:
    token = jws.read(text)
    assert token is None or not jws.verify(token, known())
