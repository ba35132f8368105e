"""Requests signed by the ollama command: accepted once, and every other one refused alike."""

import asyncio
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from authz import signed, wire
from authz.decide import Allow, Asked, Deny, Signature, identify
from authz.service import Authz
from authz.signed import SEEN, Signatures
from parallama import sshkeys
from parallama.changes import Change
from parallama.db.accounts import KeyRecord
from parallama.errors import Unavailable
from parallama.pipeline import Pipeline
from tests.authz.make import NOW, TOKEN, a_check, a_key, an_ask, no_mappings
from tests.ollama_cli import OllamaCommand
from tests.valkey import Client, Valkey

T = TypeVar("T")
WINDOW = 60
CLI = OllamaCommand(key=Ed25519PrivateKey.from_private_bytes(b"1" * 32))
STRANGER = OllamaCommand(key=Ed25519PrivateKey.from_private_bytes(b"2" * 32))
ROUTE = {"gateway": "ollama", "dialect": "ollama", "base": ""}


def a_registered(command: OllamaCommand = CLI, **fields: Any) -> KeyRecord:
    key = sshkeys.read(command.public_key_file)
    about = {"kind": "ssh", "public_id": key.public_id, "secret_hash": key.line}
    return a_key(**{**about, **fields})


def an_asked(
    method: str = "POST",
    path: str = "/api/chat",
    *,
    command: OllamaCommand = CLI,
    at: float = NOW,
    **fields: Any,
) -> Asked:
    """A signed request as Envoy tells it, read by wire.py."""
    target, authorization = command.call(method, path, at=at)
    check = a_check(
        method=method, path=target, headers={"authorization": authorization}, route=ROUTE
    )
    asked = wire.parse(check)
    assert isinstance(asked, Asked)
    return replace(asked, **fields)


def signature_of(asked: Asked) -> Signature:
    (only,) = asked.credentials
    assert isinstance(only, Signature)
    return only


class Replica:
    """One authz process, as far as signatures go."""

    def __init__(self, valkey: Valkey, record: KeyRecord | None, clock: Callable[[], float]):
        self.redis = Client(valkey.socket)
        self.memory = Pipeline(self.redis, SEEN, timeout=1)
        self.record = record
        self.looked_up = 0
        self.signatures = Signatures(self._find, self.memory, window=WINDOW, size=10, clock=clock)
        self.signatures.resume()

    async def _find(self, public_id: str) -> KeyRecord | None:
        self.looked_up += 1
        known = self.record
        return known if known is not None and known.public_id == public_id else None

    async def accepts(self, asked: Asked) -> bool:
        return await self.signatures.find(asked, signature_of(asked)) is not None

    async def aclose(self) -> None:
        await self.memory.aclose()
        await self.redis.aclose()


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey(tmp_path_factory.mktemp("v"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def replicas(valkey: Valkey) -> Callable[..., Any]:
    """Runs a story with replicas on one empty Valkey."""

    def run(
        story: Callable[..., Any],
        *records: KeyRecord | None,
        clock: Callable[[], float] = lambda: NOW,
    ) -> Any:
        async def told() -> Any:
            async with Client(valkey.socket) as redis:
                await redis.flushall()
            made = [Replica(valkey, record, clock) for record in records or (a_registered(),)]
            try:
                return await story(*made)
            finally:
                for replica in made:
                    await replica.aclose()

        return asyncio.run(told())

    return run


def accepted(replicas: Callable[..., Any], asked: Asked, record: KeyRecord | None = None) -> bool:
    async def story(replica: Replica) -> bool:
        return await replica.accepts(asked)

    return bool(replicas(story, record or a_registered()))


# What is accepted


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/chat"),
        ("GET", "/api/tags"),
        ("DELETE", "/api/delete"),
        ("HEAD", "/api/blobs/sha256:0a1b"),
    ],
)
def test_a_signed_request_is_known_by_its_registered_key(
    replicas: Callable[..., Any], method: str, path: str
) -> None:
    assert accepted(replicas, an_asked(method, path))


def test_the_base_path_of_the_address_is_not_signed(replicas: Callable[..., Any]) -> None:
    command = OllamaCommand(base="/ollama", key=CLI.key)
    target, authorization = command.call("POST", "/api/chat", at=NOW)
    assert target.startswith("/ollama/api/chat?ts=")
    check = a_check(
        path=target, headers={"authorization": authorization}, route={**ROUTE, "base": "/ollama"}
    )
    asked = wire.parse(check)
    assert isinstance(asked, Asked)
    assert accepted(replicas, asked)


@pytest.mark.parametrize("offset", [-WINDOW, -1, 0, 1, WINDOW])
def test_clocks_may_differ(replicas: Callable[..., Any], offset: int) -> None:
    assert accepted(replicas, an_asked(at=NOW + offset))


# What is not


@pytest.mark.parametrize("offset", [-WINDOW - 1, WINDOW + 1, -86400, 86400])
def test_a_stamp_that_is_too_old_or_too_far_ahead_is_refused(
    replicas: Callable[..., Any], offset: int
) -> None:
    assert not accepted(replicas, an_asked(at=NOW + offset))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"method": "DELETE"}, id="another method"),
        pytest.param({"method": "post"}, id="method in small letters"),
        pytest.param({"path": "/api/generate"}, id="another path"),
        pytest.param({"path": "/api/chat/"}, id="longer path"),
        pytest.param({"query": f"ts={NOW:.0f}&x=1"}, id="a parameter more"),
        pytest.param({"query": f"x=1&ts={NOW:.0f}"}, id="another order"),
        pytest.param({"query": f"ts={NOW:.0f}&ts={NOW:.0f}"}, id="twice"),
        pytest.param({"query": f"ts={NOW + 1:.0f}"}, id="another stamp"),
        pytest.param({"query": f"TS={NOW:.0f}"}, id="another name"),
        pytest.param({"query": f"ts=+{NOW:.0f}"}, id="a plus"),
        pytest.param({"query": f"ts={NOW:.1f}"}, id="a fraction"),
        pytest.param({"query": "ts=" + "9" * 5000}, id="a huge number"),
        pytest.param({"query": f"ts=%3{NOW:.0f}"}, id="an escape"),
        pytest.param({"query": "ts=١٢٣"}, id="other digits"),
        pytest.param({"query": "ts="}, id="empty"),
        pytest.param({"query": ""}, id="none"),
    ],
)
def test_what_was_not_signed_is_refused(
    replicas: Callable[..., Any], fields: dict[str, Any]
) -> None:
    assert not accepted(replicas, replace(an_asked(), **fields))


def _pem(key: Any) -> str:
    encoded = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return str(encoded.decode().split()[1])


RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
GOOD = CLI.call("POST", "/api/chat", at=NOW)[1]
KEY, _, SIGNATURE = GOOD.partition(":")
BLOB = b64decode(KEY)
_OTHER_LENGTH = b64encode(BLOB[:18] + b"\x21" + BLOB[19:]).decode()
_OTHER_KIND = b64encode(BLOB.replace(b"ssh-ed25519", b"ssh-ed25518")).decode()
_FLIPPED = b64encode(bytes([b64decode(SIGNATURE)[0] ^ 1]) + b64decode(SIGNATURE)[1:]).decode()
# The order of the group, added to the second half of a signature: another text for the same proof.
_ORDER = 2**252 + 27742317777372353535851937790883648493
_S = int.from_bytes(b64decode(SIGNATURE)[32:], "little") + _ORDER
_MALLEABLE = b64encode(b64decode(SIGNATURE)[:32] + _S.to_bytes(32, "little")).decode()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"{_pem(RSA)}:{SIGNATURE}", id="rsa"),
        pytest.param(f"{_pem(EC)}:{SIGNATURE}", id="ecdsa"),
        pytest.param(f"{_OTHER_LENGTH}:{SIGNATURE}", id="another length in the key"),
        pytest.param(f"{_OTHER_KIND}:{SIGNATURE}", id="another kind in the key"),
        pytest.param(f"{KEY}AAAA:{SIGNATURE}", id="longer key"),
        pytest.param(f"{'A' * 60_000}:{SIGNATURE}", id="oversized key"),
        pytest.param(f"{KEY[:-4]}:{SIGNATURE}", id="shorter key"),
        pytest.param(f"{KEY}:{'A' * 60_000}", id="oversized signature"),
        pytest.param(f"{KEY}:{SIGNATURE[:-2]}", id="no padding"),
        pytest.param(f"{KEY}:{SIGNATURE[:-4]}AA==", id="shorter signature"),
        pytest.param(f"{KEY}:{_FLIPPED}", id="a bit flipped"),
        pytest.param(f"{KEY}:{_MALLEABLE}", id="the order added"),
        pytest.param(f"{KEY}:{SIGNATURE.replace(SIGNATURE[5], '*')}", id="no base64"),
        pytest.param(f"{KEY}:{SIGNATURE}:{SIGNATURE}", id="two signatures"),
        pytest.param(f"{KEY}:{SIGNATURE},{KEY}:{SIGNATURE}", id="two headers joined"),
        pytest.param(f"{KEY}\n:{SIGNATURE}", id="a line break"),
        pytest.param(f"{STRANGER.encoded_key}:{SIGNATURE}", id="another key's signature"),
        pytest.param(f"{KEY}:", id="no signature"),
        pytest.param(f":{SIGNATURE}", id="no key"),
        pytest.param(":", id="nothing"),
        pytest.param("ключ:подпись", id="other letters"),
    ],
)
def test_what_is_no_signature_is_refused_without_asking_the_stores(
    replicas: Callable[..., Any], text: str
) -> None:
    async def story(replica: Replica) -> tuple[bool, int]:
        asked = replace(an_asked(), credentials=(Signature(text),))
        return await replica.accepts(asked), replica.looked_up

    assert replicas(story) == (False, 0)


def test_the_signature_of_a_key_nobody_registered_is_refused(replicas: Callable[..., Any]) -> None:
    assert not accepted(replicas, an_asked(command=STRANGER))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"kind": "secret"}, id="a key of another kind under this id"),
        pytest.param(
            {"secret_hash": sshkeys.read(STRANGER.public_key_file).line}, id="the id of another key"
        ),
    ],
)
def test_an_id_is_not_enough(replicas: Callable[..., Any], fields: dict[str, Any]) -> None:
    assert not accepted(replicas, an_asked(), a_registered(**fields))


def test_the_admin_api_takes_no_signature(replicas: Callable[..., Any]) -> None:
    """It says nothing of the body."""
    assert not accepted(replicas, an_asked("POST", "/admin/v1/users", gateway="admin"))


# Once


def test_a_replay_is_refused_by_the_same_replica_and_by_the_other(
    replicas: Callable[..., Any],
) -> None:
    async def story(one: Replica, other: Replica) -> list[bool]:
        first, again = an_asked(request_id="1"), an_asked(request_id="2")
        return [
            await one.accepts(first),
            await other.accepts(again),
            await one.accepts(again),
            await one.accepts(an_asked(at=NOW + 1)),
        ]

    assert replicas(story, a_registered(), a_registered()) == [True, False, False, True]


def test_of_many_at_once_one_is_accepted(replicas: Callable[..., Any]) -> None:
    async def story(*all: Replica) -> list[bool]:
        asked = [an_asked(request_id=str(n)) for n in range(40)]
        return list(
            await asyncio.gather(*(all[n % 2].accepts(each) for n, each in enumerate(asked)))
        )

    assert sum(replicas(story, a_registered(), a_registered())) == 1


def test_a_replay_is_refused_for_as_long_as_its_stamp_is_good(
    replicas: Callable[..., Any],
) -> None:
    now = [NOW]

    async def story(replica: Replica) -> list[bool]:
        seen = [await replica.accepts(an_asked(at=NOW + WINDOW, request_id="1"))]
        now[0] = NOW + 2 * WINDOW
        seen.append(await replica.accepts(an_asked(at=NOW + WINDOW, request_id="2")))
        (name,) = await replica.redis.keys("signed:*")
        assert await replica.redis.ttl(name) > 2 * WINDOW
        return seen

    assert replicas(story, clock=lambda: now[0]) == [True, False]


def test_envoy_may_ask_twice_about_one_request(replicas: Callable[..., Any]) -> None:
    async def story(one: Replica, other: Replica) -> list[bool]:
        asked = an_asked(request_id="7")
        return [await one.accepts(asked), await other.accepts(asked)]

    assert replicas(story, a_registered(), a_registered()) == [True, True]


def test_ollama_run_shows_a_model_twice_in_one_second(replicas: Callable[..., Any]) -> None:
    """From the same address, and at once: later, or from elsewhere, it is a replay."""
    now = [NOW]

    def show(number: int, **fields: Any) -> Asked:
        return an_asked("POST", "/api/show", request_id=str(number), **fields)

    async def story(replica: Replica) -> list[bool]:
        seen = [
            await replica.accepts(show(1)),
            await replica.accepts(show(2)),
            await replica.accepts(show(3, address="10.9.9.9")),
        ]
        now[0] += 2
        return [*seen, await replica.accepts(show(4))]

    assert replicas(story, clock=lambda: now[0]) == [True, True, False, False]


# Stores and changes


def test_without_redis_nothing_is_accepted(tmp_path: Path) -> None:
    async def told() -> None:
        redis = Client(str(tmp_path / "nobody.sock"))
        async with redis, aclosing(Pipeline(redis, SEEN, timeout=0.2)) as memory:

            async def find(_: str) -> KeyRecord | None:
                return a_registered()

            signatures = Signatures(find, memory, window=WINDOW, size=1, clock=lambda: NOW)
            asked = an_asked()
            with pytest.raises(Unavailable):
                await signatures.find(asked, signature_of(asked))

            keyring: Any = None  # nobody asks it
            service = Authz(
                keyring, signatures, no_mappings(), gateways=("ollama",), clock=lambda: NOW
            )
            target, authorization = CLI.call("POST", "/api/chat", at=NOW)
            check = a_check(path=target, headers={"authorization": authorization}, route=ROUTE)
            answer = service.check(check.SerializeToString())
            assert not isinstance(answer, bytes)
            refused = wire.pb.CheckResponse.FromString(await answer)
            assert refused.denied_response.status.code == 503
            assert "right now" in json.loads(refused.denied_response.body)["error"]

    asyncio.run(told())


@pytest.mark.parametrize("change", [Change("key", "key-1"), Change("user", "user-1")])
def test_a_registered_key_is_remembered_until_it_changes(
    replicas: Callable[..., Any], change: Change
) -> None:
    async def story(replica: Replica) -> list[int]:
        seen = []
        for number in range(3):
            assert await replica.accepts(an_asked(at=NOW + number))
            seen.append(replica.looked_up)
        replica.signatures.on_change(Change("key", "another"))
        await replica.accepts(an_asked(at=NOW + 10))
        seen.append(replica.looked_up)
        replica.signatures.on_change(change)
        await replica.accepts(an_asked(at=NOW + 11))
        return [*seen, replica.looked_up]

    assert replicas(story) == [1, 1, 1, 1, 2]


# What Envoy is told


def test_the_stamp_does_not_reach_the_upstream() -> None:
    decision = signed.told(identify(an_asked(), a_registered(), gateways=("ollama",), now=NOW))
    assert isinstance(decision, Allow)
    response = wire.pb.CheckResponse.FromString(wire.render_allow(decision))
    assert list(response.ok_response.query_parameters_to_remove) == ["ts"]


def test_a_query_of_a_call_with_a_key_is_left_alone() -> None:
    decision = identify(an_ask(query="ts=1"), a_key(), gateways=("openai",), now=NOW)
    assert isinstance(decision, Allow)
    response = wire.pb.CheckResponse.FromString(wire.render_allow(decision))
    assert not response.ok_response.query_parameters_to_remove


@pytest.mark.parametrize("fields", [{"revoked": True}, {"expires_at": NOW - 1}, {"disabled": True}])
def test_refusals_have_the_status_whose_message_the_command_shows(fields: dict[str, Any]) -> None:
    decision = signed.told(
        identify(an_asked(), a_registered(**fields), gateways=("ollama",), now=NOW)
    )
    assert isinstance(decision, Deny)
    assert decision.status == 403
    assert "administrator" in decision.message


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(f"Bearer {GOOD}", id="as a bearer"),
        pytest.param(f"Basic {GOOD}", id="as basic"),
        pytest.param(TOKEN, id="a key without its scheme"),
    ],
)
def test_only_the_commands_own_form_is_taken_for_a_signature(header: str) -> None:
    asked = wire.parse(a_check(headers={"authorization": header}))
    assert isinstance(asked, Asked)
    assert not any(isinstance(each, Signature) for each in asked.credentials)


def test_a_signature_is_in_no_repr() -> None:
    asked = an_asked()
    found = signed.parse(asked, signature_of(asked))
    assert SIGNATURE not in repr(asked)
    assert SIGNATURE not in repr(found)
    assert str(b64decode(SIGNATURE)) not in repr(found)
