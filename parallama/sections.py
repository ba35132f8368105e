"""Sections of settings: their base class, a walk through them, and words for what is wrong."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeGuard, dataclass_transform, get_args, get_origin

from parallama.checking import Field, FieldInfo, Model, Wrong
from parallama.yamlfile import Place

LATER: dict[str, Any] = {"later": True}
"""Marks a setting that is loaded and checked, but that nothing reads yet."""


def section() -> Any:
    """A field that is a section, made of its defaults where it is not given."""
    return Field(default={})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field, section))
class Section(Model):
    """Settings that belong together. A name that is not listed is a mistake."""


class Leaf(NamedTuple):
    """One setting, where it stands."""

    place: tuple[str, ...]
    field: FieldInfo


def leaves(model: type[Model], above: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Every setting of a tree, in the order in which it is written."""
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield from leaves(field.annotation, (*above, name))
        else:
            yield Leaf((*above, name), field)


def subsections(model: type[Model]) -> Iterator[tuple[str, type[Section]]]:
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield name, field.annotation


def _is_section(annotation: object) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def dotted(place: Place) -> str:
    """`api_gateways.enabled[1]`"""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return "".join(steps).removeprefix(".")


def explain(wrong: Wrong, root: type[Section]) -> str:
    """What is wrong with one value, and what to write instead. Never the value itself."""
    if wrong.kind == "unknown":
        return f"unknown setting; {_nearest_setting(wrong.place, root)}"
    if wrong.value is None:
        return f"has no value: write one{_such_as(wrong.place, root)}, or leave it out"
    if wrong.kind == "rule":
        return wrong.text
    return wrong.text + _such_as(wrong.place, root) + _instead_of(wrong)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be."""
    import difflib  # for mistakes alone

    return next(iter(difflib.get_close_matches(name, known, 1)), None)


def _instead_of(wrong: Wrong) -> str:
    if isinstance(wrong.value, bool) and wrong.kind in ("text", "literal"):
        return "; YAML reads a bare on, off, yes or no as true or false: put it in quotes"
    if wrong.kind == "text" and not isinstance(wrong.value, list | dict):
        return f"; it is {kind(wrong.value)}: put it in quotes"
    return f"; it is {kind(wrong.value)}" if wrong.kind in ("text", "type") else ""


def kind(value: object) -> str:
    """What a value is, in the words of somebody who writes YAML."""
    match value:
        case None:
            return "empty"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "a section"
    return "a date or binary data"


def _such_as(place: Place, root: type[Section]) -> str:
    """The field's own example, or its default."""
    field = next((leaf.field for leaf in leaves(root) if leaf.place == place), None)
    if field is None:
        return ""
    example = field.examples[0] if field.examples else field.default
    return "" if example is None else f", such as {written(example)}"


def written(value: object) -> str:
    """A value as it stands in YAML, on one line."""
    match value:
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{', '.join(map(written, value))}]"
        case dict():
            return f"{{{', '.join(f'{key}: {written(at)}' for key, at in value.items())}}}"
    return str(value)


def _nearest_setting(place: Place, root: type[Section]) -> str:
    here: Any = root
    for step in place[:-1]:
        # Of a list or a mapping: the section that its members are.
        inside = get_origin(here) in (tuple, dict)
        here = get_args(here)[0 if isinstance(step, int) else 1] if inside else here
        here = here if inside else here.model_fields[step].annotation
    name, above = str(place[-1]), place[:-1]
    if near := nearest(name, here.model_fields):
        return f"did you mean {dotted((*above, near))}?"
    # Perhaps the name is right and the place is wrong.
    elsewhere = [dotted(leaf.place) for leaf in leaves(root) if leaf.place[-1] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    return f"known here: {', '.join(here.model_fields)}"
