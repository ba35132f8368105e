"""What a request asks of the stand-in beside text: a tool call, a JSON object, a look at images."""

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.standin_dialects import Json, Pairs, Refused


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call; `arguments` is JSON."""

    name: str
    arguments: str
    id: str = "call_standin1"


def plain(value: Any) -> Any:
    """The value without its order and duplicates: the last of several wins."""
    if isinstance(value, Pairs):
        return {key: plain(inside) for key, inside in value}
    if isinstance(value, list):
        return [plain(inside) for inside in value]
    return value


def call(found: Json) -> Call | None:
    """
    The tool that the model calls: the first one, or the one it has to.

    It calls none where it may not, and where the last message brings a tool's answer.
    """
    offered = [_function(tool) for tool in _objects(plain(found.get("tools")))]
    choice = plain(found.get("tool_choice"))
    told = _function(choice).get("name") if isinstance(choice, dict) else None
    if choice == "none" or (isinstance(choice, dict) and choice.get("type") == "none"):
        return None
    if _answered(found):
        return None
    tool = next((t for t in offered if t.get("name") and told in (None, t["name"])), None)
    if tool is None:
        return None
    schema = tool.get("parameters") or tool.get("input_schema") or {}
    properties = schema.get("properties") or {}
    arguments = {name: _example(kind) for name, kind in properties.items()}
    return Call(tool["name"], json.dumps(arguments, separators=(",", ":")))


def wants_json(found: Json) -> bool:
    """`format` of Ollama, `response_format` of chat/completions, `text.format` of Responses."""
    form = plain(found.get("format"))
    if form == "json" or isinstance(form, dict):
        return True
    told = plain(found.get("response_format")) or (plain(found.get("text")) or {}).get("format")
    return isinstance(told, dict) and told.get("type") in ("json_object", "json_schema")


def images(found: Json, *, ollama: bool) -> int:
    """How many came with the prompt. Raises Refused for what Ollama cannot read."""
    count = 0
    for image in _images(found):
        count += 1
        _, _, data = image.rpartition(",")
        remote = image.startswith(("http://", "https://"))
        try:
            if not remote:
                base64.b64decode(data, validate=True)
        except binascii.Error:
            raise Refused(400, "illegal base64 data at input byte 0") from None
        if remote and ollama:
            raise Refused(400, "invalid image input")
    return count


def _images(found: Json) -> Iterator[str]:
    yield from (x for x in plain(found.get("images")) or [] if isinstance(x, str))
    for message in _messages(found):
        yield from (x for x in message.get("images") or [] if isinstance(x, str))
        for part in _objects(message.get("content")):
            if part.get("type") in ("image_url", "input_image"):
                told = part.get("image_url") or ""
                yield told["url"] if isinstance(told, dict) else told
            elif part.get("type") == "image":
                source = part.get("source") or {}
                yield source.get("data") or source.get("url") or ""


def _messages(found: Json) -> list[Json]:
    return _objects(plain(found.get("messages") or found.get("input")))


def _objects(value: Any) -> list[Json]:
    return [x for x in value if isinstance(x, dict)] if isinstance(value, list) else []


def _function(tool: Json) -> Json:
    """Where the name stands: chat wraps it, Responses and Messages do not."""
    function = tool.get("function")
    return function if isinstance(function, dict) else tool


def _answered(found: Json) -> bool:
    last = (_messages(found) or [{}])[-1]
    parts = {part.get("type") for part in _objects(last.get("content"))}
    return (
        last.get("role") == "tool"
        or last.get("type") == "function_call_output"
        or "tool_result" in parts
    )


def _example(kind: Json) -> Any:
    if kind.get("enum"):
        return kind["enum"][0]
    return {"integer": 1, "number": 1, "boolean": True, "array": [], "object": {}}.get(
        kind.get("type", ""), "w0"
    )
