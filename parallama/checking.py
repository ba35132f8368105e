"""
Values held to their types: every mistake in a tree of settings at once (pure).

The words are pydantic's, which did this before: docs/decisions/0025 says why it does not any more.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Self,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from parallama.yamlfile import Place

_REQUIRED: Any = object()
_BAD: Any = object()


class Wrong(NamedTuple):
    """
    One mistake. `text` says what the value must be; `kind` is what is wrong about the value: its
    `type` (for which YAML's own habits may be to blame: `text`, `literal`), a `bound`, a `rule`
    whose text says everything, or that its name is `unknown`.
    """

    place: Place
    kind: Literal["type", "text", "literal", "bound", "rule", "unknown"]
    value: object
    text: str = ""


class Invalid(Exception):
    """Holds everything that is wrong."""

    def __init__(self, wrong: Sequence[Wrong]) -> None:
        self.wrong = wrong
        lines = (f"{'.'.join(map(str, each.place))}: {each.text or each.kind}" for each in wrong)
        super().__init__("\n".join(lines))


@dataclass(frozen=True, slots=True)
class BeforeValidator:
    """Changes what was written before its type is looked at."""

    change: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class AfterValidator:
    """Changes or refuses, by ValueError, a value of the right type."""

    change: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class PlainValidator:
    """Makes the value all by itself, knowing the folder in which relative paths start."""

    make: Callable[[object, Path], Any]


def _as_it_is(value: Any, place: Place, seen: "Seen") -> Any:
    return value


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """One setting as it is declared. A default is checked like any other value."""

    annotation: Any = None
    default: Any = _REQUIRED
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    description: str = ""
    examples: Sequence[Any] = ()
    json_schema_extra: Mapping[str, Any] | None = None
    check: "Check" = _as_it_is


def Field(default: Any = _REQUIRED, **told: Any) -> Any:
    """See FieldInfo. `Any`, for it stands where the value will be."""
    return FieldInfo(default=default, **told)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a check is told beside the value, and where it leaves what is wrong."""

    folder: Path
    wrong: list[Wrong] = field(default_factory=list)

    def refuse(self, *told: Any) -> Any:
        self.wrong.append(Wrong(*told))
        return _BAD


Check = Callable[[Any, Place, Seen], Any]
"""The value to use, or `_BAD` where `Seen` has been told why there is none."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class Model:
    """
    Values by name, of the types that its class declares; other names are mistakes.

    `rule` is called when all of them are right, and may raise ValueError. `model_fields_set` are
    the names that were given.
    """

    model_fields: dict[str, FieldInfo] = {}  # noqa: RUF012
    model_fields_set: frozenset[str]

    def __init_subclass__(cls) -> None:
        own = vars(cls).get("__annotations__", {})
        hints = get_type_hints(cls, include_extras=True) if own else {}
        cls.model_fields = {
            **cls.model_fields,
            **{
                name: _declared(hints[name], vars(cls).get(name, _REQUIRED))
                for name in own
                if not name.startswith(("_", "model_fields"))
            },
        }

    def __init__(self, **given: Any) -> None:
        """Raises Invalid."""
        self._fill(given, (), seen := Seen(Path.cwd()))
        if seen.wrong:
            raise Invalid(seen.wrong)

    @classmethod
    def model_validate(cls, given: object, folder: Path | None = None) -> Self:
        """Raises Invalid."""
        made = _model(cls)(given, (), seen := Seen(folder or Path.cwd()))
        if seen.wrong:
            raise Invalid(seen.wrong)
        return made  # type: ignore[no-any-return]

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """With other values, which are not checked."""
        copy = object.__new__(type(self))
        vars(copy).update({**vars(self), **update})
        return copy

    def rule(self) -> None:
        """What must hold between its values."""

    def _fill(self, given: Mapping[str, Any], place: Place, seen: Seen) -> None:
        before = len(seen.wrong)
        found = vars(self)  # written to like this, for there is no other way
        for name, declared in self.model_fields.items():
            if name in given:
                value = given[name]
            elif declared.default is _REQUIRED:
                seen.refuse((*place, name), "bound", given, "is missing")
                continue
            else:
                value = declared.default
            found[name] = declared.check(value, (*place, name), seen)
        for name in given:
            if name not in self.model_fields:
                seen.refuse((*place, name), "unknown", given[name])
        found["model_fields_set"] = frozenset(given)
        if len(seen.wrong) == before:
            try:
                self.rule()
            except ValueError as error:
                seen.refuse(place, "rule", given, str(error))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"settings are frozen: {name} cannot be changed")

    def __repr__(self) -> str:
        told = (f"{name}={getattr(self, name)!r}" for name in self.model_fields)
        return f"{type(self).__name__}({', '.join(told)})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.model_fields)

    __hash__ = None  # type: ignore[assignment]


def _declared(annotation: Any, default: Any) -> FieldInfo:
    """What `name: annotation = default` says of a setting."""
    bare, parts = _parts(annotation)
    last = default if isinstance(default, FieldInfo) else FieldInfo(default=default)
    infos = [*(part for part in parts if isinstance(part, FieldInfo)), last]
    examples = next((info.examples for info in infos if info.examples), ())
    return replace(
        last, annotation=bare, examples=examples, check=_check(Annotated[annotation, last])
    )


def _parts(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(annotation) is Annotated:
        bare, *parts = get_args(annotation)
        return bare, tuple(parts)
    return annotation, ()


def _check(annotation: Any) -> Check:
    bare, parts = _parts(annotation)
    steps = [*_befores(parts), _of_type(bare, parts), *_afters(parts)]
    if len(steps) == 1:
        return steps[0]

    def check(value: Any, place: Place, seen: Seen) -> Any:
        for step in steps:
            value = step(value, place, seen)
            if value is _BAD:
                break
        return value

    return check


def _befores(parts: Iterable[Any]) -> list[Check]:
    return [_calling(part.change) for part in parts if isinstance(part, BeforeValidator)]


def _afters(parts: Iterable[Any]) -> list[Check]:
    found = []
    for part in parts:
        if isinstance(part, AfterValidator):
            found.append(_unless_none(_calling(part.change)))
        elif isinstance(part, FieldInfo) and (check := _bounds(part)) is not None:
            found.append(_unless_none(check))
    return found


def _unless_none(check: Check) -> Check:
    """Bounds are for values: whether there may be none is the type's affair."""
    return lambda value, place, seen: value if value is None else check(value, place, seen)


def _calling(change: Callable[[Any], Any]) -> Check:
    def check(value: Any, place: Place, seen: Seen) -> Any:
        try:
            return change(value)
        except ValueError as error:
            return seen.refuse(place, "rule", value, str(error))

    return check


def _bounds(told: FieldInfo) -> Check | None:
    rules: list[tuple[Callable[[Any], bool], str]] = []
    ge, gt, le = told.ge, told.gt, told.le
    if ge is not None:
        rules.append((lambda value: value >= ge, f"must be at least {ge:g}"))
    if gt is not None:
        rules.append((lambda value: value > gt, f"must be more than {gt:g}"))
    if le is not None:
        rules.append((lambda value: value <= le, f"must be at most {le:g}"))
    if (least := told.min_length) is not None:
        text = "must not be empty" if least == 1 else f"must have {least} or more"
        rules.append((lambda value: len(value) >= least, text))
    if (most := told.max_length) is not None:
        rules.append((lambda value: len(value) <= most, f"must have {most} at most"))
    if not rules:
        return None

    def check(value: Any, place: Place, seen: Seen) -> Any:
        for holds, text in rules:
            if not holds(value):
                return seen.refuse(place, "bound", value, text)
        return value

    return check


# Types.


def _of_type(bare: Any, parts: Iterable[Any]) -> Check:
    plain = next((part for part in parts if isinstance(part, PlainValidator)), None)
    if plain is not None:
        return _making(plain.make)
    origin, inner = get_origin(bare), get_args(bare)
    if origin is Annotated:
        return _check(bare)
    if origin in (Union, UnionType):
        return _optional(inner)
    if origin is Literal:
        return _literal(inner)
    if origin is tuple and inner[1:] == (...,):
        return _tuple(_check(inner[0]))
    if origin is dict:
        return _dict(_check(inner[0]), _check(inner[1]))
    if isinstance(bare, type) and issubclass(bare, Model):
        return _model(bare)
    return _SIMPLE[bare]


def _making(make: Callable[[object, Path], Any]) -> Check:
    def check(value: Any, place: Place, seen: Seen) -> Any:
        try:
            return make(value, seen.folder)
        except ValueError as error:
            return seen.refuse(place, "rule", value, str(error))

    return check


def _optional(inner: Sequence[Any]) -> Check:
    (other,) = (each for each in inner if each is not NoneType)
    return _unless_none(_check(other))


def _literal(words: Sequence[Any]) -> Check:
    *others, last = map(str, words)
    expected = f"{', '.join(others)} or {last}" if others else last

    def check(value: Any, place: Place, seen: Seen) -> Any:
        if isinstance(value, str) and value in words:
            return value
        return seen.refuse(place, "literal", value, f"must be {expected}")

    return check


def _tuple(item: Check) -> Check:
    def check(value: Any, place: Place, seen: Seen) -> Any:
        if not isinstance(value, list | tuple):
            return seen.refuse(place, "type", value, "must be a list")
        found = tuple(item(each, (*place, index), seen) for index, each in enumerate(value))
        return _BAD if any(each is _BAD for each in found) else found

    return check


def _dict(key: Check, item: Check) -> Check:
    def check(value: Any, place: Place, seen: Seen) -> Any:
        if not isinstance(value, dict):
            text = "must be names and values, indented below it"
            return seen.refuse(place, "type", value, text)
        found = {
            key(name, (*place, name), seen): item(each, (*place, name), seen)
            for name, each in value.items()
        }
        spoilt = any(_BAD is each for pair in found.items() for each in pair)
        return _BAD if spoilt else found

    return check


def _model(cls: type[Model]) -> Check:
    def check(value: Any, place: Place, seen: Seen) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            text = "must be a section: its settings by name, indented below it"
            return seen.refuse(place, "type", value, text)
        made = object.__new__(cls)
        before = len(seen.wrong)
        made._fill(value, place, seen)
        return made if len(seen.wrong) == before else _BAD

    return check


def _int(value: Any, place: Place, seen: Seen) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return seen.refuse(place, "type", value, "must be a whole number")


def _float(value: Any, place: Place, seen: Seen) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return seen.refuse(place, "type", value, _A_NUMBER)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else seen.refuse(place, "bound", value, _A_NUMBER)


def _bool(value: Any, place: Place, seen: Seen) -> Any:
    if isinstance(value, bool):
        return value
    return seen.refuse(place, "type", value, "must be true or false")


def _str(value: Any, place: Place, seen: Seen) -> Any:
    return value if isinstance(value, str) else seen.refuse(place, "text", value, "must be text")


_A_NUMBER = "must be a number"
_SIMPLE: dict[Any, Check] = {int: _int, float: _float, bool: _bool, str: _str}
