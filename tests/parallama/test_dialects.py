"""A refusal is read by clients: its form is theirs."""

import json

import pytest

from parallama.dialects import refusal

OPENAI_TYPES = [
    (400, "invalid_json", "invalid_request_error"),
    (401, "invalid_api_key", "invalid_request_error"),
    (403, "permission_denied", "permission_error"),
    (404, "model_not_found", "invalid_request_error"),
    (405, "method_not_allowed", "invalid_request_error"),
    (413, "request_too_large", "invalid_request_error"),
    (429, "rate_limit_exceeded", "rate_limit_exceeded"),
    (429, "insufficient_quota", "insufficient_quota"),
    (500, "internal_error", "server_error"),
    (503, "service_unavailable", "server_error"),
]


@pytest.mark.parametrize(("status", "code", "kind"), OPENAI_TYPES)
def test_openais_form(status: int, code: str, kind: str) -> None:
    assert json.loads(refusal("openai", status, code, "Why.")) == {
        "error": {"message": "Why.", "type": kind, "param": None, "code": code}
    }


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 503])
def test_ollamas_form_is_one_sentence(status: int) -> None:
    assert json.loads(refusal("ollama", status, "code", "Why.")) == {"error": "Why."}


ANTHROPIC_TYPES = [
    (400, "invalid_request_error"),
    (401, "authentication_error"),
    (403, "permission_error"),
    (404, "not_found_error"),
    (405, "invalid_request_error"),
    (413, "invalid_request_error"),
    (429, "rate_limit_error"),
    (500, "api_error"),
    (503, "overloaded_error"),
    (504, "timeout_error"),
]


@pytest.mark.parametrize(("status", "kind"), ANTHROPIC_TYPES)
def test_anthropics_form(status: int, kind: str) -> None:
    told = {"type": "error", "error": {"type": kind, "message": "Why."}}
    assert json.loads(refusal("anthropic", status, "code", "Why.")) == told
    named = refusal("anthropic", status, "code", "Why.", request_id="r-1")
    assert json.loads(named) == {**told, "request_id": "r-1"}


@pytest.mark.parametrize("dialect", ["ollama", "openai", "problem"])
def test_the_request_is_named_in_anthropics_form_alone(dialect: str) -> None:
    assert refusal(dialect, 400, "c", "m", request_id="r") == refusal(dialect, 400, "c", "m")


@pytest.mark.parametrize("dialect", ["", "Anthropic", "Ollama", "\n"])
def test_a_dialect_nobody_knows_gets_openais_form(dialect: str) -> None:
    assert refusal(dialect, 400, "c", "m") == refusal("openai", 400, "c", "m")


@pytest.mark.parametrize("dialect", ["ollama", "openai", "anthropic"])
@pytest.mark.parametrize(
    "message",
    ["two\nlines", "tab\tand\r\nmore", 'a "quote" and a \\', "Über 量子 🦙", "\x00\x1b[31m"],
)
def test_a_body_is_one_line_of_json_whatever_it_says(dialect: str, message: str) -> None:
    body = refusal(dialect, 400, "c", message)
    assert b"\n" not in body
    error = json.loads(body)["error"]
    said = error if dialect == "ollama" else error["message"]
    assert said.split() == message.split()
