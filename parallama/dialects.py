"""Refusals in the words of the API that the caller speaks (pure)."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

OLLAMA = "ollama"
OPENAI = "openai"
PROBLEM = "problem"
"""Of the admin API: RFC 9457."""


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


def refusal(dialect: str, status: int, code: str, message: str) -> bytes:
    """
    The JSON body of a refusal: OpenAI's error object, Ollama's single sentence, or a problem.

    Ollama's clients read line by line, so `message` is kept on one line. A dialect nobody knows
    gets OpenAI's form.
    """
    sentence = " ".join(message.split())
    if dialect == OLLAMA:
        return json.dumps({"error": sentence}, ensure_ascii=False).encode()
    if dialect == PROBLEM:
        return problem(status, code, sentence)
    error = {"message": sentence, "type": _openai_type(status, code), "param": None, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False).encode()


def _openai_type(status: int, code: str) -> str:
    if status == 403:
        return "permission_error"
    if status == 429:
        return code
    return "server_error" if status >= 500 else "invalid_request_error"
