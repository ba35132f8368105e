"""
Request shapes: what an operator makes of parameters that requests send (pure).

One user could otherwise make a model reload, or stay in memory, for everybody. Each role has a rule
for each parameter; `*` stands for all roles. facts.lua applies them: see envoy/lua/shapes.lua.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from parallama.checking import AfterValidator, Field, PlainValidator
from parallama.errors import UsageError
from parallama.roles import check_name
from parallama.sections import Section, section

EVERY = "*"
FOREVER = -1
"""As Ollama says it of `keep_alive`."""

_MOST = 10**9
_LONGEST = 366 * 86_400
_PART = re.compile(r"(\d+)(h|m|s)")
_SECONDS = {"h": 3600, "m": 60, "s": 1}


def _role(name: str) -> str:
    if name == EVERY:
        return name
    try:
        return check_name(name)
    except UsageError as error:
        raise ValueError(f"{error}; or `*`, for all roles") from None


def _seconds(value: object, _: Path) -> int:
    """A duration as Go and Ollama write it, in whole seconds."""
    if value in ("forever", "-1", FOREVER) and not isinstance(value, bool):
        return FOREVER
    found = None
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str) and re.fullmatch(f"({_PART.pattern})+", value):
        found = sum(int(number) * _SECONDS[unit] for number, unit in _PART.findall(value))
    if found is None or not 0 <= found <= _LONGEST:
        raise ValueError(
            "must be seconds, or a duration such as 30m or 1h30m, of a year at most; `forever` is "
            "one as well"
        )
    return found


Role = Annotated[str, AfterValidator(_role)]
Seconds = Annotated[int, PlainValidator(_seconds)]


class Rule(Section):
    """What becomes of one parameter. Without any of it, nothing."""

    drop: bool = False

    def rule(self) -> None:
        told = {name for name in self.model_fields_set if getattr(self, name) is not None}
        told -= set() if self.drop else {"drop"}
        alone = told & {"set", "drop"}
        if alone and len(told) > 1:
            raise ValueError("`set` and `drop` stand alone: with them, nothing else can matter")
        most, usual = getattr(self, "max", None), getattr(self, "default", None)
        if most is not None and usual is not None and not 0 <= usual <= most:
            raise ValueError("`default` must not be more than `max`")

    def parts(self) -> dict[str, Any]:
        """What facts.lua is told of it."""
        told = {name: getattr(self, name, None) for name in ("max", "default", "set")}
        told["drop"] = self.drop or None
        return {name: value for name, value in told.items() if value is not None}


class Number(Rule):
    """Of a whole number."""

    max: int | None = Field(default=None, ge=0, le=_MOST)
    default: int | None = Field(default=None, ge=-1, le=_MOST)
    set: int | None = Field(default=None, ge=-1, le=_MOST)


class Bound(Rule):
    """Of how many tokens an answer may have."""

    max: int | None = Field(default=None, ge=1, le=_MOST)
    default: int | None = Field(default=None, ge=1, le=_MOST)
    set: int | None = Field(default=None, ge=1, le=_MOST)


class Duration(Rule):
    """Of a time."""

    max: Seconds | None = Field(default=None, ge=0)
    default: Seconds | None = None
    set: Seconds | None = None


class Flag(Rule):
    """Of something that is on or off."""

    default: bool | None = None
    set: bool | None = None


class Shape(Section):
    """Rules by parameter. `num_predict` is Ollama's name for `max_tokens`."""

    max_tokens: Bound = section()
    num_predict: Bound = section()
    keep_alive: Duration = section()
    num_ctx: Number = section()
    num_batch: Number = section()
    num_gpu: Number = section()
    main_gpu: Number = section()
    num_thread: Number = section()
    use_mmap: Flag = section()
    use_mlock: Flag = section()
    numa: Flag = section()
    low_vram: Flag = section()

    def rule(self) -> None:
        if {"max_tokens", "num_predict"} <= self.model_fields_set:
            raise ValueError("max_tokens and num_predict are two names of one parameter: keep one")


def written(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """
    What authz tells facts.lua, by role; that of `*` is for all roles that are not there. A role's
    own rule for a parameter counts in the place of that for all roles.
    """
    every = _rules(shapes.get(EVERY))
    told = {role: _text({**every, **_rules(shape)}) for role, shape in shapes.items()}
    return {EVERY: "", **told}


def _rules(shape: Shape | None) -> dict[str, Rule]:
    if shape is None:
        return {}
    given = {name: getattr(shape, name) for name in shape.model_fields_set}
    if "num_predict" in given:
        given["max_tokens"] = given.pop("num_predict")
    return given


def _text(rules: Mapping[str, Rule]) -> str:
    """ "\\n", the name, and " <what>=<value>" for each part of its rule; and so on."""
    lines = []
    for name, rule in sorted(rules.items()):
        parts = "".join(f" {what}={_value(value)}" for what, value in rule.parts().items())
        if parts:
            lines.append(f"\n{name}{parts}")
    return "".join(lines)


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
