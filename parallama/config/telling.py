"""What is said of settings: what they are, and which of those that are set do nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from parallama.config.tree import Config
from parallama.sections import LATER, Section, dotted, leaves, subsections, written


class Setting(NamedTuple):
    path: str
    default: Any
    description: str


def settings(model: type[Section] = Config) -> Iterator[Setting]:
    """Every setting by its dotted path, with its default as one would write it."""
    for place, field in leaves(model):
        default = str(field.default) if isinstance(field.default, Path) else field.default
        default = list(default) if isinstance(default, tuple) else default
        later = " Not used yet." if field.json_schema_extra == LATER else ""
        yield Setting(dotted(place), default, f"{field.description}{later}")


def warnings(config: Config) -> list[str]:
    """What was set and has no effect: nobody is left believing that it had."""
    found = [
        f"{dotted(place)} has no effect yet: it belongs to a later release"
        for place, field in leaves(Config)
        if field.json_schema_extra == LATER and _is_set(config, place)
    ]
    for name, store in (("database", config.database), ("redis", config.redis)):
        if store.host is None and "port" in store.model_fields_set:
            found.append(f"{name}.port has no effect without {name}.host")
    told = config.authentication
    shared = told.jwt_algorithm == "HS256"
    unused = (
        {"signing_keys_dir", "signing_key_publish_minutes"} if shared else {"jwt_secret_key_file"}
    )
    for name in sorted(unused & told.model_fields_set):
        found.append(
            f"authentication.{name} has no effect with authentication.jwt_algorithm "
            f"{told.jwt_algorithm}"
        )
    return found


def _is_set(config: Config, place: tuple[str, ...]) -> bool:
    at: Section = config
    for step in place[:-1]:
        at = getattr(at, step)
    return place[-1] in at.model_fields_set


def document(text: str) -> str:
    """`text` with the tables of settings between its two markers made anew."""
    before, begin, rest = text.partition("<!-- settings: made by python -m parallama.config -->\n")
    _, end, after = rest.partition("<!-- end of settings -->\n")
    return before + begin + "\n".join(_tables(Config, ())) + end + after


def _tables(model: type[Section], above: tuple[str, ...]) -> Iterator[str]:
    own = [leaf for leaf in leaves(model) if len(leaf.place) == 1]
    yield f"\n### {dotted(above) or 'At the top'}\n"
    if above:
        yield f"{model.__doc__}\n"
    if own:
        yield "| setting | default | what it is |\n|---|---|---|"
    described = {setting.path: setting for setting in settings(model)}
    for leaf in own:
        _, default, description = described[leaf.place[0]]
        shown = "not set" if default is None else f"`{written(default)}`"
        yield f"| `{dotted((*above, *leaf.place))}` | {shown} | {description} |"
    for name, inner in subsections(model):
        yield from _tables(inner, (*above, name))
    if not above:
        yield ""
