"""
Attacks on the real service, over its socket: each is refused, and none learns anything from how.

Anna is in a real database with a key; tokens of two issuers are trusted, ours and an outside one.
"""

import base64
import hashlib
import hmac
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from envoy.service.auth.v3 import external_auth_pb2 as pb
from envoy.service.auth.v3.external_auth_pb2_grpc import AuthorizationStub

from authz.decide import INVALID_TOKEN, UNKNOWN_KEY, Deny
from authz.keyring import Keyring
from authz.outsiders import Outsiders
from authz.service import CHECK, Authz
from parallama import keys, rpc
from parallama.changes import Change
from parallama.config import Issuer
from parallama.db.accounts import find_holder, find_key
from parallama.db.manage import credentials, people
from parallama.roles import BUILT_IN, Role
from tests.authz.make import MINTED, NOW, TOKEN, WRONG, a_check, no_mappings, no_signatures
from tests.authz.tokens import (
    THEM,
    US,
    a_token,
    an_issuer,
    claims,
    encoded,
    jwk,
    private,
    signed,
    trusting,
)
from tests.parallama.db_on_disk import Opened, a_minted, on

Story = Callable[["Service"], Awaitable[None]]

SSO = Issuer.model_validate(
    {"issuer": THEM, "audience": "parallama", "jwks_url": "https://sso.test/jwks"}
    | {"create_users": True}
)
HINTS = ("signature", "kid", "alg", "expired", "audience", "issuer", "revoked", "typ", "claim")


class Service:
    """The real one. `anna` is her user's id."""

    def __init__(self, stub: AuthorizationStub, anna: str, at: Opened, keyring: Keyring) -> None:
        self._stub = stub
        self.anna = anna
        self.at = at
        self.keyring = keyring

    async def ask(self, **fields: Any) -> pb.CheckResponse:
        answer = await self._stub.Check(a_check(**fields), timeout=10)
        assert isinstance(answer, pb.CheckResponse)
        return answer

    async def says(self, value: str, header: str = "authorization", **fields: Any) -> Any:
        given = f"Bearer {value}" if header == "authorization" else value
        return await self.ask(headers={header: given}, **fields)

    def token(self, **fields: Any) -> str:
        return a_token(**{"sub": self.anna, **fields})

    async def lets_in(self, value: str) -> bool:
        return bool((await self.says(value)).status.code == 0)

    async def refuses(self, *values: str, how: Deny = INVALID_TOKEN) -> None:
        """With one answer for all of them, that says nothing about any."""
        for value in values:
            answer = await self.says(value)
            assert answer.status.code != 0, value[:200]
            assert answer.denied_response.status.code == how.status, value[:200]
            body = json.loads(answer.denied_response.body)["error"]["message"]
            assert body == how.message, value[:200]
            assert not answer.dynamic_metadata, value[:200]
        assert not any(hint in how.message for hint in HINTS)


def told(folder: Path, story: Story, *, algorithm: str = "RS256") -> None:
    async def inside(at: Opened) -> None:
        user = await people.create_user(at.desk(), "anna", Role.USER)
        await credentials.create_key(at.desk(), "anna", MINTED)

        async def ours(subject: str, _: Any) -> Any:
            return await find_holder(at.store, subject, US)

        theirs = Outsiders(SSO, at.store, roles=BUILT_IN, clock=lambda: NOW)
        bearers = trusting(
            an_issuer(algorithm, find_holder=ours),
            an_issuer(
                "ES256",
                name=THEM,
                find_holder=theirs.find,
                types=frozenset({"", "jwt", "at+jwt"}),
                outside=True,
            ),
        )
        keyring = Keyring(partial(find_key, at.store), bearers, size=1000)
        service = Authz(
            keyring,
            no_signatures(),
            no_mappings(),
            gateways=("ollama", "openai"),
            clock=lambda: NOW,
        )
        with tempfile.TemporaryDirectory() as name:
            socket = str(Path(name) / "a.sock")
            server = rpc.Server({CHECK: service.check})
            await server.start(socket)
            try:
                async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
                    known = Service(AuthorizationStub(channel), user.id, at, keyring)
                    # Or else whatever follows would be refused for some other reason.
                    assert await known.lets_in(known.token(algorithm=algorithm))
                    assert await known.lets_in(TOKEN)
                    await story(known)
                    assert await known.lets_in(known.token(algorithm=algorithm))
            finally:
                await server.stop(0)

    on(folder, inside)


@pytest.fixture(autouse=True)
def nothing_broke(caplog: pytest.LogCaptureFixture) -> Iterable[None]:
    yield
    assert "check failed" not in caplog.text
    assert "eyJ" not in caplog.text


def public(algorithm: str = "RS256") -> list[bytes]:
    """What everybody can know of a key, in all the ways in which it may be written."""
    key = private(algorithm).public_key()
    info = PublicFormat.SubjectPublicKeyInfo
    found = [key.public_bytes(Encoding.PEM, info), key.public_bytes(Encoding.DER, info)]
    if algorithm == "RS256":
        found.append(key.public_bytes(Encoding.PEM, PublicFormat.PKCS1))
        found.append(key.public_bytes(Encoding.DER, PublicFormat.PKCS1))
    found += [found[0].strip(), found[0].replace(b"\n", b"")]
    told = jwk(algorithm)
    found += [json.dumps(told).encode(), json.dumps(told, separators=(",", ":")).encode()]
    return [*found, str(told.get("n", told.get("x"))).encode()]


# Signatures.


def test_no_signature_at_all(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        payload = encoded(json.dumps(claims(sub=service.anna)))
        good = service.token().split(".")
        for name in ("none", "None", "NONE", "nOnE", "", "null", "RS512"):
            header = encoded(json.dumps({"alg": name, "typ": "at+jwt", "kid": "RS256-0"}))
            await service.refuses(
                f"{header}.{payload}.", f"{header}.{payload}.AAAA", f"{header}.{payload}.{good[2]}"
            )
        await service.refuses(f"{good[0]}.{good[1]}.")

    told(tmp_path, story)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_public_key_taken_for_a_secret(tmp_path: Path, algorithm: str) -> None:
    async def story(service: Service) -> None:
        said = json.dumps(claims(sub=service.anna))
        for name in ("HS256", "HS384", "HS512"):
            for secret in (*public(algorithm), b"", b"secret", f"{algorithm}-0".encode()):
                header = json.dumps({"alg": name, "typ": "at+jwt", "kid": f"{algorithm}-0"})
                message = f"{encoded(header)}.{encoded(said)}"
                digest = getattr(hashlib, f"sha{name[2:]}")
                made = hmac.new(secret, message.encode(), digest).digest()
                await service.refuses(f"{message}.{encoded(made)}")

    told(tmp_path, story, algorithm=algorithm)


def test_one_algorithm_taken_for_another(tmp_path: Path) -> None:
    """All with keys that are good, for something else."""

    async def story(service: Service) -> None:
        sub, said = service.anna, partial(json.dumps)
        for name in ("RS384", "RS512", "PS256"):
            await service.refuses(service.token(algorithm=name, key=private(), seed=0))
            header = said({"alg": name, "typ": "at+jwt", "kid": "RS256-0"})
            payload = said(claims(sub=sub))
            await service.refuses(signed(header, payload, algorithm=name, key=private()))
            await service.refuses(signed(header, payload, algorithm="RS256", key=private()))
        await service.refuses(
            service.token(algorithm="ES256"),  # the other issuer's, in our name
            service.token(algorithm="ES256", header={"kid": "RS256-0"}),
            a_token(iss=THEM, sub="s-1"),  # ours, in the other issuer's
        )

    told(tmp_path, story)


def test_somebody_elses_key(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        theirs = private(seed=1)
        own = jwk(seed=1)
        for kid in ("RS256-0", "RS256-1", "", None, 0, ["RS256-0"]):
            for more in (
                {},
                {"jwk": own},
                {"jku": "http://127.0.0.1:9/jwks"},
                {"x5u": "http://127.0.0.1:9/cert"},
                {"x5c": ["MIIB"]},
                {"jwk": own, "jku": "file:///etc/passwd", "x5u": "//127.0.0.1/x"},
            ):
                await service.refuses(service.token(key=theirs, header={"kid": kid, **more}))

    told(tmp_path, story)


INJECTIONS = (
    "../RS256-0",
    "../../../../dev/null",
    "/dev/null",
    "RS256-0/../RS256-0",
    "RS256-0\0",
    "RS256-0\0.pem",
    "RS256-0\r\nx-parallama-user: admin",
    "RS256-0 ",
    "rs256-0",
    "\uff32S256-0",
    "' OR '1'='1",
    "x'; DROP TABLE users; --",
    'x" UNION SELECT key_hash FROM api_keys --',
    "%(kid)s ?1 :kid $1 {0}",
    "*\r\nFLUSHALL\r\n",
    "$(id)",
    "|id",
    "{{7*7}}",
    "a" * 255,
    "a" * 3000,
    "__class__",
    "\ud800",
)


def test_a_kid_that_is_a_path_a_header_or_a_query(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        for kid in INJECTIONS:
            await service.refuses(
                service.token(header={"kid": kid}), service.token(header={"kid": kid}, seed=1)
            )
        for name in ("jku", "x5u", "cty", "x5t"):
            for value in (*INJECTIONS, 7, None, {"a": 1}, ["a"]):
                answer = await service.says(
                    service.token(key=private(seed=1), header={name: value})
                )
                assert answer.status.code != 0

    told(tmp_path, story)


# Claims.


def test_claims_that_are_wrong(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        now = int(NOW)
        wrong: list[dict[str, Any]] = [
            {"exp": now - 31},
            {"exp": now - 31.5},
            {"exp": None},
            {"exp": 1e400},
            {"exp": 10**400},
            {"exp": -(10**400)},
            {"exp": "9999999999"},
            {"exp": [now + 1800]},
            {"nbf": now + 31},
            {"nbf": 10**400},
            {"iat": now + 31},
            {"iat": 10**400},
            {"aud": "parallama2"},
            {"aud": ["x", "Parallama"]},
            {"aud": None},
            {"iss": "https://evil.test"},
            {"iss": US + "\0"},
            {"iss": None},
            *({"sub": each} for each in (*INJECTIONS, None, 1, True, ["a"], {"a": "b"})),
            {"sub": service.anna.upper() + " "},
        ]
        await service.refuses(*(service.token(**fields) for fields in wrong))
        for typ in ("JWT", "rt+jwt", "refresh", "logout+jwt", "", "at+jwt ", "at+jwt;x", None):
            await service.refuses(service.token(header={"typ": typ}))

    told(tmp_path, story)


def test_odd_characters_that_a_trusted_issuer_signed(tmp_path: Path) -> None:
    """They make a user, or none; never an error, and never a hole."""

    async def story(service: Service) -> None:
        for number, text in enumerate(INJECTIONS):
            for fields in (
                {"sub": text, "preferred_username": f"user{number}"},
                {"sub": f"s-{number}", "preferred_username": text},
                {"sub": "s", "preferred_username": "s", "jti": text, "groups": text},
            ):
                token = a_token(algorithm="ES256", iss=THEM, **fields)
                answer = await service.says(token)
                assert answer.status.code == 0 or answer.denied_response.status.code in (401, 403)
        users = await people.list_users(service.at.engine)
        assert "anna" in [user.username for user in users]
        assert {user.role for user in users} == {"user"}

    told(tmp_path, story)


def test_another_user_by_the_name_alone(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        token = a_token(algorithm="ES256", iss=THEM, sub="s-1", preferred_username="anna")
        assert (await service.says(token)).denied_response.status.code == 403
        token = a_token(algorithm="ES256", iss=THEM, sub=service.anna, preferred_username="anna")
        assert (await service.says(token)).denied_response.status.code == 403

    told(tmp_path, story)


def test_a_token_for_something_else(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        body = "plr_" + TOKEN[4:-6]
        refresh = body + keys._checksum(body)
        await service.refuses(refresh, "plr_" + TOKEN[4:], how=UNKNOWN_KEY)

    told(tmp_path, story)


# The form of a token.


def test_parts_cut_doubled_and_exchanged(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        good = service.token()
        head, body, tail = good.split(".")
        other = service.token(jti="other").split(".")
        await service.refuses(
            *(good[:length] for length in range(good.rindex(".") + 1, len(good), 7)),
            *(good[start:] for start in range(1, len(head), 5)),
            f"{head}.{body}.",
            f".{body}.{tail}",
            f"{head}..{tail}",
            f"{body}.{head}.{tail}",
            f"{head}.{other[1]}.{tail}",
            f"{head}.{body}.{other[2]}",
            f"{head}.{body}.{tail}{tail}",
            f"{head}.{body}{body}.{tail}",
            f"{head}.{body}.{tail[::-1]}",
        )
        await service.refuses(
            head,
            f"{head}.{body}",
            f"{head}.{body}.{tail}.{tail}",
            f"{good}.",
            f".{good}",
            good + good,
            f"{good}.{good}",
            "a.b.c.d.e",
            how=UNKNOWN_KEY,
        )

    told(tmp_path, story)


def test_the_same_token_in_another_spelling(tmp_path: Path) -> None:
    """Or else it would be another one for whoever remembers which were revoked."""

    async def story(service: Service) -> None:
        good = service.token()
        head, body, tail = good.split(".")
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        await service.refuses(
            *(good[:-1] + letter for letter in letters if letter != good[-1]),
            *(f"{head}{pad}.{body}.{tail}" for pad in ("=", "==", "%3D", "A")),
            *(f"{head}.{body}.{tail}{pad}" for pad in ("=", "==", "====", "%3D%3D")),
            good.replace("-", "+").replace("_", "/") + "+",
            f"{head}.{body[:9]}\n{body[9:]}.{tail}",
            f"{head}.{body[:9]} {body[9:]}.{tail}",
            f"{head}.{body[:9]}\u200b{body[9:]}.{tail}",
            f"{head}.{body}.{tail[:-1]}\uff21",
            good.upper(),
            good.swapcase(),
        )

    told(tmp_path, story)


def test_json_that_can_be_read_in_two_ways(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        header = json.dumps({"alg": "RS256", "typ": "at+jwt", "kid": "RS256-0"})
        body = json.dumps(claims(sub=service.anna))
        assert await service.lets_in(signed(header, body))
        await service.refuses(
            signed(header[:-1] + ', "alg": "none"}', body),
            signed('{"alg": "none", ' + header[1:], body),
            signed(header[:-1] + ', "kid": "RS256-1"}', body),
            signed(header[:-1] + ', "crit": ["exp"], "exp": 1}', body),
            signed(header[:-1] + ', "crit": ["b64"], "b64": false}', body),
            signed(header[:-1] + ', "zip": "DEF"}', body),
            signed(header[:-1] + ', "enc": "A128GCM"}', body),
            signed(header, body[:-1] + f', "sub": "{service.anna}"}}'),
            signed(header, body[:-1] + ', "exp": 99999999999}'),
            signed(header, body[:-1] + ', "a": ' + "[" * 3000 + "]" * 3000 + "}"),
            signed(header, body[:-1] + ', "a": ' + '{"a":' * 1000 + "1" + "}" * 1000 + "}"),
            signed(header, body[:-1] + ', "a": ' + "9" * 5000 + "}"),
            signed(header, body[:-1] + ', "a": NaN}'),
            signed(header, body[:-1] + ', "a": "' + "x" * 20_000 + '"}'),
            signed(header, body + "\0"),
            signed(header, body + body),
            signed(header, body.encode("utf-16")),
            signed(header, b"\xef\xbb\xbf" + body.encode()),
            signed(header, body.encode()[:-1] + b', "a": "\xff"}'),
            signed(header, f"[{body}]"),
            signed(header, f'"{service.anna}"'),
            signed(header, "null"),
            signed(f"[{header}]", body),
        )
        # The signature is right, and the payload is somewhere else (RFC 7515, appendix F).
        whole = signed(header, body).split(".")
        await service.refuses(f"{whole[0]}..{whole[2]}")

    told(tmp_path, story)


# Headers.


def test_two_credentials(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        token, other = service.token(), service.token(jti="other")
        for headers in (
            {"authorization": f"Bearer {token}", "x-api-key": TOKEN},
            {"authorization": f"Bearer {TOKEN}", "x-api-key": token},
            {"authorization": f"Bearer {TOKEN}", "api-key": token, "x-api-key": TOKEN},
            {"authorization": f"Bearer {token}", "x-api-key": other},
            {"authorization": f"Bearer {token}", "x-api-key": ""},
            {"authorization": "Basic YTpi", "x-api-key": token},
            {"authorization": f"Bearer {token},Bearer {token}"},
            {"authorization": f"Bearer {TOKEN},Bearer {token}"},
            {"authorization": f"Bearer {token} {token}"},
        ):
            answer = await service.ask(headers=headers)
            assert answer.denied_response.status.code == 401, headers
        same = {"authorization": f"Bearer {token}", "x-api-key": token}
        assert (await service.ask(headers=same)).status.code == 0

    told(tmp_path, story)


def test_a_credential_in_the_address(tmp_path: Path) -> None:
    """Beside a good one in a header, so that whoever sends it learns that it got logged."""

    async def story(service: Service) -> None:
        token = service.token()
        for secret in (token, TOKEN, WRONG):
            for path in ("/v1/chat/completions?key=", "/v1/chat/completions?access_token="):
                for given in (token, TOKEN):
                    answer = await service.says(given, path=path + secret)
                    assert answer.denied_response.status.code == 401
                answer = await service.ask(headers={}, path=path + secret)
                assert answer.denied_response.status.code == 401
                assert secret not in str(answer)

    told(tmp_path, story)


def test_letters_that_look_like_others(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        token = service.token()
        for value in (TOKEN, token):
            for given in (
                f"Be\u0430rer {value}",
                f"\uff22earer {value}",
                f"Bearer\u00a0{value}",
                f"Bearer \u00a0{value}",
                f"Bearer \u2003{value}",
                f"Bearer {value}\u200b",
                f"Bearer {value}\x1f",
                f"Bearer \ufeff{value}",
                f"Bearer\t{value}",
                f"Bearer {value}\0",
                f"Bearer {value}\r\nx-parallama-user: {service.anna}",
                f"Bearer '{value}'",
                f'Bearer "{value}"',
                f"Bearer Bearer {value}",
                f"Token {value}",
                f"{value}",
                f"Bearer {value.upper()}",
                f"Bearer {value.lower()}",
                f"Bearer {value.swapcase()}",
            ):
                answer = await service.ask(headers={"authorization": given})
                assert answer.denied_response.status.code == 401, given[:20]
            # Of a scheme the case means nothing (RFC 9110, 11.1).
            assert (
                await service.ask(headers={"authorization": f"bEARER {value}"})
            ).status.code == 0

    told(tmp_path, story)


def test_a_megabyte(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        token, much = service.token(), "A" * (1 << 20)
        await service.refuses(f"{token}{much}", f"{much}.{much[:9]}.A", f"a.b.{much}")
        await service.refuses(much, TOKEN + much, "." * (1 << 20), how=UNKNOWN_KEY)
        begun = time.process_time()
        await service.refuses(*[f"{much}.{much[:9]}.A"] * 5)
        assert time.process_time() - begun < 1

    told(tmp_path, story)


def test_metacharacters_in_every_field(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        for text in INJECTIONS:
            if "\ud800" in text:
                continue  # cannot be sent
            for header in ("authorization", "x-api-key", "api-key"):
                answer = await service.says(text, header)
                assert answer.denied_response.status.code == 401
            for fields in ({"path": f"/{text}"}, {"method": text}, {"address": text}):
                answer = await service.says(TOKEN, **fields)
                assert answer.status.code == 0 or answer.denied_response.status.code in (404, 405)
                assert "address" in fields or answer.status.code != 0
            answer = await service.says(TOKEN, route={"gateway": text, "dialect": text})
            assert answer.denied_response.status.code == 404
        assert [user.username for user in await people.list_users(service.at.engine)] == ["anna"]

    told(tmp_path, story)


# Time.


def test_an_answer_takes_as_long_for_an_id_that_exists_as_for_one_that_does_not(
    tmp_path: Path,
) -> None:
    """CPU time of our process, taken in turns, in the median: the margin is wide."""
    unknown = a_minted(99).token

    async def story(service: Service) -> None:
        async def cost(token: str) -> float:
            begun = time.process_time()
            answer = await service.says(token)
            assert answer.denied_response.status.code == 401
            return time.process_time() - begun

        pairs = [(await cost(WRONG), await cost(unknown)) for _ in range(25)]
        ratio = statistics.median(a / b for a, b in pairs)
        assert 0.5 < ratio < 2, ratio
        # So that the line above could fail: what has not the form of a key costs much less.
        malformed = statistics.median([await cost(WRONG[:-1]) for _ in range(9)])
        assert statistics.median(b for _, b in pairs) > 1.5 * malformed

    told(tmp_path, story)


# Revocation.


def test_a_revoked_token_in_any_spelling(tmp_path: Path) -> None:
    """Of an ES256 signature (r, s) everybody can make (r, n - s), which is as good a one."""
    n = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

    async def story(service: Service) -> None:
        token = service.token(algorithm="ES256", jti="to be revoked")
        whole, _, signature = token.rpartition(".")
        raw = base64.urlsafe_b64decode(signature + "==")
        twin = f"{whole}.{encoded(raw[:32] + (n - int.from_bytes(raw[32:])).to_bytes(32))}"
        assert twin != token
        assert await service.lets_in(token)
        assert await service.lets_in(twin)
        await service.at.store.write(
            (
                "INSERT INTO revoked_tokens (jti, issuer, user_id, revoked_at, expires_at) "
                "VALUES (?, ?, ?, ?, ?)",
                [("to be revoked", US, service.anna, *[datetime(2026, 3, 1, tzinfo=UTC)] * 2)],
            )
        )
        service.keyring.on_change(Change("token", "to be revoked"))
        await service.refuses(token, twin)

    told(tmp_path, story, algorithm="ES256")
