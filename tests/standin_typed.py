"""The two APIs whose streams are typed events: OpenAI's Responses and Anthropic's Messages."""

import time
from collections.abc import Iterator

from tests import standin_dialects as dialects
from tests.standin_dialects import Behaviour, Flavour, Json, Refused, Work, typed

Events = Iterator[tuple[Json, int]]


def work(kind: str, found: Json, says: Behaviour, model: str, flavour: Flavour) -> Work:
    """Raises Refused for what the server would not take."""
    ollama, responses = flavour == "ollama", kind == "v1/responses"
    limit = typed(found, "max_output_tokens" if responses else "max_tokens", int)
    if not responses and flavour != "llamacpp":
        if limit is None or limit <= 0:
            raise Refused(400, "max_tokens is required and must be positive")
        if not found.get("messages"):
            raise Refused(400, "messages is required")
    if responses and not found.get("input") and not ollama:
        raise Refused(400, "'input' is required")
    return Work(
        kind="v1/responses" if responses else "v1/messages",
        flavour=flavour,
        says=says,
        model=model,
        maximum=limit if limit is not None and limit > 0 else None,
        stream=typed(found, "stream", bool) is True,
    )


def answer(work: Work) -> Json:
    return _response(work) if work.kind == "v1/responses" else _message(work)


def events(work: Work) -> Events:
    return _numbered(work) if work.kind == "v1/responses" else _message_events(work)


def count_tokens(says: Behaviour) -> Json:
    return {"input_tokens": says.prompt_tokens}


def error_event(work: Work) -> Json | None:
    """An error in the middle of a stream; None where the server loses it and just ends."""
    message = work.says.error
    if work.flavour == "ollama":
        return None
    if work.flavour == "llamacpp":
        told = {"code": 500, "message": message, "type": "server_error"}
        return {"error": told} if work.kind == "v1/responses" else told
    if work.kind == "v1/messages":
        return dialects.error("/v1/messages", work.flavour, 500, message)
    return {"type": "error", "code": "server_error", "message": message, "param": None}


# --- Responses ---


def _response(work: Work) -> Json:
    cut = work.reason == "length" and work.flavour not in ("ollama", "llamacpp")
    told = _response_usage(work)
    return {
        **_response_head(work, "incomplete" if cut else "completed"),
        "completed_at": None if cut else int(time.time()),
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [item for item, _ in _items(work)],
        **({"usage": told} if told is not None else {}),
    }


def _response_head(work: Work, status: str) -> Json:
    head = {"id": f"resp_{work.created}", "object": "response", "status": status}
    return {
        **head,
        "created_at": work.created,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": work.maximum,
        "metadata": {},
        "model": work.model,
        "output": [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": None,
    }


def _response_usage(work: Work) -> Json | None:
    says = work.says
    if "usage" in says.omit or work.flavour == "bare":
        return None
    usage: Json = {
        "input_tokens": says.prompt_tokens,
        "output_tokens": work.emitted,
        "total_tokens": says.prompt_tokens + work.emitted,
        "input_tokens_details": {
            "cached_tokens": 0 if work.flavour == "ollama" else says.cached_tokens
        },
    }
    if work.flavour != "llamacpp":
        thought = 0 if work.flavour == "ollama" else min(says.reasoning_tokens, work.emitted)
        usage["output_tokens_details"] = {"reasoning_tokens": thought}
    return dialects.told(usage, says)


def _part(text: str) -> Json:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _items(work: Work) -> Iterator[tuple[Json, Json]]:
    """What was put out: each item as it is in the end, and as it is when it begins."""
    thinking = work.text(thinking=True)
    if thinking:
        item: Json = {"id": "rs_1", "type": "reasoning", "summary": []}
        yield {**item, "summary": [{"type": "summary_text", "text": thinking}]}, item
    if work.call is not None:
        item = {"id": "fc_1", "type": "function_call", "call_id": work.call.id}
        item |= {"name": work.call.name, "status": "in_progress", "arguments": ""}
        yield {**item, "status": "completed", "arguments": work.called()}, item
        return
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress"}
    item["content"] = []
    done = {"status": "completed", "content": [_part(work.text(thinking=False))]}
    yield {**item, **done}, item


def _numbered(work: Work) -> Events:
    for number, (value, tokens) in enumerate(_response_events(work)):
        numbered = {} if work.flavour == "llamacpp" else {"sequence_number": number}
        yield {**value, **numbered}, tokens


def _response_events(work: Work) -> Events:
    head = _response_head(work, "in_progress")
    if work.flavour == "llamacpp":
        head = {name: head[name] for name in ("id", "object", "status")}
    for name in ("created", "in_progress"):
        yield {"type": f"response.{name}", "response": head}, 0
    for index, (done, begun) in enumerate(_items(work)):
        at = {"output_index": index}
        yield {"type": "response.output_item.added", **at, "item": begun}, 0
        yield from _item_events(work, {"item_id": done["id"], **at}, done)
        yield {"type": "response.output_item.done", **at, "item": done}, 0
    end = _response(work)
    yield {"type": f"response.{end['status']}", "response": end}, 0


def _item_events(work: Work, at: Json, item: Json) -> Events:
    if item["type"] == "function_call":
        delta = {"type": "response.function_call_arguments.delta", **at}
        for _, count, text in work.call_pieces():
            yield {**delta, "delta": text}, count
        done = {"arguments": item["arguments"], "name": item["name"]}
        yield {"type": "response.function_call_arguments.done", **at, **done}, 0
        return
    thinking = item["type"] == "reasoning"
    name = "response.output_text"
    if thinking:
        llama = work.flavour == "llamacpp"
        name = "response.reasoning_text" if llama else "response.reasoning_summary_text"
    at = {**at, "summary_index" if thinking else "content_index": 0}
    part = {"type": "response.content_part.added", **at, "part": _part("")}
    if not thinking:
        yield part, 0
    logprobs = {} if thinking else {"logprobs": []}
    for _, count, thought, text in work.pieces():
        if thought == thinking:
            yield {"type": f"{name}.delta", **at, "delta": text, **logprobs}, count
    text = work.text(thinking=thinking)
    yield {"type": f"{name}.done", **at, "text": text, **logprobs}, 0
    if not thinking:
        yield {**part, "type": "response.content_part.done", "part": _part(text)}, 0


# --- Messages ---

_STOPPED = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _message(work: Work) -> Json:
    told = _message_usage(work, written=work.emitted)
    return {
        **_message_head(work),
        "content": [done for done, _ in _blocks(work)],
        "stop_reason": _STOPPED[work.reason],
        **({"usage": told} if told is not None else {}),
    }


def _message_head(work: Work) -> Json:
    head = {"id": f"msg_{work.created}", "type": "message", "role": "assistant"}
    return {**head, "model": work.model, "content": [], "stop_reason": None, "stop_sequence": None}


def _message_usage(work: Work, written: int) -> Json | None:
    """What is cached stands beside the rest of the prompt; Ollama does not tell it."""
    says = work.says
    if "usage" in says.omit or work.flavour == "bare":
        return None
    if work.flavour == "ollama":
        usage = {"input_tokens": says.prompt_tokens, "output_tokens": written}
    else:
        usage = {
            "input_tokens": says.prompt_tokens - says.cached_tokens,
            "cache_read_input_tokens": says.cached_tokens,
            "output_tokens": written,
        }
    if work.flavour not in ("ollama", "llamacpp"):
        usage["cache_creation_input_tokens"] = 0
    return dialects.told(usage, says)


def _first_usage(work: Work) -> Json:
    """In `message_start`. Ollama guesses the prompt there; Anthropic has written one token."""
    told = _message_usage(work, 0 if work.flavour in ("ollama", "llamacpp") else 1)
    if told is None:
        return {}
    if work.flavour == "ollama":
        told["input_tokens"] = max(1, work.says.prompt_tokens // 2)
    return {"usage": told}


def _last_usage(work: Work) -> Json:
    """In `message_delta`: all the counts from some, from others what was written."""
    told = _message_usage(work, work.emitted)
    if told is None:
        return {}
    if work.flavour not in ("ollama", "cumulative"):
        told = {name: count for name, count in told.items() if not name.endswith("input_tokens")}
    return {"usage": told}


def _blocks(work: Work) -> Iterator[tuple[Json, Json]]:
    """Each content block as it is in the end, and as it is when it begins."""
    thinking = work.text(thinking=True)
    if thinking:
        block = {"type": "thinking", "thinking": "", "signature": ""}
        yield {**block, "thinking": thinking}, block
    if work.call is not None:
        block = {"type": "tool_use", "id": work.call.id, "name": work.call.name}
        yield {**block, "input": work.called_with()}, {**block, "input": {}}
        return
    yield {"type": "text", "text": work.text(thinking=False)}, {"type": "text", "text": ""}


def _message_events(work: Work) -> Events:
    yield {"type": "message_start", "message": {**_message_head(work), **_first_usage(work)}}, 0
    for index, (done, begun) in enumerate(_blocks(work)):
        at = {"index": index}
        yield {"type": "content_block_start", **at, "content_block": begun}, 0
        if index == 0 and work.flavour not in ("ollama", "llamacpp"):
            yield {"type": "ping"}, 0
        for count, delta in _deltas(work, done["type"]):
            yield {"type": "content_block_delta", **at, "delta": delta}, count
        yield {"type": "content_block_stop", **at}, 0
    stopped = {"stop_reason": _STOPPED[work.reason], "stop_sequence": None}
    yield {"type": "message_delta", "delta": stopped, **_last_usage(work)}, 0
    yield {"type": "message_stop"}, 0


def _deltas(work: Work, block: str) -> Iterator[tuple[int, Json]]:
    if block == "tool_use":
        for _, count, text in work.call_pieces():
            yield count, {"type": "input_json_delta", "partial_json": text}
        return
    for _, count, thought, text in work.pieces():
        if thought == (block == "thinking"):
            name = "thinking" if thought else "text"
            yield count, {"type": f"{name}_delta", name: text}
