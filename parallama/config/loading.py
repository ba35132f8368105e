"""From a file and the environment to the tree, or to every mistake in them."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallama import yamlfile
from parallama.checking import Invalid
from parallama.config.authentication import wrong_in_authentication
from parallama.config.gateways import wrong_in_gateways, wrong_in_mappings
from parallama.config.stores import wrong_in_database, wrong_in_redis
from parallama.config.tree import Config
from parallama.errors import ConfigError
from parallama.sections import Section, dotted, explain, kind, leaves, nearest, subsections
from parallama.yamlfile import Place

PREFIX = "PARALLAMA_"
CONFIG_VARIABLE = "PARALLAMA_CONFIG"
"""Names the file itself, so it is no setting."""

_LARGEST_FILE = 1 << 20

Origins = dict[Place, str]


@dataclass(frozen=True, slots=True)
class _Mistake:
    place: Place
    origin: str  # "line 3", or the name of an environment variable
    text: str

    def __str__(self) -> str:
        name = dotted(self.place)
        where = f"{name} ({self.origin})" if name and self.origin else name or self.origin
        return f"{where}: {self.text}" if where else self.text


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """
    Read the configuration, once for the life of a process.

    Raises ConfigError with every mistake in one message, a line each. No line holds a value.
    """
    source = path.absolute()
    document = yamlfile.parse(_read(source))
    origins: Origins = {place: f"line {line}" for place, line in document.lines.items()}
    mistakes = [_Mistake(m.place, f"line {m.line}", m.text) for m in document.mistakes]
    if document.broken:
        # What cannot be read may hold anything: of the rest only the names can be judged.
        mistakes += _overlay(environ, {}, origins)
        raise ConfigError(_report(source, mistakes))
    if not isinstance(document.data, dict) and document.data is not yamlfile.UNREAD:
        mistakes.append(_Mistake((), "", _not_a_mapping(document.data)))
    data = document.data if isinstance(document.data, dict) else {}
    mistakes += _overlay(environ, data, origins)
    mistakes += _contradictions(data, origins)
    try:
        config = Config.model_validate(_filled(data, Config), source.parent)
    except Invalid as error:
        mistakes += _invalid(error, origins)
        raise ConfigError(_report(source, mistakes)) from None
    if mistakes:
        raise ConfigError(_report(source, mistakes))
    return config.model_copy(update={"_source": source})


def _read(source: Path) -> str:
    try:
        with source.open("rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such file; `parallama init` writes a first one") from None
    except IsADirectoryError:
        raise ConfigError(f"{source}: is a folder; name the file in it") from None
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
    if len(raw) > _LARGEST_FILE:
        raise ConfigError(f"{source}: is larger than {_LARGEST_FILE} bytes; is it the right file?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}: line {line} is not UTF-8 text: save it as UTF-8") from None


def _not_a_mapping(data: object) -> str:
    if data is None:
        return "the file is empty: copy config.example.yaml, or write {} for the defaults"
    return f"the file is {kind(data)}; it must be settings by name, such as server: {{port: 8000}}"


def _overlay(environ: Mapping[str, str], data: dict[str, Any], origins: Origins) -> list[_Mistake]:
    """Put what the environment sets into `data`. Returns what is wrong with it."""
    places = {"__".join(leaf.place).upper(): leaf.place for leaf in leaves(Config)}
    mistakes = []
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name == CONFIG_VARIABLE:
            continue
        place = places.get(name.removeprefix(PREFIX))
        if place is None:
            mistakes.append(_Mistake((), name, _unknown_variable(name, places)))
            continue
        value = yamlfile.parse(environ[name])
        origins[place] = name
        if value.mistakes:
            text = "is not a YAML value: if it is text, put it in double quotes of its own"
            mistakes.append(_Mistake(place, name, text))
        else:
            _put(value.data, place, data)
    return mistakes


def _put(value: object, place: tuple[str, ...], data: dict[str, Any]) -> None:
    for step in place[:-1]:
        if data.get(step) is None:
            data[step] = {}
        if not isinstance(data[step], dict):
            return  # the file has a plain value where a section belongs, and validation says so
        data = data[step]
    data[place[-1]] = value


def _unknown_variable(name: str, known: Iterable[str]) -> str:
    if near := nearest(name.removeprefix(PREFIX).upper(), known):
        return f"unknown setting; did you mean {PREFIX}{near}?"
    return f"unknown setting; names look like {PREFIX}SERVER__PORT, for server.port"


def _filled(data: Mapping[str, Any], model: type[Section]) -> dict[str, Any]:
    """With {} for sections whose settings are all commented out: in YAML they are null."""
    filled = dict(data)
    for name, inner in subsections(model):
        if name in filled and filled[name] is None:
            filled[name] = {}
        elif isinstance(filled.get(name), dict):
            filled[name] = _filled(filled[name], inner)
    return filled


def _contradictions(data: Mapping[str, Any], origins: Origins) -> Iterator[_Mistake]:
    """What is wrong between settings. Asked of plain data: it is told beside other mistakes."""
    for name, wrong in (
        ("database", wrong_in_database),
        ("redis", wrong_in_redis),
        ("authentication", wrong_in_authentication),
        ("api_gateways", wrong_in_gateways),
    ):
        section = data.get(name)
        if not isinstance(section, dict):
            continue
        given = {setting: value for setting, value in section.items() if value is not None}
        for setting, text in wrong(given):
            place = (name, *setting.split("."))
            yield _Mistake(place, _origin(place, origins), text)
    for deep, text in wrong_in_mappings(data.get("api_gateways")):
        yield _Mistake(deep, _origin(deep, origins), text)


def _invalid(error: Invalid, origins: Origins) -> Iterator[_Mistake]:
    for each in error.wrong:
        told = each.value is yamlfile.UNREAD and each.kind != "unknown"
        if not told:
            yield _Mistake(each.place, _origin(each.place, origins), explain(each, Config))


def _origin(place: Place, origins: Origins) -> str:
    while place and place not in origins:
        place = place[:-1]
    return origins.get(place, "")


def _report(source: Path, mistakes: Iterable[_Mistake]) -> str:
    def by_line(mistake: _Mistake) -> tuple[int, str]:
        line = mistake.origin.removeprefix("line ")
        return (int(line) if line.isdecimal() else sys.maxsize, str(mistake))

    lines = [f"  {mistake}" for mistake in sorted(mistakes, key=by_line)]
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    return "\n".join([f"{source}: {count}", *lines])
