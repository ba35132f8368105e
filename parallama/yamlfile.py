"""YAML text into plain data that knows its lines, with every mistake found at once (pure)."""

import re
from dataclasses import dataclass, field

import yaml

Place = tuple[str | int, ...]
"""Where a value stands: keys of mappings, indexes of lists."""

UNREAD = object()
"""Stands where a value could not be read: a mistake says so already."""

_COLLECTIONS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
_QUOTED_NAME = re.compile(r" '(?!<)[^']{2,}'")
_LINE_ENDS = re.compile("\r\n|[\r\n\u0085\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class Mistake:
    """`line` counts from 1. `text` never holds a value of the document."""

    place: Place
    line: int
    text: str


@dataclass(slots=True)
class Document:
    """
    What a text holds. `lines` knows the line of every key and list item.

    Keys are text as it is written. `broken` says that the text could not be read to its end, so
    that `data` is None and its absence means nothing.
    """

    data: object = None
    lines: dict[Place, int] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    broken: bool = False


def parse(text: str) -> Document:
    """Read one YAML document. Aliases, tags and keys that stand twice are mistakes."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return _Reader(loader).read(node)
    except yaml.MarkedYAMLError as error:
        mistake = _broken_syntax(error, text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        mistake = Mistake((), line, "holds a character that YAML does not allow (a control code?)")
    except RecursionError:
        mistake = Mistake((), 1, "is nested too deeply")
    return Document(mistakes=[mistake], broken=True)


class _Reader:
    def __init__(self, loader: yaml.SafeLoader) -> None:
        self._loader = loader
        self._seen: set[int] = set()
        self._document = Document()

    def read(self, node: yaml.Node | None) -> Document:
        if node is not None:
            self._document.data = self._value(node, ())
        return self._document

    def _value(self, node: yaml.Node, place: Place) -> object:
        # The same node twice is an alias. Refused: nobody needs one here, and a few nested ones
        # can grow without bound.
        if id(node) in self._seen:
            line = self._document.lines[place]  # the node itself stands where it was named first
            return self._refuse(line, place, "is an alias (*name): write the value out instead")
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode) and node.tag in _COLLECTIONS:
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode) and node.tag in _COLLECTIONS:
            return self._items(node, place)
        return self._scalar(node, place)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(_line(key), place, "has a list or a mapping for a key: keys are text")
                continue
            inner = (*place, key.value)
            if key.value in found:
                first = self._document.lines[inner]
                self._refuse(
                    _line(key), inner, f"stands twice, first in line {first}: keep one of them"
                )
                continue
            self._document.lines[inner] = _line(key)
            found[key.value] = self._value(value, inner)
        return found

    def _items(self, node: yaml.SequenceNode, place: Place) -> list[object]:
        found = []
        for index, item in enumerate(node.value):
            self._document.lines[*place, index] = _line(item)
            found.append(self._value(item, (*place, index)))
        return found

    def _scalar(self, node: yaml.Node, place: Place) -> object:
        try:
            return self._loader.construct_object(node)
        except yaml.constructor.ConstructorError:
            return self._refuse(_line(node), place, "has a tag (!name): write a plain value")
        except (ValueError, OverflowError):  # a date such as 2024-99-99, a number without end
            return self._refuse(
                _line(node), place, "cannot be read: if it is text, put it in quotes"
            )

    def _refuse(self, line: int, place: Place, text: str) -> object:
        self._document.mistakes.append(Mistake(place, line, text))
        return UNREAD


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _broken_syntax(error: yaml.MarkedYAMLError, text: str) -> Mistake:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark else (0, 0)
    # Names are cut out of the parser's words: an alias that fails may be a password with a star.
    problem = _QUOTED_NAME.sub("", error.problem or error.context or "cannot be read")
    lines = _LINE_ENDS.split(text)
    written = lines[line] if line < len(lines) else ""
    if "\t" in written[: len(written) - len(written.lstrip())] or "'\\t'" in problem:
        problem = "a tab: indent with spaces"
    return Mistake((), line + 1, f"not valid YAML at column {column + 1}: {problem}")
