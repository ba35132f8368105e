"""Envoy's rate-limit messages to our values, and back."""

import struct
from typing import NoReturn

from envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from google.protobuf.message import DecodeError

from parallama import contract
from parallama.dialects import OF_MODELS, refusal
from parallama.errors import ParallamaError
from ratelimit.rules import MOST_TOKENS, Admitted, Refused, Reserve, Room, Settle, duration

_RESERVATION = contract.RESERVATION.encode()

# More digits than any number that matters has.
_MOST_DIGITS = 18

# What fields begin with, as protobuf writes them: number << 3 | 2, or 0 for a plain number.
_DOMAIN, _DESCRIPTOR = 0x0A, 0x12  # of a RateLimitRequest
_ENTRY, _ADDEND, _KEY, _VALUE, _NUMBER = 0x0A, 0x1A, 0x0A, 0x12, 0x08  # of a descriptor, and in it
_METADATA = 0x32  # of a RateLimitResponse
_TEXT_VALUE = 0x1A  # of a Value
_ONE_BYTE = 127  # the largest size that takes no more
_double = struct.Struct("<d").pack

_OK = bytes(RateLimitResponse(overall_code=RateLimitResponse.OK).SerializeToString())
SETTLED = _OK

Entries = tuple[dict[str, str], int | None]
"""Those of the one descriptor, and its addend."""


class BadCall(ParallamaError):
    """Envoy asked something that makes no sense. Compare envoy/ with parallama/contract.py."""


def may_reserve(message: bytes) -> bool:
    """Before it is parsed; False for every Settle, and for a model that has such a name."""
    return _RESERVATION not in message


def parse(message: bytes) -> Reserve | Settle:
    """Raises BadCall on everything else: what is not understood must not pass as unlimited."""
    entries, addend = as_envoy_writes_it(message) or read(message)
    get = entries.get
    user = get(contract.USER) or _missing(contract.USER)
    if contract.RESERVATION in entries:
        if addend is None:
            raise BadCall("a reservation is settled without hits_addend")
        reported = contract.PROMPT_REPORTED in entries
        return Settle(
            user,
            get(contract.RESERVATION) or _missing(contract.RESERVATION),
            min(addend, MOST_TOKENS),
            key=get(contract.KEY, ""),
            gateway=get(contract.GATEWAY, ""),
            model=get(contract.MODEL, ""),
            grants=get(contract.GRANTS, ""),
            body_bytes=_number(entries, contract.BODY_BYTES),
            prompt_tokens=_number(entries, contract.PROMPT_REPORTED) if reported else None,
            bounded=contract.MAX_TOKENS in entries,
        )
    dialect = get(contract.DIALECT) or _missing(contract.DIALECT)
    if dialect not in OF_MODELS:
        raise BadCall(f"{contract.DIALECT} is none of {', '.join(OF_MODELS)}")
    most = _number(entries, contract.MAX_TOKENS)
    return Reserve(
        user=user,
        key=get(contract.KEY, ""),
        gateway=get(contract.GATEWAY) or _missing(contract.GATEWAY),
        dialect=dialect,
        model=get(contract.MODEL, ""),
        endpoint=get(contract.ENDPOINT, ""),
        # Ollama knows -1 and -2 as "no maximum", and means the same by 0.
        max_tokens=most if most > 0 else None,
        body_bytes=max(0, _number(entries, contract.BODY_BYTES)),
        request_id=get(contract.REQUEST_ID) or _missing(contract.REQUEST_ID),
    )


def read(message: bytes) -> Entries:
    """Raises BadCall."""
    try:
        request = RateLimitRequest.FromString(message)
    except DecodeError as error:
        raise BadCall("this is no RateLimitRequest") from error
    if len(request.descriptors) != 1:
        raise BadCall(f"expected 1 descriptor, got {len(request.descriptors)}")
    descriptor = request.descriptors[0]
    entries = {entry.key: entry.value for entry in descriptor.entries}
    if len(entries) != len(descriptor.entries):
        raise BadCall("an entry of the descriptor is given twice")
    return entries, descriptor.hits_addend.value if descriptor.HasField("hits_addend") else None


def as_envoy_writes_it(message: bytes) -> Entries | None:
    """
    What `read` says of a message that is built as Envoy's are: a domain, then one descriptor, with
    entries of a key and a value, and an addend or none. None for all others, right or wrong.

    The library takes twice as long in a service that is seldom asked: docs/decisions/0028.
    """
    entries: dict[str, str] = {}
    count, addend = 0, None
    end = len(message)
    try:
        at = 2 + message[1]
        size, start = _varint(message, at + 1)
        if message[0] != _DOMAIN or message[at] != _DESCRIPTOR or start + size != end:
            return None
        at = start
        while at < end:
            tag = message[at]
            size, at = _varint(message, at + 1)
            stop = at + size
            if tag == _ENTRY:
                of_key = message[at + 1]
                middle = at + 2 + of_key
                size, start = _varint(message, middle + 1)
                if message[at] != _KEY or of_key > _ONE_BYTE or message[middle] != _VALUE:
                    return None
                if start + size != stop:
                    return None
                entries[str(message[at + 2 : middle], "utf-8")] = str(message[start:stop], "utf-8")
                count += 1
            elif tag == _ADDEND and addend is None:
                if size and message[at] != _NUMBER:
                    return None
                addend, at = _varint(message, at + 1) if size else (0, at)
                if at != stop:
                    return None
            else:
                return None
            at = stop
    except (IndexError, ValueError):
        return None
    return (entries, addend) if at == end and len(entries) == count else None


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends. Raises IndexError or ValueError."""
    number = message[at]
    if number <= _ONE_BYTE:
        return number, at + 1
    number &= 127
    for shift in range(7, 63, 7):
        at += 1
        byte = message[at]
        number |= (byte & 127) << shift
        if byte <= _ONE_BYTE:
            return number, at + 1
    raise ValueError("a number that nothing here has")


def admitted(answer: Admitted) -> bytes:
    """Written without the library, for the same reason."""
    told, headers = _rooms(answer.requests, answer.tokens)
    told[contract.RESERVATION] = answer.reservation
    told[contract.GRANTED] = answer.granted
    if answer.cap is not None:
        told[contract.CAP] = str(answer.cap)
    if answer.would_refuse:
        told[contract.WOULD_REFUSE] = "; ".join(answer.would_refuse)
    if answer.grants:
        told[contract.GRANTS] = answer.grants
    if answer.decision:
        told[contract.DECISION] = answer.decision
    facts = [_fact(name, value) for name, value in told.items()]
    parts = [_header(name, value) for name, value in headers]
    return b"".join((_OK, *parts, _field(_METADATA, b"".join(facts))))


def refused(answer: Refused, dialect: str, *, request_id: str = "") -> bytes:
    body = refusal(dialect, 429, answer.code, answer.message, request_id=request_id)
    response = RateLimitResponse(overall_code=RateLimitResponse.OVER_LIMIT, raw_body=body)
    facts, headers = _rooms(answer.requests, answer.tokens)
    if answer.decision:
        facts[contract.DECISION] = answer.decision
    response.dynamic_metadata.update(facts)
    headers += [("content-type", "application/json"), ("retry-after", str(answer.retry_after))]
    if not answer.may_retry:
        headers.append(("x-should-retry", "false"))
    for name, value in headers:
        response.response_headers_to_add.add(key=name, value=value)
    return bytes(response.SerializeToString())


def _missing(name: str) -> NoReturn:
    raise BadCall(f"{name} is missing")


def _number(entries: dict[str, str], name: str) -> int:
    """0 where it is missing or empty."""
    text = entries.get(name)
    if not text:
        return 0
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        raise BadCall(f"{name} is not a whole number")
    return int(text) if len(digits) <= _MOST_DIGITS else MOST_TOKENS


def _rooms(
    requests: Room | None, tokens: Room | None
) -> tuple[dict[str, str | float], list[tuple[str, str]]]:
    """What is left, for the usage row, and the headers that OpenAI's clients know."""
    facts: dict[str, str | float] = {}
    headers: list[tuple[str, str]] = []
    if requests is not None:
        facts[contract.REQUESTS_LEFT] = requests.left
        headers += _headers("requests", requests)
    if tokens is not None:
        facts[contract.TOKENS_LEFT] = tokens.left
        headers += _headers("tokens", tokens)
    return facts, headers


def _headers(unit: str, room: Room) -> list[tuple[str, str]]:
    return [
        (f"x-ratelimit-limit-{unit}", str(room.limit)),
        (f"x-ratelimit-remaining-{unit}", str(room.left)),
        (f"x-ratelimit-reset-{unit}", duration(room.resets_in)),
    ]


def _header(name: str, value: str) -> bytes:
    """A HeaderValue of ours: short, and in ASCII."""
    sizes = len(name) + len(value) + 4, len(name), len(value)
    return b"\x1a%c\n%c%b\x12%c%b" % (sizes[0], sizes[1], name.encode(), sizes[2], value.encode())


def _fact(name: str, value: str | float) -> bytes:
    """An entry of a Struct."""
    key = b"\n%c%b" % (len(name), name.encode())
    if isinstance(value, str):
        return _field(_ENTRY, key + _field(_VALUE, _field(_TEXT_VALUE, value.encode())))
    return b"\n%c%b\x12\x09\x11%b" % (len(key) + 11, key, _double(value))


def _field(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size <= _ONE_BYTE:
        return b"%c%c%b" % (tag, size, value)
    digits = bytearray((tag,))
    while size > _ONE_BYTE:
        digits.append(size & 127 | 128)
        size >>= 7
    digits.append(size)
    return bytes(digits) + value
