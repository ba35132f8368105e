"""
Questions to authz that went wrong on the way: `python -m tests.fuzz_check`, or `make fuzz-check`.

Bytes of good and bad questions are changed, cut, doubled and mixed, and so are their fields. The
real service answers each, or says that it is no question: it never lets somebody in who does not
hold a genuine credential, and nothing inside it breaks.
"""

import argparse
import asyncio
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from envoy.service.auth.v3 import external_auth_pb2 as pb
from google.protobuf.message import DecodeError

from authz.keyring import Keyring
from authz.service import Authz
from parallama import contract as c
from parallama import keys, rpc
from parallama.db.accounts import KeyRecord
from tests.authz.make import (
    MINTED,
    NOW,
    TOKEN,
    WRONG,
    a_check,
    a_key,
    a_model_check,
    no_mappings,
    no_signatures,
)
from tests.authz.tokens import THEM, a_token, an_issuer, trusting

GENUINE = (TOKEN, a_token())
_OTHER = keys.mint(lambda count: bytes([9]) * count, rounds=4).token
_BAD = (
    *(WRONG, _OTHER, TOKEN[:-1], "plr_" + TOKEN[4:], "", "x"),
    *(a_token(seed=1), a_token(exp=1), a_token(aud="other"), a_token(iss=THEM)),
    *(a_token(header={"kid": "RS256-1"}), a_token()[:-8], a_token(sub="user-2")),
)
_ODD = (
    *("", "\0", "\n", "é", "\u202e", "Bearer ", "bearer", ",", ";", "..", "/", "?", "%00", "{}"),
    *("plm_", "eyJ", "null", "-1", "A" * 300, "' OR 1=1 --", "*", "ollama", "openai", "admin"),
)
_HEADERS = ("authorization", "x-api-key", "api-key", ":path", "content-type", "host", "x-odd")
_ROUTE = (c.ROUTE_GATEWAY, c.ROUTE_DIALECT, c.ROUTE_BASE, "odd")


@dataclass
class Told:
    asked: int = 0
    allowed: int = 0
    refused: int = 0
    no_question: int = 0


def service() -> Authz:
    async def find(public_id: str) -> KeyRecord | None:
        return a_key() if public_id == MINTED.public_id else None

    bearers = trusting(an_issuer(), an_issuer("ES256", name=THEM, outside=True))
    keyring = Keyring(find, bearers, size=100)
    return Authz(
        keyring, no_signatures(), no_mappings(), gateways=("ollama", "openai"), clock=lambda: NOW
    )


def seeds() -> list[bytes]:
    found = []
    for value in (*GENUINE, *_BAD):
        for name in ("authorization", "x-api-key"):
            given = f"Bearer {value}" if name == "authorization" else value
            found.append(a_check(headers={name: given}))
    found.append(a_check(headers={"authorization": f"Bearer {TOKEN}", "api-key": _OTHER}))
    found.append(a_check(headers={}, path=f"/v1/chat/completions?key={TOKEN}"))
    found.append(pb.CheckRequest())
    return [each.SerializeToString() for each in found]


class Mutator:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311
        self._seeds = seeds()
        self._models = [
            a_model_check(lua=lua).SerializeToString() for lua in ({c.MODEL: "gpt"}, {}, None)
        ]

    def questions(self) -> Iterator[bytes]:
        while True:
            change = self._random.choice((self._bytes, self._fields, self._bytes_of_two))
            yield change()

    def _bytes(self) -> bytes:
        raw = bytearray(self._random.choice(self._seeds + self._models))
        for _ in range(self._random.choice((1, 1, 2, 4, 16))):
            at = self._random.randrange(len(raw) + 1)
            match self._random.randrange(6):
                case 0 if at < len(raw):
                    raw[at] = self._random.randrange(256)
                case 1 if at < len(raw):
                    raw[at] ^= 1 << self._random.randrange(8)
                case 2:
                    del raw[at : at + self._random.choice((1, 2, 8, 64))]
                case 3:
                    raw[at:at] = self._random.randbytes(self._random.choice((1, 2, 8)))
                case 4:
                    raw[at:at] = raw[at : at + self._random.choice((1, 8, 64))]
                case _:
                    del raw[at:]
        return bytes(raw)

    def _bytes_of_two(self) -> bytes:
        """Protobuf merges what stands one behind the other."""
        one, other = self._random.choices(self._seeds, k=2)
        cut = self._random.choice((len(one), self._random.randrange(len(one) + 1)))
        return one[:cut] + other[self._random.choice((0, cut)) :]

    def _fields(self) -> bytes:
        check = pb.CheckRequest.FromString(self._random.choice(self._seeds))
        at = check.attributes
        for _ in range(self._random.choice((1, 1, 2, 4))):
            match self._random.randrange(6):
                case 0:
                    at.request.http.headers[self._random.choice(_HEADERS)] = self._text()
                case 1:
                    at.request.http.path = self._text()
                case 2:
                    at.request.http.method = self._text()
                case 3:
                    at.context_extensions[self._random.choice(_ROUTE)] = self._text()
                case 4:
                    at.source.address.socket_address.address = self._text()
                case _:
                    at.metadata_context.filter_metadata[self._random.choice(("odd", c.LUA))].update(
                        {self._text(): self._text()}
                    )
        return check.SerializeToString()

    def _text(self) -> str:
        parts = self._random.choices((*_BAD, *_ODD, "/v1/chat/completions", "POST"), k=3)
        text = "".join(parts[: self._random.randrange(4)])
        at = self._random.randrange(len(text) + 1)
        return text[:at] + self._random.choice(_ODD) + text[at:]


def holds_a_credential(raw: bytes) -> bool:
    """A genuine one; or it is the second question, which Envoy asks of whom we let in before."""
    try:
        check = pb.CheckRequest.FromString(raw)
    except DecodeError:
        return False
    at = check.attributes
    sent = at.request.http.headers.values()
    return c.AUTHZ in at.metadata_context.filter_metadata or any(
        genuine in value for genuine in GENUINE for value in sent
    )


async def fuzz(seed: int, goes_on: Callable[[int], bool]) -> Told:
    """Raises AssertionError, with the question that it is about."""
    told = Told()
    authz = service()
    broken = _Broken()
    logging.getLogger("authz").addHandler(broken)
    try:
        for raw in Mutator(seed).questions():
            if not goes_on(told.asked):
                return told
            told.asked += 1
            try:
                said = authz.check(raw)
                answer = pb.CheckResponse.FromString(
                    said if isinstance(said, bytes) else await said
                )
            except rpc.RpcError:
                told.no_question += 1
                continue
            assert not broken.records, (seed, raw.hex(), broken.records)
            if answer.status.code != 0:
                told.refused += 1
                assert answer.denied_response.status.code >= 400, (seed, raw.hex())
            else:
                told.allowed += 1
                assert holds_a_credential(raw), (seed, raw.hex())
    finally:
        logging.getLogger("authz").removeHandler(broken)
    raise AssertionError("there is always another question")


class _Broken(logging.Handler):
    """Keeps what the service says of its own mistakes."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


def main() -> None:
    args = argparse.ArgumentParser("python -m tests.fuzz_check", description=__doc__)
    args.add_argument("--seconds", type=float, default=60)
    args.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    chosen = args.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    end = time.monotonic() + chosen.seconds
    told = asyncio.run(fuzz(chosen.seed, lambda _: time.monotonic() < end))
    print(
        f"{told.asked} questions: {told.allowed} let in with a genuine credential, "
        f"{told.refused} refused, {told.no_question} that are none; nothing broke"
    )
    sys.exit(0 if told.refused and told.no_question else 1)


if __name__ == "__main__":
    main()
