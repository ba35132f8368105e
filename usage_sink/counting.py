"""Tokens of text, where an upstream reports none: what Lua passed on is counted and forgotten."""

import asyncio
import gzip
import json
import logging
import re
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, replace

from parallama.finished import MOST, Finished

log = logging.getLogger(__name__)

Count = Callable[[str], int]
"""How many tokens a text has."""

# As many bytes as Lua passes on. tiktoken needs 45 ms for the worst of them.
_MOST_BYTES = 64 * 1024

# Quicker than a thread is told of it.
_AT_ONCE_BYTES = 1024

_HALF_AN_ESCAPE = re.compile(r"\\(?:u[0-9A-Fa-f]{0,3})?\Z")

# How o200k_base cuts text into words before it looks them up; tests compare it with tiktoken's own.
_WORDS = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


@dataclass(frozen=True, slots=True)
class Text:
    """
    JSON strings without their quotes, a line each, and the size in bytes of what else there was.
    None where nothing was passed on.
    """

    prompt: bytes | None
    answer: bytes | None
    prompt_more: int = 0
    answer_more: int = 0

    def __repr__(self) -> str:
        return "Text(...)"  # wherever this ends up, nobody reads it


def o200k_base() -> Count:
    """
    A third of a second and 55 MB. Asks nobody: the vocabulary comes with this package.

    Raises what a broken installation raises.
    """
    from importlib.resources import files

    import tiktoken

    packed = files("usage_sink").joinpath("vocabulary", "o200k_base.tiktoken.gz")
    with packed.open("rb") as file, gzip.open(file) as lines:
        ranks = {b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    encoding = tiktoken.Encoding(
        "o200k_base", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={}
    )
    ranks.clear()  # it has its own, and 25 MB are 25 MB
    return lambda text: len(encoding.encode_ordinary(text))


def count_text(text: Text, finished: Finished, count: Count) -> Finished:
    """
    The same with counted tokens, marked as an estimate: templates, tools and pictures are not in
    it as the model saw them. What no text was passed on for stays as Lua has it.
    """
    was = finished.record
    prompt, completion = was.prompt_tokens, was.completion_tokens
    if text.prompt is not None:
        prompt = _count(text.prompt, text.prompt_more, count)
    if text.answer is not None:
        completion = _count(text.answer, text.answer_more, count)
    used = min((prompt or 0) + (completion or 0), MOST)
    left = finished.tokens_left
    return replace(
        finished,
        record=replace(
            was,
            prompt_tokens=prompt,
            completion_tokens=completion,
            tokens_used=used,
            token_source="estimated",  # noqa: S106 - not a password
        ),
        tokens_left=None if left is None else left + was.tokens_used - used,
    )


def _count(strings: bytes, more: int, count: Count) -> int:
    """What is beyond the bytes that are here has as many tokens a byte as they have."""
    strings = strings[:_MOST_BYTES]
    tokens = sum(count(_meant(one)) for one in strings.split(b"\n") if one)
    if more > 0 and strings:
        tokens += round(tokens * more / len(strings))
    return min(tokens, MOST)


def _meant(string: bytes) -> str:
    """A JSON string without its quotes; one that is cut or none at all counts as it stands."""
    text = string.decode("utf-8", "replace")
    if "\\" not in text:
        return text
    for whole in (text, _HALF_AN_ESCAPE.sub("", text)):
        try:
            meant: str = json.loads(f'"{whole}"', strict=False)
        except ValueError:
            continue
        # Half a pair of surrogates is no character.
        return meant.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Counting:
    """Counts beside the event loop. A text that cannot be counted costs no row."""

    def __init__(self, count: Count) -> None:
        self._count = count

    async def counted(self, text: Text, finished: Finished) -> Finished:
        try:
            if len(text.prompt or b"") + len(text.answer or b"") <= _AT_ONCE_BYTES:
                return count_text(text, finished, self._count)
            return await asyncio.to_thread(count_text, text, finished, self._count)
        except Exception as error:
            # Not the error's own words: they may hold the text.
            log.error(
                "text not counted",
                extra={"cause": type(error).__name__, "request_id": finished.record.request_id},
            )
            return finished


async def load(vocabulary: Callable[[], Count] = o200k_base) -> Counting | None:
    """None where it cannot be loaded, which is said aloud: rows are then as without it."""
    try:
        return Counting(await asyncio.to_thread(vocabulary))
    except Exception as error:
        log.error(
            "text cannot be counted, so tokens are estimated from sizes: is tiktoken installed?",
            extra={"cause": f"{type(error).__name__}: {error}"},
        )
        return None
