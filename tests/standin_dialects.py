"""What the stand-in makes of a request and what it says: dialects and manners, without any wire."""

import ipaddress
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from tests.standin_asked import Call

Json = dict[str, Any]
Flavour = Literal["ollama", "llamacpp", "openai", "bare", "cumulative"]
"""
Whose manners a request meets.

ollama       both dialects; usage in SSE only with include_usage; JSON read as Go reads it
llamacpp     no /api/*; `timings` in the last chunk unless include_usage; an unknown model is 400
openai       with include_usage: `usage: null` on every chunk and one more chunk that has it
bare         never any usage
cumulative   `usage: null` first, then the count so far on every chunk, asked or not

To `/v1/messages` the last three answer as Anthropic does.
"""

Kind = Literal["chat", "generate", "v1/chat", "v1/completions", "v1/responses", "v1/messages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How one request is answered. A chunk is an SSE event or an NDJSON line, the last included."""

    flavour: Flavour | None = None
    """None: the server's own."""

    # What is generated, and what is said about it.
    tokens: int = 7
    """The model stops here by itself; a maximum in the request stops it earlier."""
    prompt_tokens: int = 11
    cached_tokens: int = 0
    """Part of the prompt. Ollama does not report it."""
    reasoning_tokens: int = 0
    """This many of the tokens, the first ones, are thinking."""
    tokens_per_chunk: int = 1
    report: Json = field(default_factory=dict)
    """Put over the usage object, `timings` or done line: a lie, such as {"eval_count": -5}."""
    omit: tuple[str, ...] = ()
    """Fields left out there; "usage" and "timings" leave out the whole object."""
    usage_padding: int = 0
    """Bytes that stand before the counts in the event that carries them."""

    # Time.
    delay: float = 0.0
    """Seconds before the first byte of the answer."""
    gap: float = 0.0
    """Seconds between chunks. An answer in one piece takes as long as its stream would."""
    hold_at: int | None = None
    """Waits before this chunk (0: before the status line) until `release(gate)`."""
    gate: str = "gate"
    early_headers: bool = False
    """Status and headers of a stream go out before the first wait."""

    # Things that go wrong.
    status: int = 200
    """400 and above: this error instead of an answer."""
    error: str = "the stand-in was told to fail"
    error_after: int | None = None
    """After this many chunks of a stream comes an error, as the flavour says it, and the end."""
    cut_before: bool = False
    """The connection ends in the place of an answer."""
    cut_after: int | None = None
    """After this many chunks the connection ends; an answer in one piece ends in its middle."""
    cut: Literal["close", "reset", "clean"] = "close"
    """Without the end of the body, by a TCP reset, or as if that had been the end."""
    raw: str | None = None
    """This body instead of what would be right."""

    # The form of the bytes.
    write_size: int = 0
    """Every write, and every HTTP chunk, has at most so many bytes; 0: a chunk in one piece."""
    chunks_per_write: int = 1
    crlf: bool = False
    comments: bool = False
    """An SSE comment before every event."""
    spaces: bool = False
    """JSON with spaces, and with line breaks where it is the whole body."""
    gzip: bool = False
    """If the client accepts it."""
    final_newline: bool = True
    content_type: str | None = None
    framing: Literal["auto", "chunked", "close"] = "auto"
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Json) -> Self:
        """Raises TypeError on a name that does not exist."""
        return cls(**{**value, "omit": tuple(value.get("omit", ()))})


class Refused(Exception):
    """An error answer: status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# --- reading ---


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written: order and duplicates kept."""


def _no_constant(text: str) -> Any:
    raise ValueError(f"invalid character '{text[0]}' looking for beginning of value")


_AS_WRITTEN = json.JSONDecoder(object_pairs_hook=Pairs, parse_constant=_no_constant)
_GO_POINTERS = {"stream", "stream_options", "max_tokens", "options", "keep_alive"}


def go_fold(key: str) -> str:
    """Two keys that fold to the same name are one field to Go: simple folding, rune by rune."""
    return "".join(c.casefold() if len(c.casefold()) == 1 else c for c in key)


def go_struct(pairs: Pairs) -> Json:
    """
    The fields as Go's decoder fills a struct: case does not matter, the last of several wins,
    an object is merged into the one before it, null empties a pointer and changes nothing else.
    """
    found: Json = {}
    for key, value in pairs:
        name = go_fold(key)
        if value is None:
            if name in _GO_POINTERS:
                found.pop(name, None)
        elif isinstance(value, Pairs) and isinstance(found.get(name), Pairs):
            found[name] = Pairs(found[name] + value)
        else:
            found[name] = value
    return found


def parse(body: bytes, go: bool) -> Json:
    """
    The top-level fields of a body; raises ValueError or RecursionError.

    Ollama reads the first JSON value and never looks at what follows it; the others read all.
    """
    text = body.decode("utf-8", "replace" if go else "strict").lstrip(" \t\r\n")
    value, end = _AS_WRITTEN.raw_decode(text)
    if not isinstance(value, Pairs):
        raise ValueError("the body is not an object")
    if go:
        return go_struct(value)
    if text[end:].strip(" \t\r\n"):
        raise ValueError("unexpected bytes after the object")
    return dict(value)


def typed(found: Json, name: str, *kinds: type) -> Any:
    """The field if it has one of these types, None if it is absent; Refused if it has another."""
    value = found.get(name)
    if value is not None and type(value) not in kinds:
        kind = {"str": "string", "int": "number", "float": "number"}.get(
            type(value).__name__, "value"
        )
        raise Refused(400, f"json: cannot unmarshal {kind} into Go struct field .{name}")
    return value


def inner(found: Json, name: str, go: bool = False) -> Json:
    """An object inside the body, {} where there is none."""
    value = found.get(name)
    if not isinstance(value, Pairs):
        return {}
    return go_struct(value) if go else dict(value)


_NAME = re.compile(r"(?:(?:([\w.-]+(?::\d+)?)/)?([\w-]+)/)?([\w.-]+)(?::([\w.-]+))?", re.ASCII)


def ollama_name(name: str) -> str | None:
    """The full name as Ollama completes and compares it, or None where it is not a name."""
    match = _NAME.fullmatch(name.removeprefix("http://").removeprefix("https://"))
    if match is None:
        return None
    host, namespace, model, tag = match.groups()
    return (
        f"{host or 'registry.ollama.ai'}/{namespace or 'library'}/{model}:{tag or 'latest'}".lower()
    )


def host_allowed(host: str) -> bool:
    """What Ollama on loopback lets pass as Host, and as the host of an Origin."""
    name = re.sub(r":\d+$", "", host).strip("[]").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        if name in ("", "localhost", socket.gethostname().lower()):
            return True
        return name.endswith((".localhost", ".local", ".internal"))
    return address.is_loopback or address.is_private or address.is_unspecified


# --- what is generated ---


@dataclass(slots=True)
class Work:
    """One generation that was accepted."""

    kind: Kind
    flavour: Flavour
    says: Behaviour
    model: str
    """As the answer names it."""
    maximum: int | None
    """Tokens each choice may have at most."""
    stream: bool
    choices: int = 1
    include_usage: bool = False
    call: "Call | None" = None
    """After its thinking the model says this instead of text."""
    json_text: bool = False
    """The text is a JSON object."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokens(self) -> int:
        return self.says.tokens if self.maximum is None else min(self.says.tokens, self.maximum)

    @property
    def emitted(self) -> int:
        return self.tokens * self.choices

    @property
    def reason(self) -> str:
        if self.tokens < self.says.tokens:
            return "length"
        return "stop" if self.call is None else "tool_calls"

    @property
    def thought(self) -> int:
        """Tokens of thinking."""
        return min(self.says.reasoning_tokens, self.tokens)

    def pieces(self) -> Iterator[tuple[int, int, bool, str]]:
        """(choice, tokens in this piece, is it thinking, text) in the order of the stream."""
        step, end = self.says.tokens_per_chunk, self.tokens if self.call is None else self.thought
        for first in range(0, end, step):
            count = min(step, end - first)
            text = "".join(f"w{n} " for n in range(first, first + count))
            thinking = first < self.says.reasoning_tokens
            if self.json_text and not thinking:
                opens = first - step < self.thought
                closes = first + count == self.says.tokens
                text = '{"words": "' * opens + text + '"}' * closes
            for choice in range(self.choices):
                yield choice, count, thinking, text

    def call_pieces(self) -> Iterator[tuple[int, int, str]]:
        """(choice, tokens in this piece, part of the arguments) in the order of the stream."""
        step, left = self.says.tokens_per_chunk, self.tokens - self.thought
        whole = self.says.tokens - min(self.says.reasoning_tokens, self.says.tokens)
        for first in range(0, left, step):
            count = min(step, left - first)
            text = self._arguments(first, first + count, whole)
            for choice in range(self.choices):
                yield choice, count, text

    def _arguments(self, first: int, last: int, whole: int) -> str:
        """What these tokens of the call say, so that all of them say all of it."""
        assert self.call is not None
        text = self.call.arguments
        return text[len(text) * first // whole : len(text) * last // whole]

    def called(self) -> str:
        """The arguments, as far as the model came."""
        return "".join(text for choice, _, text in self.call_pieces() if choice == 0)

    def called_with(self) -> Json:
        """The same as an object; what is not whole is nothing."""
        try:
            return dict(json.loads(self.called()))
        except ValueError:
            return {}

    def text(self, *, thinking: bool) -> str:
        return "".join(
            text for choice, _, t, text in self.pieces() if choice == 0 and t == thinking
        )


def ollama_work(
    kind: Literal["chat", "generate"], found: Json, says: Behaviour, model: str
) -> Work:
    limit = typed(inner(found, "options"), "num_predict", int, float)
    return Work(
        kind=kind,
        flavour="ollama",
        says=says,
        model=model,
        maximum=int(limit) if limit is not None and limit > 0 else None,
        stream=typed(found, "stream", bool) is not False,
    )


_MAXIMUM: dict[Flavour, tuple[str, ...]] = {
    "ollama": ("max_tokens",),  # it has no field for any other name
    "llamacpp": ("n_predict", "max_tokens", "max_completion_tokens"),
    "openai": ("max_completion_tokens", "max_tokens"),
    "bare": ("max_completion_tokens", "max_tokens"),
    "cumulative": ("max_completion_tokens", "max_tokens"),
}


def v1_work(
    kind: Literal["v1/chat", "v1/completions"],
    found: Json,
    says: Behaviour,
    model: str,
    flavour: Flavour,
) -> Work:
    limits = (typed(found, name, int) for name in _MAXIMUM[flavour])
    limit = next((value for value in limits if value is not None), None)
    unlimited = limit is None or limit < 0 or (limit == 0 and flavour == "ollama")
    options = inner(found, "stream_options", go=flavour == "ollama")
    return Work(
        kind=kind,
        flavour=flavour,
        says=says,
        model=model,
        maximum=None if unlimited else limit,
        stream=typed(found, "stream", bool) is True,
        choices=1 if flavour == "ollama" else typed(found, "n", int) or 1,
        include_usage=typed(options, "include_usage", bool) is True,
    )


def answer(work: Work) -> Json:
    """The answer in one piece."""
    return _v1_answer(work) if work.kind.startswith("v1/") else _ollama_answer(work)


def events(work: Work) -> Iterator[tuple[Json, int]]:
    """The chunks of the stream, each with the tokens it carries."""
    return _v1_events(work) if work.kind.startswith("v1/") else _ollama_events(work)


def told(counts: Json, says: Behaviour) -> Json:
    """The counts as they are told: padded, with lies, with gaps."""
    padding = {"padding": "x" * says.usage_padding} if says.usage_padding else {}
    return {k: v for k, v in (padding | counts | says.report).items() if k not in says.omit}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000000Z", time.gmtime())


def _ollama_done(work: Work) -> Json:
    load, prompt, written = 1_000_000, work.says.prompt_tokens, work.tokens
    counts = {
        "total_duration": load + prompt * 1_000_000 + written * 10_000_000,
        "load_duration": load,
        "prompt_eval_count": prompt,
        "prompt_eval_duration": prompt * 1_000_000,
        "eval_count": written,
        "eval_duration": written * 10_000_000,
    }
    context = {"context": [1, 2, 3]} if work.kind == "generate" else {}
    not_zero = {k: v for k, v in counts.items() if v}  # Go leaves zeros out
    reason = "length" if work.reason == "length" else "stop"
    return {"done": True, "done_reason": reason, **context, **told(not_zero, work.says)}


def _ollama_calls(work: Work) -> Json:
    assert work.call is not None
    function = {"index": 0, "name": work.call.name, "arguments": work.called_with()}
    calls = [{"id": work.call.id, "function": function}]
    return {"message": {"role": "assistant", "content": "", "tool_calls": calls}}


def _ollama_part(work: Work, text: str, thinking: str) -> Json:
    thought = {"thinking": thinking} if thinking else {}
    if work.kind == "generate":
        return {"response": text, **thought}
    return {"message": {"role": "assistant", "content": text, **thought}}


def _ollama_answer(work: Work) -> Json:
    part = _ollama_part(work, work.text(thinking=False), work.text(thinking=True))
    if work.call is not None:
        part["message"] |= _ollama_calls(work)["message"]
    return {"model": work.model, "created_at": _now(), **part, **_ollama_done(work)}


def _ollama_events(work: Work) -> Iterator[tuple[Json, int]]:
    head = {"model": work.model, "created_at": _now()}
    for _, count, thinking, text in work.pieces():
        part = _ollama_part(work, "", text) if thinking else _ollama_part(work, text, "")
        yield {**head, **part, "done": False}, count
    if work.call is not None:  # in one piece, once it is parsed
        yield {**head, **_ollama_calls(work), "done": False}, work.tokens - work.thought
    yield {**head, **_ollama_part(work, "", ""), **_ollama_done(work)}, 0


def ollama_loaded(kind: str, model: str, reason: Literal["load", "unload"]) -> Json:
    """What a call without any prompt gets: the model was loaded, or unloaded."""
    message = {"message": {"role": "assistant", "content": ""}}
    part = {"response": ""} if kind == "generate" else message
    return {"model": model, "created_at": _now(), **part, "done": True, "done_reason": reason}


def _usage(work: Work, written: int) -> Json:
    says = work.says
    if "usage" in says.omit:
        return {}
    usage: Json = {
        "prompt_tokens": says.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": says.prompt_tokens + written,
    }
    if work.flavour != "ollama":
        usage["prompt_tokens_details"] = {"cached_tokens": says.cached_tokens}
    if work.flavour in ("openai", "cumulative"):
        thought = min(says.reasoning_tokens, written)
        usage["completion_tokens_details"] = {"reasoning_tokens": thought}
    return {"usage": told(usage, says)}


def _timings(work: Work) -> Json:
    fresh = work.says.prompt_tokens - work.says.cached_tokens
    if work.flavour != "llamacpp" or "timings" in work.says.omit:
        return {}
    timings = {
        "cache_n": work.says.cached_tokens,
        "prompt_n": fresh,
        "prompt_ms": fresh * 1.0,
        "prompt_per_token_ms": 1.0,
        "prompt_per_second": 1000.0,
        "predicted_n": work.emitted,
        "predicted_ms": work.emitted * 10.0,
        "predicted_per_token_ms": 10.0,
        "predicted_per_second": 100.0,
    }
    return {"timings": told(timings, work.says)}


def _v1_head(work: Work, *, chunk: bool) -> Json:
    chat = work.kind == "v1/chat"
    chat_object = "chat.completion.chunk" if chunk else "chat.completion"
    fingerprint = {"ollama": "fp_ollama", "llamacpp": "b11434"}.get(work.flavour, "fp_standin")
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{work.created}",
        "object": chat_object if chat else "text_completion",
        "created": work.created,
        "model": work.model,
        "system_fingerprint": fingerprint,
    }


def _thinking_field(work: Work) -> str:
    return "reasoning" if work.flavour == "ollama" else "reasoning_content"


def _v1_answer(work: Work) -> Json:
    text, thinking = work.text(thinking=False), work.text(thinking=True)
    thought = {_thinking_field(work): thinking} if thinking else {}
    calls = {"tool_calls": [_v1_call(work, work.called())]} if work.call else {}
    message = {"message": {"role": "assistant", "content": text, **thought, **calls}}
    said = message if work.kind == "v1/chat" else {"text": text}
    choices = [{"index": n, **said, "finish_reason": work.reason} for n in range(work.choices)]
    usage = {} if work.flavour == "bare" else _usage(work, work.emitted)
    return {**_v1_head(work, chunk=False), "choices": choices, **usage, **_timings(work)}


def _v1_call(work: Work, arguments: str, *, begins: bool = True) -> Json:
    """A call, or a later part of one: that has nothing but arguments."""
    assert work.call is not None
    if not begins:
        return {"index": 0, "function": {"arguments": arguments}}
    function = {"name": work.call.name, "arguments": arguments}
    return {"index": 0, "id": work.call.id, "type": "function", "function": function}


def _v1_call_events(work: Work) -> Iterator[tuple[int, int, Json]]:
    """(choice, tokens, delta): whole from Ollama, as it is written from the others."""
    if work.flavour == "ollama":
        yield 0, work.tokens - work.thought, {"tool_calls": [_v1_call(work, work.called())]}
        return
    begun = set[int]()
    for choice, count, text in work.call_pieces():
        yield choice, count, {"tool_calls": [_v1_call(work, text, begins=choice not in begun)]}
        begun.add(choice)


def _v1_choice(work: Work, choice: int, said: Json, reason: str | None = None) -> Json:
    """One entry of `choices` in a chunk; `said` is what a chat delta holds."""
    if work.kind == "v1/completions":
        return {"index": choice, "text": said.get("content") or "", "finish_reason": reason}
    if work.flavour == "ollama":  # says role and content every time
        said = {"role": "assistant", "content": "", **said}
    return {"index": choice, "delta": said, "finish_reason": reason}


def _v1_events(work: Work) -> Iterator[tuple[Json, int]]:
    head = _v1_head(work, chunk=True)
    every = range(work.choices)
    written = 0

    def chunk(choices: list[Json], *, first: bool = False, **more: Any) -> Json:
        usage: Json = {}
        if work.flavour == "cumulative":
            usage = {"usage": None} if first else _usage(work, written)
        elif work.flavour == "openai" and work.include_usage:
            usage = {"usage": None}
        return {**head, "choices": choices, **usage, **more}

    if work.kind == "v1/chat" and work.flavour != "ollama":
        role = {"role": "assistant", "content": None if work.flavour == "llamacpp" else ""}
        yield chunk([_v1_choice(work, n, role) for n in every], first=True), 0
    for choice, count, thinking, text in work.pieces():
        written += count
        said = {_thinking_field(work) if thinking else "content": text}
        yield chunk([_v1_choice(work, choice, said)]), count
    for choice, count, said in _v1_call_events(work) if work.call is not None else ():
        written += count
        yield chunk([_v1_choice(work, choice, said)]), count
    timings = {} if work.include_usage else _timings(work)
    for choice in every:
        yield chunk([_v1_choice(work, choice, {}, work.reason)], **timings), 0
    if work.include_usage and work.flavour in ("ollama", "openai", "llamacpp"):
        yield {**head, "choices": [], **_usage(work, work.emitted), **_timings(work)}, 0


# --- errors ---

_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error(path: str, flavour: Flavour, status: int, message: str) -> Json:
    """An error in the shape that this server uses on this path."""
    if path.startswith("/v1/messages") and flavour != "llamacpp":
        kind = _ANTHROPIC_KINDS.get(status, "api_error")
        told = {"type": kind, "message": message}
        return {"type": "error", "error": told, "request_id": "req_standin"}
    if flavour == "ollama":
        if path.startswith("/api/"):
            return {"error": message}
        kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}
    if flavour == "llamacpp":
        kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
        kinds |= {501: "not_supported_error", 503: "unavailable_error"}
        return {
            "error": {"code": status, "message": message, "type": kinds.get(status, "server_error")}
        }
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = "model_not_found" if status == 404 else None
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_event(work: Work) -> Json:
    """
    An error in the middle of a stream.

    Ollama's own lines say it. Its /v1 takes that line for an answer without text: it is lost.
    """
    if work.flavour == "ollama" and work.kind.startswith("v1/"):
        return {**_v1_head(work, chunk=True), "choices": [_v1_choice(work, 0, {})]}
    path = "/v1/" if work.kind.startswith("v1/") else "/api/"
    return error(path, work.flavour, 500, work.says.error)
