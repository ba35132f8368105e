"""Envoy's rate-limit messages to our values, and back."""

from envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from google.protobuf.message import DecodeError

from parallama import contract
from parallama.dialects import OF_MODELS, refusal
from parallama.errors import ParallamaError
from ratelimit.rules import MOST_TOKENS, Admitted, Refused, Reserve, Room, Settle, duration

# More digits than any number that matters has.
_MOST_DIGITS = 18

SETTLED = bytes(RateLimitResponse(overall_code=RateLimitResponse.OK).SerializeToString())


class BadCall(ParallamaError):
    """Envoy asked something that makes no sense. Compare envoy/ with parallama/contract.py."""


def parse(message: bytes) -> Reserve | Settle:
    """Raises BadCall on everything else: what is not understood must not pass as unlimited."""
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
    user = _needed(entries, contract.USER)
    if contract.RESERVATION in entries:
        if not descriptor.HasField("hits_addend"):
            raise BadCall("a reservation is settled without hits_addend")
        used = min(descriptor.hits_addend.value, MOST_TOKENS)
        reported = contract.PROMPT_REPORTED in entries
        return Settle(
            user,
            _needed(entries, contract.RESERVATION),
            used,
            key=entries.get(contract.KEY, ""),
            gateway=entries.get(contract.GATEWAY, ""),
            model=entries.get(contract.MODEL, ""),
            grants=entries.get(contract.GRANTS, ""),
            body_bytes=_number(entries, contract.BODY_BYTES),
            prompt_tokens=_number(entries, contract.PROMPT_REPORTED) if reported else None,
            bounded=contract.MAX_TOKENS in entries,
        )
    dialect = _needed(entries, contract.DIALECT)
    if dialect not in OF_MODELS:
        raise BadCall(f"{contract.DIALECT} is none of {', '.join(OF_MODELS)}")
    most = _number(entries, contract.MAX_TOKENS)
    return Reserve(
        user=user,
        key=entries.get(contract.KEY, ""),
        gateway=_needed(entries, contract.GATEWAY),
        dialect=dialect,
        model=entries.get(contract.MODEL, ""),
        endpoint=entries.get(contract.ENDPOINT, ""),
        # Ollama knows -1 and -2 as "no maximum", and means the same by 0.
        max_tokens=most if most > 0 else None,
        body_bytes=max(0, _number(entries, contract.BODY_BYTES)),
        request_id=_needed(entries, contract.REQUEST_ID),
    )


def admitted(answer: Admitted) -> bytes:
    response = RateLimitResponse(overall_code=RateLimitResponse.OK)
    facts = response.dynamic_metadata.fields
    facts[contract.RESERVATION].string_value = answer.reservation
    facts[contract.GRANTED].number_value = answer.granted
    if answer.cap is not None:
        facts[contract.CAP].string_value = str(answer.cap)
    if answer.would_refuse:
        facts[contract.WOULD_REFUSE].string_value = "; ".join(answer.would_refuse)
    if answer.grants:
        facts[contract.GRANTS].string_value = answer.grants
    if answer.decision:
        facts[contract.DECISION].string_value = answer.decision
    _describe(response, answer.requests, answer.tokens)
    return bytes(response.SerializeToString())


def refused(answer: Refused, dialect: str, *, request_id: str = "") -> bytes:
    body = refusal(dialect, 429, answer.code, answer.message, request_id=request_id)
    response = RateLimitResponse(overall_code=RateLimitResponse.OVER_LIMIT, raw_body=body)
    if answer.decision:
        response.dynamic_metadata.fields[contract.DECISION].string_value = answer.decision
    _describe(response, answer.requests, answer.tokens)
    add = response.response_headers_to_add.add
    add(key="content-type", value="application/json")
    add(key="retry-after", value=str(answer.retry_after))
    if not answer.may_retry:
        add(key="x-should-retry", value="false")
    return bytes(response.SerializeToString())


def _needed(entries: dict[str, str], name: str) -> str:
    value = entries.get(name)
    if not value:
        raise BadCall(f"{name} is missing")
    return value


def _number(entries: dict[str, str], name: str) -> int:
    """0 where it is missing or empty."""
    text = entries.get(name)
    if not text:
        return 0
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        raise BadCall(f"{name} is not a whole number")
    return int(text) if len(digits) <= _MOST_DIGITS else MOST_TOKENS


def _describe(response: RateLimitResponse, requests: Room | None, tokens: Room | None) -> None:
    """The headers that OpenAI's clients know, and what is left, for the usage row."""
    if requests is not None:
        response.dynamic_metadata.fields[contract.REQUESTS_LEFT].number_value = requests.left
        _headers(response, "requests", requests)
    if tokens is not None:
        response.dynamic_metadata.fields[contract.TOKENS_LEFT].number_value = tokens.left
        _headers(response, "tokens", tokens)


def _headers(response: RateLimitResponse, unit: str, room: Room) -> None:
    add = response.response_headers_to_add.add
    add(key=f"x-ratelimit-limit-{unit}", value=str(room.limit))
    add(key=f"x-ratelimit-remaining-{unit}", value=str(room.left))
    add(key=f"x-ratelimit-reset-{unit}", value=duration(room.resets_in))
