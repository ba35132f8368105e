"""Refusals in the words of the API that the caller speaks (pure)."""

import json

OLLAMA = "ollama"
OPENAI = "openai"


def refusal(dialect: str, status: int, code: str, message: str) -> bytes:
    """
    The JSON body of a refusal: OpenAI's error object, or Ollama's single sentence.

    Ollama's clients read line by line, so `message` is kept on one line. A dialect nobody knows
    gets OpenAI's form.
    """
    sentence = " ".join(message.split())
    if dialect == OLLAMA:
        return json.dumps({"error": sentence}, ensure_ascii=False).encode()
    error = {"message": sentence, "type": _openai_type(status, code), "param": None, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False).encode()


def _openai_type(status: int, code: str) -> str:
    if status == 403:
        return "permission_error"
    if status == 429:
        return code
    return "server_error" if status >= 500 else "invalid_request_error"
