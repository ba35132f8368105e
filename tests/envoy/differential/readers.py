"""
What servers make of a JSON text: models of their parsers, and the real ones where they are found.

A view is what a server would use: {field: value} for FIELDS, or None where it refuses the text.
Numbers are floats: what matters is far below 2^53. The models refuse what is nested too deeply for
Python, which the real ones do not.
"""

import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

View = dict[str, Any]
Reader = Callable[[bytes], View | None]

BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
FIELDS = (
    *("model", "name", "stream", "options", "stream_options", *BOUNDS, "n", "best_of"),
    *("keep_alive", "prompt"),
)
FOLDER = Path(__file__).parent


def _none(word: str) -> NoReturn:
    raise ValueError(word)


def _view(tree: object) -> View | None:
    return {name: tree.get(name) for name in FIELDS} if isinstance(tree, dict) else None


def _attempt(read: Reader) -> Reader:
    def view(body: bytes) -> View | None:
        try:
            return read(body)
        except (ValueError, RecursionError):
            return None

    return view


@_attempt
def python(body: bytes) -> View | None:
    """Not a model: Python's own json, to which Starlette and others give the bytes."""
    return _view(json.loads(body, parse_int=float, parse_constant=str))


# nlohmann/json as llama.cpp calls it: UTF-8 with or without a mark, nothing but JSON, a null byte
# is the end. Of equal keys the last one wins.

_NO_LONE_HALVES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u(?![dD][89a-fA-F])|\\[^u]"
)


def _finite(literal: str) -> float:
    if (number := float(literal)) - number != 0:
        raise ValueError("out of range")
    return number


_NLOHMANN = json.JSONDecoder(parse_constant=_none, parse_float=_finite, parse_int=_finite)


@_attempt
def nlohmann(body: bytes) -> View | None:
    text = body.removeprefix(b"\xef\xbb\xbf").partition(b"\0")[0]
    tree = _NLOHMANN.decode(text.decode())
    if b"\\u" in text and b"\\" in _NO_LONE_HALVES.sub(b"", text):
        return None
    return _view(tree)


# Go's encoding/json, as Ollama calls it: the first value of a stream; keys without case; what is
# no UTF-8 is replaced; numbers are looked at only where they are wanted.


class _Number(str):
    __slots__ = ()


class _Object(list[tuple[str, Any]]):
    """The members as they stand there."""


_GO = json.JSONDecoder(
    parse_constant=_none, parse_float=_Number, parse_int=_Number, object_pairs_hook=_Object
)
_FOLDS = {ord("\u017f"): "s", ord("\u212a"): "k", **{c: chr(c + 32) for c in range(65, 91)}}
_SURROGATES = re.compile("[\ud800-\udfff]")
_INTEGER = re.compile(r"-?\d{1,19}")


def _members(body: bytes) -> _Object | None:
    text = body.decode("utf-8", "surrogateescape").lstrip(" \t\r\n")
    tree, _ = _GO.raw_decode(text)
    if tree is None:
        return _Object()
    return tree if isinstance(tree, _Object) else None


def _text(text: str) -> str:
    return _SURROGATES.sub("\ufffd", text)


def _any(value: Any) -> Any:
    if isinstance(value, _Number):
        return _finite(value)
    if isinstance(value, _Object):
        return {_text(key): _any(inner) for key, inner in value}
    if isinstance(value, list):
        return [_any(inner) for inner in value]
    return _text(value) if isinstance(value, str) else value


@_attempt
def go_untyped(body: bytes) -> View | None:
    """A struct whose fields take anything."""
    if (members := _members(body)) is None:
        return None
    view: View = dict.fromkeys(FIELDS)
    for key, value in members:
        if (name := key.translate(_FOLDS)) in view:
            view[name] = _any(value)
    return view


def _go_string(old: Any, value: Any) -> Any:
    if value is None:
        return old
    if isinstance(value, _Number) or not isinstance(value, str):
        raise ValueError("no string")
    return _text(value)


def _go_bool(_old: Any, value: Any) -> Any:
    if value is not None and not isinstance(value, bool):
        raise ValueError("no boolean")
    return value


def _go_int(_old: Any, value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, _Number) or not _INTEGER.fullmatch(value):
        raise ValueError("no integer")
    if not -(1 << 63) <= int(value) < 1 << 63:
        raise ValueError("out of range")
    return float(value)


def _go_map(old: Any, value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, _Object):
        raise ValueError("no object")
    return {**(old or {}), **_any(value)}


def _go_stream_options(old: Any, value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, _Object):
        raise ValueError("no object")
    usage = old["include_usage"] if old else False
    for key, inner in value:
        if key.translate(_FOLDS) == "include_usage" and inner is not None:
            usage = _go_bool(usage, inner)
    return {"include_usage": usage}


_GO_TYPES: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("model", "name"), _go_string),
    **dict.fromkeys(("n", "best_of", *BOUNDS), _go_int),
    **dict.fromkeys(("keep_alive", "prompt"), lambda _old, value: _any(value)),
    **{"stream": _go_bool, "options": _go_map, "stream_options": _go_stream_options},
}


@_attempt
def go_typed(body: bytes) -> View | None:
    """A struct like those of Ollama."""
    if (members := _members(body)) is None:
        return None
    view: View = {**dict.fromkeys(FIELDS), "model": "", "name": ""}
    for key, value in members:
        if (name := key.translate(_FOLDS)) in view:
            view[name] = _GO_TYPES[name](view[name], value)
    return view


MODELS: dict[str, Reader] = {
    "python": python,
    "nlohmann": nlohmann,
    "go, typed": go_typed,
    "go, untyped": go_untyped,
}


class Real:
    """A parser itself, in a small program that is made from a source beside this file."""

    def __init__(self, program: Path, views: Sequence[str]) -> None:
        self.views = views
        self._program = program

    def read(self, bodies: Sequence[bytes]) -> list[dict[str, View | None]]:
        frames = b"".join(struct.pack(">I", len(body)) + body for body in bodies)
        done = subprocess.run([self._program], input=frames, capture_output=True, check=True)
        lines = done.stdout.splitlines()
        assert len(lines) == len(bodies)
        return [self._views(line) for line in lines]

    def _views(self, line: bytes) -> dict[str, View | None]:
        try:
            return dict(zip(self.views, json.loads(line, parse_int=float), strict=True))
        except RecursionError:  # nobody here can say what it saw
            return {}


def real_go(folder: Path) -> Real | None:
    """Go, where it is installed."""
    if not (go := shutil.which("go", path=f"{os.environ['PATH']}:/usr/local/go/bin")):
        return None
    program = folder / "reader-go"
    subprocess.run([go, "build", "-o", program, FOLDER / "reader.go"], check=True)
    return Real(program, ("go, typed", "go, untyped"))


def real_nlohmann(folder: Path) -> Real | None:
    """nlohmann/json, where a compiler and that header are found."""
    if not (compiler := shutil.which("c++")):
        return None
    package = find_spec("nlohmann_json")  # brings the header, if it is there
    places = package.submodule_search_locations if package else None
    include = [f"-I{place}/include" for place in places or ()]
    program = folder / "reader-nlohmann"
    command = [compiler, "-std=c++17", "-O1", *include, "-o", program, FOLDER / "reader.cpp"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    return Real(program, ("nlohmann",))
