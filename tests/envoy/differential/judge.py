"""Whether facts.lua and the servers behind it read the same, before and after its edits."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from json.decoder import scanstring
from typing import Any, NamedTuple

from parallama import mappings
from tests.envoy.differential.readers import BOUNDS, View
from tests.envoy.differential.texts import GENERATES, SHAPES, USUAL, Text

Facts = Mapping[str, Any]
Views = Mapping[str, View | None]

_STREAMS_BY_DEFAULT = ("/api/chat", "/api/generate")
_ALL_BOUNDS = {*BOUNDS, "num_predict"}
_MOST = 1e9


def complaints(text: Text, facts: Facts, sent: bytes, before: Views, after: Views) -> Iterator[str]:
    """
    What is wrong with these facts, and with the body that is sent on. The views are those of the
    body as it came, and as it is sent.
    """
    if facts["body_bytes"] != str(len(text.body)):
        yield "body_bytes"
    for reader, came in before.items():
        if came is None:
            continue
        gone = after.get(reader)
        if gone is None:
            yield f"{reader}: is sent what it cannot read"
            continue
        for said in (
            *_model(text, facts, came, gone),
            *_stream(text, facts, came, gone),
            *_bound(text, facts, gone),
            *_shape(text, facts, came, gone),
        ):
            yield f"{reader}: {said}"
    if sent != text.body and any(came is not None for came in before.values()):
        yield from _edits(
            text.body.decode("latin-1"), sent.decode("latin-1"), _may_change(text, facts)
        )


def _asked(text: Text, view: View) -> Any:
    """The model that a server takes."""
    return view["model"] or (view["name"] if text.dialect == "ollama" else None) or None


def _model(text: Text, facts: Facts, came: View, gone: View) -> Iterator[str]:
    asked = _asked(text, came)
    if asked is not None and not isinstance(asked, str):
        yield f"takes {asked!r} for a model"
        return
    means = mappings.target_of(text.table, asked) if asked else _usual(text)
    if facts.get("model") != (means or asked):
        yield f"asked for {asked!r}, facts say {facts.get('model')!r}"
    if facts.get("requested_model") != (asked if means else None):
        yield f"asked for {asked!r}, facts say that was {facts.get('requested_model')!r}"
    if _asked(text, gone) != (means or asked):
        yield f"is sent {_asked(text, gone)!r} for {asked!r}"
    if text.dialect == "ollama" and gone["model"] and gone["name"] not in (None, "", gone["model"]):
        yield "is sent two models"


def _usual(text: Text) -> str | None:
    return text.usual if text.endpoint != "/api/show" else None


def _inner(view: View, name: str) -> Mapping[str, Any]:
    """The members of an object; what is no object has none."""
    return value if isinstance(value := view[name], dict) else {}


def _stream(text: Text, facts: Facts, came: View, gone: View) -> Iterator[str]:
    usual = text.dialect == "ollama" and text.endpoint in _STREAMS_BY_DEFAULT
    for view in (came, gone):
        if (usual if view["stream"] is None else view["stream"]) is not facts["stream"]:
            yield f"stream is {view['stream']!r}, facts say {facts['stream']}"
    options, sent = came["stream_options"], gone["stream_options"]
    match facts.get("stream_usage"):
        case "ours" if {**_inner(came, "stream_options"), "include_usage": True} != sent:
            yield f"is sent {sent!r} for stream_options {options!r}"
        case "client" if _inner(gone, "stream_options").get("include_usage") is not True:
            yield f"did not ask for usage: {options!r}"
        case "client" | None if options != sent:
            yield f"is sent {sent!r} for {options!r}"


def _bounds(text: Text, view: View) -> tuple[dict[str, Any], str]:
    """Those that some server honours, and the name that all do."""
    if text.dialect == "ollama":
        return {"num_predict": _inner(view, "options").get("num_predict")}, "num_predict"
    base = "max_output_tokens" if text.endpoint == "/v1/responses" else "max_tokens"
    return {name: view[name] for name in BOUNDS}, base


def _bound(text: Text, facts: Facts, gone: View) -> Iterator[str]:
    """The answer is never longer than the facts say, and than a hard limit lets it be."""
    bounds, base = _bounds(text, gone)
    answers = _answers(text, gone) if text.dialect != "ollama" else 1.0
    given = [value for value in bounds.values() if value is not None]
    counts = bounds[base] is not None and all(isinstance(n, float) and n > 0 for n in given)
    if text.cap and not (counts and max(given) <= max(1, text.cap // answers)):
        yield f"is bound to {bounds} times {answers}, the limit to {text.cap}"
    if "max_tokens" in facts:
        most = int(facts["max_tokens"])
        if not counts:
            yield f"has no bound that counts: {bounds}, facts say {most}"
        elif max(given) * answers > most < _MOST:
            yield f"is bound to {max(given)} times {answers}, facts say {most}"


def _answers(text: Text, view: View) -> float:
    each = max([1.0, *(view[name] for name in ("n", "best_of") if isinstance(view[name], float))])
    prompt = view["prompt"]
    if text.endpoint != "/v1/completions" or not isinstance(prompt, list):
        return each
    return each * (1 if all(isinstance(item, float) for item in prompt) else len(prompt))


def _shape(text: Text, facts: Facts, came: View, gone: View) -> Iterator[str]:
    """What the operator wants holds, and nothing else was changed."""
    shape = SHAPES[text.shape]
    changed = _changed(facts)
    ollama = text.dialect == "ollama"
    if not ollama and came["options"] != gone["options"]:
        yield "is sent other options"
    others = (*BOUNDS, "keep_alive", "n", "best_of", "prompt")
    before, after = (
        {**(_inner(view, "options") if ollama else {}), **{name: view[name] for name in others}}
        for view in (came, gone)
    )
    for name in {*before, *after}:
        if text.cap and name in _ALL_BOUNDS:
            continue
        if name in changed:
            if _written(name, after.get(name)) != changed[name]:
                yield f"is sent {name}={after.get(name)!r}, was told {changed[name]}"
        elif before.get(name) != after.get(name):
            yield f"is sent {name}={after.get(name)!r} for {before.get(name)!r}"
    for name, rule in shape.items():
        if name == "max_tokens":
            if text.endpoint in GENERATES and not text.cap:
                names = ("num_predict",) if ollama else BOUNDS
                yield from _bounds_keep(rule, {n: after.get(n) for n in names})
        elif ollama and not _keeps(name, rule, came_value := before.get(name), after.get(name)):
            yield f"is sent {name}={after.get(name)!r} for {came_value!r} by {rule}"


def _bounds_keep(rule: Mapping[str, Any], sent: Mapping[str, Any]) -> Iterator[str]:
    values = [value for value in sent.values() if value is not None]
    most = rule.get("set", rule.get("max"))
    if rule.get("drop") and values:
        yield f"is sent bounds that should go: {sent}"
    if most is not None and not (values and all(_within(1, value, most) for value in values)):
        yield f"is sent bounds above {most}: {sent}"


def _keeps(name: str, rule: Mapping[str, Any], came: Any, sent: Any) -> bool:
    value = _seconds(sent) if name == "keep_alive" else sent
    if rule.get("drop"):
        return sent is None
    if "set" in rule:
        return bool(value == rule["set"])
    if came is None:
        usual = rule.get("default")
        return bool(value == (_seconds(usual) if name == "keep_alive" else usual))
    least = 0 if name in ("num_gpu", "keep_alive") else 1
    return "max" not in rule or _within(least, value, rule["max"])


def _within(least: float, value: Any, most: float) -> bool:
    return isinstance(value, float) and least <= value <= most


_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "\u00b5s": 1e-6}


def _seconds(value: Any) -> float | None:
    """As Ollama reads `keep_alive`: below zero is for ever."""
    if isinstance(value, str):
        found = re.fullmatch(r"([-+]?)((?:(?:\d+\.?\d*|\.\d+)(?:h|ms|m|us|\u00b5s|s))+|0)", value)
        if not found:
            return None
        parts = re.findall(r"([\d.]+)(h|ms|m|us|\u00b5s|s)", found[2])
        value = sum(float(n) * _UNITS[unit] for n, unit in parts) * (-1 if found[1] == "-" else 1)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return -1.0 if value < 0 else float(value)


def _changed(facts: Facts) -> dict[str, str]:
    pairs = (each.split("=") for each in facts.get("changed", "").split(", ") if each)
    return {name: value for name, value in pairs}


def _written(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if isinstance(value, float) else json.dumps(value)


def _may_change(text: Text, facts: Facts) -> set[str]:
    names = {*_changed(facts), *(_ALL_BOUNDS if text.cap else ())}
    if facts.get("stream_usage") == "ours":
        names |= {"stream_options", "include_usage"}
    if facts.get("requested_model") or facts.get("model") == USUAL:
        names |= {"model", "name"}
    return names | ({"options"} if names else set())


# The bytes.


class Member(NamedTuple):
    """Of an object, as it stands there: key, value, and what is around them."""

    before: str
    key: str
    between: str
    value: str
    after: str


_SPACE = re.compile(r"[ \t\r\n]*")
_scan = json.JSONDecoder(strict=False, parse_int=len, parse_float=len).scan_once


def _gap(text: str, at: int) -> tuple[str, int]:
    found = _SPACE.match(text, at)
    assert found
    return found[0], found.end()


def members(text: str) -> tuple[str, list[Member], str]:
    """What is before the first member of an object, its members, and what is after the last."""
    gap, at = _gap(text, 0)
    assert text[at] == "{"
    head, at = text[: at + 1], at + 1
    inside, end = _gap(text, at)
    if text[end] == "}":
        return head + inside, [], text[end:]
    found = []
    while True:
        before, start = _gap(text, at)
        _, at = scanstring(text, start + 1, False)
        key = text[start:at]
        gap, colon = _gap(text, at)
        more, start = _gap(text, colon + 1)
        _, at = _scan(text, start)
        after, end = _gap(text, at)
        found.append(Member(before, key, f"{gap}:{more}", text[start:at], after))
        at = end + 1
        if text[end] != ",":
            return head, found, text[end:]


def _edits(came: str, sent: str, may_change: Iterable[str]) -> Iterator[str]:
    try:
        yield from [*edits(came, sent, may_change)]
    except RecursionError:
        pass  # too deep for Python
    except (LookupError, RuntimeError, ValueError) as error:
        yield f"what is sent is broken: {error!r}"


def edits(came: str, sent: str, may_change: Iterable[str]) -> Iterator[str]:
    """Every byte of an object is as it was, but for values of these names, and for new ones."""
    head, old, tail = members(came)
    sent_head, new, sent_tail = members(sent)
    if len(new) < len(old):
        yield f"{len(old) - len(new)} members are gone"
        return
    added = new[: len(new) - len(old)]
    if tail != sent_tail or head != (sent_head if old or not new else sent_head + new[-1].after):
        yield f"bytes around the object: {sent_head!r} {sent_tail!r}"
    for one in added:
        if one.key.strip('"') not in may_change or (one.before + one.between).strip(":"):
            yield f"{one} was put in"
    for was, now in zip(old, new[len(added) :], strict=True):
        if was == now:
            continue
        if was._replace(value=now.value) != now or was.key.strip('"') not in may_change:
            yield f"{was} became {now}"
        elif was.value[0] == now.value[0] == "{":
            yield from edits(was.value, now.value, may_change)
