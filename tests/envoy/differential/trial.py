"""Gives texts to facts.lua as it runs in Envoy, and what passes to those who read it then."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from parallama.contract import CAP, RATELIMIT
from tests.envoy.differential.judge import complaints
from tests.envoy.differential.readers import MODELS, Real, View
from tests.envoy.differential.texts import Text
from tests.envoy.lua_host import Filter, Passed

_BATCH = 1000
_TOO_DEEP = b"[" * 400  # for Python, and so for the models

Facts = Callable[[Text], Passed]
Views = dict[str, View | None]


@dataclass
class Told:
    """How many texts there were of each kind, and what is wrong."""

    texts: int = 0
    refused: int = 0
    edited: int = 0
    read: int = 0
    wrong: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Told") -> "Told":
        for name in ("texts", "refused", "edited", "read", "wrong"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


def lua() -> Facts:
    """facts.lua, and cap.lua behind it where a hard limit counts."""
    facts, cap = Filter("facts"), Filter("cap")

    def passed(text: Text) -> Passed:
        found = facts.request(text.body, text.metadata)
        if text.cap and not found.answer:
            metadata = {**text.metadata, RATELIMIT: {CAP: str(text.cap)}}
            capped = cap.request(found.body, metadata)
            return replace(found, body=capped.body, logs=found.logs + capped.logs)
        return found

    return passed


def tried(texts: Iterable[Text], facts: Facts, real: Sequence[Real] = ()) -> Told:
    told = Told()
    left = iter(texts)
    while batch := list(islice(left, _BATCH)):
        passed = [(text, each) for text in batch if not (each := facts(text)).answer]
        told.texts += len(batch)
        told.refused += len(batch) - len(passed)
        told.wrong += _refused_in_vain(batch, passed)
        before = views([text.body for text, _ in passed], real, told.wrong)
        edited = [each.body for text, each in passed if each.body != text.body]
        told.edited += len(edited)
        after = iter(views(edited, real, told.wrong))
        for (text, each), came in zip(passed, before, strict=True):
            gone = came if each.body == text.body else next(after)
            told.read += any(view is not None for view in came.values())
            said = [*each.logs, *complaints(text, each.facts, each.body, came, gone)]
            told.wrong += [f"{text!r}: {one}" for one in said[:1]]
    return told


def _refused_in_vain(batch: Iterable[Text], passed: Iterable[tuple[Text, Passed]]) -> list[str]:
    through = {id(text) for text, _ in passed}
    return [f"{text!r}: refused" for text in batch if text.plain and id(text) not in through]


def views(bodies: Sequence[bytes], real: Sequence[Real], wrong: list[str]) -> list[Views]:
    """What each reader makes of each: the real ones where they are there, or else their models."""
    found: list[Views] = [{name: see(body) for name, see in MODELS.items()} for body in bodies]
    for each in real:
        for body, models, seen in zip(bodies, found, each.read(bodies), strict=True):
            wrong += unfaithful(body, models, seen)
            models.update(seen)
    return found


def unfaithful(body: bytes, models: Views, real: Views) -> Iterator[str]:
    if _TOO_DEEP not in body:
        for name, view in real.items():
            if models[name] != view:
                yield f"{body!r}: {name} sees {view}, its model {models[name]}"
