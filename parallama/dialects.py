"""Refusals in the words of the API that the caller speaks (pure)."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

OLLAMA = "ollama"
OPENAI = "openai"
ANTHROPIC = "anthropic"
"""Of `/v1/messages`, whatever is before it."""
PROBLEM = "problem"
"""Of the admin API: RFC 9457."""

OF_MODELS = (OLLAMA, OPENAI, ANTHROPIC)
"""Those in which models are called."""

_ANTHROPIC_TYPES = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
        500: "api_error",
        503: "overloaded_error",
        504: "timeout_error",
    }
)


def content_type(dialect: str) -> str:
    """Of a refusal."""
    return "application/problem+json" if dialect == PROBLEM else "application/json"


def problem(
    status: int, code: str, detail: str, *, errors: Sequence[Mapping[str, str]] = ()
) -> bytes:
    """`code` is for programs and stays; `errors` name the fields that are wrong."""
    told: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
    if errors:
        told["errors"] = list(errors)
    return json.dumps(told, ensure_ascii=False).encode()


def refusal(dialect: str, status: int, code: str, message: str, *, request_id: str = "") -> bytes:
    """
    The JSON body of a refusal: OpenAI's or Anthropic's error object, Ollama's single sentence, or
    a problem. Anthropic's names the request, where it is known.

    Ollama's clients read line by line, so `message` is kept on one line. A dialect nobody knows
    gets OpenAI's form.
    """
    sentence = " ".join(message.split())
    told: dict[str, Any]
    if dialect == PROBLEM:
        return problem(status, code, sentence)
    if dialect == OLLAMA:
        told = {"error": sentence}
    elif dialect == ANTHROPIC:
        told = {"type": "error", "error": {"type": _anthropic_type(status), "message": sentence}}
        if request_id:
            told["request_id"] = request_id
    else:
        kind = _openai_type(status, code)
        told = {"error": {"message": sentence, "type": kind, "param": None, "code": code}}
    return json.dumps(told, ensure_ascii=False).encode()


def _openai_type(status: int, code: str) -> str:
    if status == 403:
        return "permission_error"
    if status == 429:
        return code
    return "server_error" if status >= 500 else "invalid_request_error"


def _anthropic_type(status: int) -> str:
    other = "api_error" if status >= 500 else "invalid_request_error"
    return _ANTHROPIC_TYPES.get(status, other)
