"""Lines of the trail as Envoy writes them: valid by default, override what a test is about."""

import json
from pathlib import Path
from typing import Any

from parallama import contract as c
from parallama.trail import Trail
from tests.usage_sink.make import START, STREAM, WHO

Json = dict[str, Any]


def facts(id: str = "r1", **others: Any) -> Json:
    """The same request as `an_entry` of make.py."""
    return {
        "id": id,
        "lasted_ms": 1500,
        "limits": None,
        "lua": STREAM,
        "reason": "via_upstream",
        "response_flags": "-",
        "start_us": f"{START}500000",
        "status": 200,
        "tries": 1,
        "upstream": "127.0.0.1:11434",
        "upstream_first_us": 200_000,
        "v": 1,
        "who": WHO,
        **others,
    }


def a_line(id: str = "r1", **others: Any) -> bytes:
    """Envoy sorts the members, and writes no spaces."""
    return json.dumps(facts(id, **others), sort_keys=True, separators=(",", ":")).encode()


def lines(*ids: object) -> bytes:
    return b"".join(a_line(str(id)) + b"\n" for id in ids)


def nobody(**others: Any) -> bytes:
    return a_line(who={c.ROLE: "user"}, **others)


def a_trail(folder: Path) -> Trail:
    trail = Trail(folder / "trail")
    trail.make()
    return trail


def append(path: Path, text: bytes) -> None:
    with path.open("ab") as file:
        file.write(text)
