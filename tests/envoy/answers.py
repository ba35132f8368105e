"""Answers as servers write them, by form, for the tests of usage.lua."""

import json
from collections.abc import Sequence

from parallama import contract
from tests.envoy.lua_host import authz

SSE, NDJSON, JSON = "text/event-stream", "application/x-ndjson", "application/json"
CHUNKED = {"transfer-encoding": "chunked"}

BROKEN = (
    "the answer ended before it was complete: the server behind this gateway stopped without an"
    " end mark"
)
ENDPOINTS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "ollama": "/api/chat",
}
KINDS = dict.fromkeys(ENDPOINTS, SSE) | {"ollama": NDJSON}

Metadata = dict[str, dict[str, object]]


def metadata(form: str, **facts: object) -> Metadata:
    """As it is when the answer of such a call comes."""
    dialect = {"ollama": "ollama", "messages": "anthropic"}.get(form, "openai")
    found = authz(metered="1", read_body=True, dialect=dialect, endpoint=ENDPOINTS[form])
    return {**found, contract.LUA: {contract.TOTAL_TOKENS: 0, **facts}}


def mapped(form: str, asked: str = "gpt-4", meant: str = "m", **facts: object) -> Metadata:
    return metadata(form, requested_model=asked, model=meant, **facts)


def dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def event(value: object, kind: str = "") -> bytes:
    head = b"event: %b\n" % kind.encode() if kind else b""
    return head + b"data: %b\n\n" % dumps(value)


def chat(texts: Sequence[str], model: str = "m", usage: bool = True) -> bytes:
    """llama.cpp's members in llama.cpp's order."""

    def chunk(choices: list[object], **more: object) -> bytes:
        tail = {"created": 1, "id": "c", "model": model, "object": "chat.completion.chunk"}
        return event({"choices": choices, **tail, **more})

    def delta(**members: object) -> bytes:
        return chunk([{"finish_reason": None, "index": 0, "delta": members}])

    counts = {"prompt_tokens": 7, "completion_tokens": len(texts)}
    return b"".join(
        [
            delta(role="assistant", content=None),
            *(delta(content=text) for text in texts),
            chunk([{"finish_reason": "stop", "index": 0, "delta": {}}]),
            chunk([], usage=counts) if usage else b"",
            b"data: [DONE]\n\n",
        ]
    )


def completions(texts: Sequence[str], model: str = "m", usage: bool = True) -> bytes:
    counts = {"prompt_tokens": 7, "completion_tokens": len(texts)}
    chunks = [
        {"id": "c", "model": model, "choices": [{"text": text, "index": 0}], "obfuscation": "x" * n}
        for n, text in enumerate(texts)
    ]
    if usage:
        chunks.append({"id": "c", "model": model, "choices": [], "usage": counts})
    return b"".join(map(event, chunks)) + b"data: [DONE]\n\n"


def responses(texts: Sequence[str], model: str = "m", usage: bool = True) -> bytes:
    """Ollama's: the whole object in the first and last events, and a number in each."""
    whole = {"id": "r", "object": "response", "error": None, "model": model, "usage": None}
    counts = {
        "input_tokens": 7, "output_tokens": len(texts), "total_tokens": 7 + len(texts),
        "input_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip
    done = {**whole, "usage": counts if usage else None, "output": [{"text": "".join(texts)}]}
    events: list[dict[str, object]] = [
        {"type": "response.created", "response": whole},
        {"type": "response.content_part.added", "part": {"type": "output_text", "text": ""}},
        *({"type": "response.output_text.delta", "delta": text, "logprobs": []} for text in texts),
        {"type": "response.output_text.done", "text": "".join(texts)},
        {"type": "response.completed", "response": done},
    ]
    return b"".join(
        event({**one, "sequence_number": n}, str(one["type"])) for n, one in enumerate(events)
    )


def messages(texts: Sequence[str], model: str = "m", usage: bool = True) -> bytes:
    """Anthropic's, with all that its usage can say."""
    begin = {
        "input_tokens": 2, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2,
        "output_tokens": 1,
    }  # fmt: skip
    events: list[dict[str, object]] = [
        {"type": "message_start", "message": {"model": model, "content": [], "usage": begin}},
        {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "delta": {"text": text}} for text in texts),
        {"type": "content_block_stop"},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"},
         **({"usage": {"output_tokens": len(texts)}} if usage else {})},
        {"type": "message_stop"},
    ]  # fmt: skip
    return b"".join(event(one, str(one["type"])) for one in events)


def ollama(texts: Sequence[str], model: str = "m", usage: bool = True) -> bytes:
    counts = {"prompt_eval_count": 7, "eval_count": len(texts)} if usage else {}
    lines = [
        {"model": model, "created_at": f"2026-01-01T00:00:0{n % 10}.{'1' * (1 + n % 3)}Z",
         "message": {"role": "assistant", "content": text}, "done": False}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    last = {"model": model, "message": {"role": "assistant", "content": ""}, "done": True, **counts}
    return b"".join(dumps(line) + b"\n" for line in [*lines, last])


FORMS = {
    "chat": chat,
    "completions": completions,
    "responses": responses,
    "messages": messages,
    "ollama": ollama,
}
