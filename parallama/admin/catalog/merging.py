"""Lists of models as one caller may see them (pure)."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any

from parallama.endpoints import model_allowed
from parallama.limits import plain_name
from parallama.mappings import plain

ALL = ("*",)
"""Of a caller whose credential is not restricted to some models."""

_KEYS = ("models", "data")
_NAMES = ("id", "model", "name")
_SMALL = 1 << 18
_SURROGATE = re.compile("[\ud800-\udfff]")

Entry = dict[str, Any]
Document = dict[str, Any]


class Unreadable(ValueError):
    """This is no list of models."""


@dataclass(frozen=True, slots=True)
class Alias:
    """A name, as the operator wrote it, that means a model."""

    name: str
    model: str


@dataclass(frozen=True, slots=True)
class View:
    """Whose list it is: what they may use, as patterns, and what names mean on their gateway."""

    allowed: tuple[str, ...]
    aliases: tuple[Alias, ...] = ()

    @property
    def changes_nothing(self) -> bool:
        return self.allowed == ALL and not self.aliases


@dataclass(frozen=True, slots=True)
class Listed:
    """A model that a caller may use. `mapped`: the name means another one."""

    name: str
    mapped: bool


def read(body: bytes) -> Document:
    """The object that an answer is. Raises Unreadable."""
    try:
        found = json.loads(body, parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError):
        raise Unreadable("not JSON") from None
    if not isinstance(found, dict):
        raise Unreadable("no JSON object")
    return found


def read_list(body: bytes) -> Document:
    """Raises Unreadable also where there is no list of models in it."""
    found = read(body)
    held = [found[name] for name in _KEYS if name in found]
    if not held or not all(each is None or isinstance(each, list) for each in held):
        raise Unreadable("no list of models")
    return found


def shown(body: bytes, view: View) -> bytes:
    """
    The list that `body` is, as they may see it: without what their credential is not for, and with
    names that are mapped to something listed. Where that changes nothing, its very bytes.

    Raises Unreadable.
    """
    if view.changes_nothing:
        return body
    return _shown_again(body, view) if len(body) <= _SMALL else _shown(body, view)


def models(body: bytes, view: View) -> tuple[Listed, ...]:
    """What they may use, in the order of the list. Raises Unreadable."""
    found: dict[str, Listed] = {}
    for entry, alias in _each(read_list(body), view):
        name = _name(entry) if alias is None else alias.name
        if name is not None:
            found.setdefault(name, Listed(name, alias is not None))
    return tuple(found.values())


def one(body: bytes, view: View, asked: str) -> Entry | None:
    """The entry of the model that they mean by this name; None where there is none for them."""
    best = None
    for entry, alias in _each(read_list(body), view):
        name = _name(entry) if alias is None else alias.name
        if name is None:
            continue
        if name == asked:
            return _renamed(entry, asked)
        if best is None and _same(name) == _same(asked):
            best = entry
    return None if best is None else _renamed(best, asked)


def text(document: Document) -> bytes:
    """Without spaces, as Go writes it; what is no Unicode stays an escape. Raises Unreadable."""
    try:
        written = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise Unreadable("too many levels") from None
    return written.encode("utf-8", "backslashreplace")


@lru_cache(maxsize=32)
def _shown_again(body: bytes, view: View) -> bytes:
    return _shown(body, view)


def _shown(body: bytes, view: View) -> bytes:
    found = read_list(body)
    changed = False
    for key in _KEYS:
        if entries := found.get(key):
            left = _visible(entries, view)
            changed = changed or len(left) != len(entries) or any(map(_differ, left, entries))
            found[key] = left
    return text(found) if changed else body


def _differ(entry: Any, other: Any) -> bool:
    return entry is not other


def _each(found: Document, view: View) -> Iterable[tuple[Entry, Alias | None]]:
    for key in _KEYS:
        yield from _chosen(found.get(key) or [], view)


def _visible(entries: list[Any], view: View) -> list[Any]:
    return [
        entry if alias is None else _renamed(entry, alias.name)
        for entry, alias in _chosen(entries, view)
    ]


def _chosen(entries: list[Any], view: View) -> Iterable[tuple[Any, Alias | None]]:
    """What they may use, and for names that are mapped the entry of what they mean."""
    meant = {plain(alias.name) for alias in view.aliases}
    found: dict[str, Entry] = {}
    for entry in entries:
        name = _name(entry)
        if name is None:
            if view.allowed == ALL:
                yield entry, None
            continue
        found.setdefault(_same(name), entry)
        # Who asks for a name that is mapped gets what it means: this model cannot be reached.
        if plain(name) not in meant and all(
            model_allowed(view.allowed, each) for each in _names(entry)
        ):
            yield entry, None
    for alias in view.aliases:
        entry = found.get(_same(alias.model))
        if entry is not None and _may_use(view, alias):
            yield entry, alias


def _may_use(view: View, alias: Alias) -> bool:
    """As authz decides it: the model may be used, or the name, in any of its spellings."""
    spelled = tuple(map(plain, view.allowed))
    return model_allowed(view.allowed, alias.model) or model_allowed(spelled, plain(alias.name))


def _name(entry: Any) -> str | None:
    """What a client would call it."""
    if not isinstance(entry, dict):
        return None
    name = next((entry[key] for key in _NAMES if key in entry), None)
    return name if isinstance(name, str) and not _SURROGATE.search(name) else None


def _names(entry: Entry) -> set[str]:
    """Mostly one: Ollama says it twice."""
    return {entry[key] for key in _NAMES if isinstance(entry.get(key), str)}


def _same(name: str) -> str:
    """Alike for all spellings under which a server may know the same model."""
    return plain(plain_name(name))


def _renamed(entry: Entry, name: str) -> Entry:
    """Wherever it says its own name, whatever the field (vLLM's `root`) is called."""
    own = _names(entry)
    return {
        key: name if isinstance(value, str) and value in own else value
        for key, value in entry.items()
    }


def _number(text: str) -> float:
    """One that can be written again: not `NaN`, nor what is too large."""
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text} is no JSON")
    return number
