"""How many tokens a call may need, before anybody knows: learned from calls that ended."""

import math
from collections import OrderedDict
from dataclasses import dataclass

from ratelimit.rules import MOST_TOKENS, Reserve

# These answer with vectors: there is nothing to write, so only the prompt is held.
_WRITES_NOTHING = frozenset({"/api/embed", "/api/embeddings", "/v1/embeddings"})

_MODELS = 1000
# Bodies beyond this are images and the like, whose bytes say nothing about text.
_LARGEST_LESSON = 1 << 18
# What older calls count for, beside the newest.
_MEMORY = 0.95
# The slope is believed only as far as sizes differed: this spread, in bytes, weighs as much as the
# configured ratio.
_DOUBT = 200.0**2


@dataclass(slots=True)
class _Line:
    """Prompt tokens over body bytes: a straight line through what was seen, weighted by age."""

    slope: float
    """What is believed of the slope before anything was seen."""
    weight: float = 0.0
    bytes: float = 0.0
    tokens: float = 0.0
    bytes_bytes: float = 0.0
    bytes_tokens: float = 0.0

    def add(self, size: float, tokens: float) -> None:
        self.weight = self.weight * _MEMORY + 1
        self.bytes = self.bytes * _MEMORY + size
        self.tokens = self.tokens * _MEMORY + tokens
        self.bytes_bytes = self.bytes_bytes * _MEMORY + size * size
        self.bytes_tokens = self.bytes_tokens * _MEMORY + size * tokens

    def at(self, size: float) -> float:
        """Least squares, drawn to the configured slope where sizes hardly differed (ridge)."""
        middle, height = self.bytes / self.weight, self.tokens / self.weight
        spread = max(0.0, self.bytes_bytes / self.weight - middle * middle)
        together = self.bytes_tokens / self.weight - middle * height
        slope = (together + _DOUBT * self.slope) / (spread + _DOUBT)
        return height + min(max(slope, self.slope / 4), 1.0) * (size - middle)


class Estimate:
    """
    The prompt by the size of its body, and the most tokens that may be written.

    A body holds more than its prompt (names, roles), and a server adds a template to it. So the
    first answer of a model that reports its usage teaches more than any ratio: from then on a call
    of the same size is held for what the last ones took.
    """

    def __init__(self, *, bytes_per_token: float, default_max_tokens: int) -> None:
        self._slope = 1 / bytes_per_token
        self._default_max_tokens = default_max_tokens
        self._lines: OrderedDict[str, _Line] = OrderedDict()

    def tokens(self, ask: Reserve) -> int:
        """At least 1."""
        line = self._lines.get(ask.model)
        guess = line.at(ask.body_bytes) if line else ask.body_bytes * self._slope
        written = ask.max_tokens or self._default_max_tokens
        if ask.endpoint in _WRITES_NOTHING:
            written = 0
        return min(max(math.ceil(guess), 0) + written, MOST_TOKENS) or 1

    def learn(self, model: str, body_bytes: int, prompt_tokens: int) -> None:
        """What the upstream itself reported for a prompt."""
        if not 0 < body_bytes <= _LARGEST_LESSON or prompt_tokens > body_bytes:
            return
        line = self._lines.setdefault(model, _Line(self._slope))
        line.add(body_bytes, prompt_tokens)
        self._lines.move_to_end(model)
        if len(self._lines) > _MODELS:
            self._lines.popitem(last=False)
