"""Sections of settings: their base class, a walk through them, and words for what is wrong."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeGuard, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from parallama.yamlfile import Place

LATER: dict[str, Any] = {"later": True}
"""Marks a setting that is loaded and checked, but that nothing reads yet."""


class Section(BaseModel):
    """Settings that belong together. A name that is not listed is a mistake."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


def section() -> Any:
    """A field that is a section, made by validation: so its default paths learn the folder, too."""
    return Field(default={}, validate_default=True)


class Leaf(NamedTuple):
    """One setting, where it stands."""

    place: tuple[str, ...]
    field: FieldInfo


def leaves(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Every setting of a tree, in the order in which it is written."""
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield from leaves(field.annotation, (*above, name))
        else:
            yield Leaf((*above, name), field)


def subsections(model: type[BaseModel]) -> Iterator[tuple[str, type[Section]]]:
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield name, field.annotation


def _is_section(annotation: object) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def dotted(place: Place) -> str:
    """`api_gateways.enabled[1]`"""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return "".join(steps).removeprefix(".")


def explain(error: ErrorDetails, root: type[Section]) -> str:
    """What is wrong with one value, and what to write instead. Never the value itself."""
    place = error["loc"]
    if error["type"] == "extra_forbidden":
        return f"unknown setting; {_nearest_setting(place, root)}"
    if error["input"] is None:
        return f"has no value: write one{_such_as(place, root)}, or leave it out"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return _wanted(error) + _such_as(place, root) + _instead_of(error)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be."""
    return next(iter(difflib.get_close_matches(name, known, 1)), None)


def _wanted(error: ErrorDetails) -> str:
    bounds = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "is missing"
        case "int_type":
            return "must be a whole number"
        case "float_type" | "finite_number":
            return "must be a number"
        case "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text"
        case "tuple_type" | "list_type":
            return "must be a list"
        case "dict_type":
            return "must be names and values, indented below it"
        case "model_type" | "model_attributes_type":
            return "must be a section: its settings by name, indented below it"
        case "literal_error":
            return f"must be {bounds['expected']}".replace("'", "")
        case "greater_than_equal":
            return f"must be at least {bounds['ge']:g}"
        case "greater_than":
            return f"must be more than {bounds['gt']:g}"
        case "less_than_equal":
            return f"must be at most {bounds['le']:g}"
        case "string_too_short" | "too_short":
            return "must not be empty"
    return error["msg"]  # pydantic's own words


def _instead_of(error: ErrorDetails) -> str:
    wanted, value = error["type"], error["input"]
    if wanted not in ("literal_error", "bool_type") and not wanted.endswith("_type"):
        return ""
    if isinstance(value, bool) and wanted in ("string_type", "literal_error"):
        return "; YAML reads a bare on, off, yes or no as true or false: put it in quotes"
    if wanted == "literal_error":
        return ""
    if wanted == "string_type" and not isinstance(value, list | dict):
        return f"; it is {kind(value)}: put it in quotes"
    return f"; it is {kind(value)}"


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
        # Of a list: the section that its members are.
        here = get_args(here)[0] if isinstance(step, int) else here.model_fields[step].annotation
    name, above = str(place[-1]), place[:-1]
    if near := nearest(name, here.model_fields):
        return f"did you mean {dotted((*above, near))}?"
    # Perhaps the name is right and the place is wrong.
    elsewhere = [dotted(leaf.place) for leaf in leaves(root) if leaf.place[-1] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    return f"known here: {', '.join(here.model_fields)}"
