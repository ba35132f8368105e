"""
What every Python driver shares: a line of JSON on stdin asks, a line on stdout answers.

A driver calls one unmodified library as its documentation says, and is told three things: the
address of the gateway, a key, and what to do. It answers with what the library gave back, in words
that are the same for all libraries, or with the exception that the library raised.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

QUESTION = "a prompt that nobody else may read"
MESSAGES = [{"role": "user", "content": QUESTION}]
PICTURE = "YSBwaWN0dXJl"  # base64
PICTURE_URL = f"data:image/png;base64,{PICTURE}"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "The weather in a city", "parameters": CITY}
TOOL = {"type": "function", "function": WEATHER}
TEXTS = ["a", "b"]


@dataclass(frozen=True)
class Asked:
    url: str
    key: str
    model: str = "smollm2"
    megabytes: int = 0
    """So long is the question."""
    ollama: bool = False
    """Ollama's API is meant, where the library speaks OpenAI's as well."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        if self.megabytes:
            return [{"role": "user", "content": "x" * (self.megabytes << 20)}]
        return MESSAGES


Action = Callable[[Asked], Any]


def drive(actions: Mapping[str, Action]) -> None:
    """Serves until stdin ends. What a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"does": sorted(actions)}), file=answers, flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        action = actions[told.pop("do")]
        try:
            answer = {"gave": action(Asked(**told))}
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"raised": kinds, "message": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def said(text: str | None, read: int | None, written: int | None) -> dict[str, Any]:
    return {"text": text, "tokens": [read, written]}


def first(parts: Any, count: int) -> list[Any]:
    """The first parts of a stream, in which more would follow."""
    taken = []
    for part in parts:
        taken.append(part)
        if len(taken) == count:
            break
    return taken
