"""How much a call may need, before anybody knows: learned from calls that ended."""

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from ratelimit.rules import MOST_TOKENS, Need, Reserve

# These answer with vectors: there is nothing to write, so only the prompt is held.
_WRITES_NOTHING = frozenset({"/api/embed", "/api/embeddings", "/v1/embeddings"})

_MODELS = 1000
# Bodies beyond this are images and the like, whose bytes say nothing about text.
_LARGEST_LESSON = 1 << 18
# Sizes of bodies that are remembered of each model.
_SIZES = 64
# What older calls count for, beside the newest.
_MEMORY = 0.95
# The slope is believed only as far as sizes differed: this spread, in bytes, weighs as much as the
# configured ratio.
_DOUBT = 200.0**2
# Nine of ten answers are no longer than this many standard deviations above the mean.
_USUAL = 1.3
# A server puts a template around a prompt: so many tokens more than its body has bytes, at most.
_TEMPLATE = 64


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


@dataclass(slots=True)
class _Usual:
    """What is usual: mean and spread of what was seen, weighted by age."""

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.weight = self.weight * _MEMORY + 1
        self.total = self.total * _MEMORY + value
        self.squares = self.squares * _MEMORY + value * value

    def value(self) -> float | None:
        """What nine of ten do not exceed; None before anything was seen."""
        if not self.weight:
            return None
        mean = self.total / self.weight
        variance = max(0.0, self.squares / self.weight - mean * mean)
        # What rounding leaves of no spread is none.
        return mean + (_USUAL * math.sqrt(variance) if variance > 1e-6 * mean * mean else 0.0)


@dataclass(slots=True)
class _Model:
    prompt: _Line
    sizes: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """The most tokens that prompts of this many bytes had, of late."""
    answer: _Usual = field(default_factory=_Usual)
    compute: _Usual = field(default_factory=_Usual)


class Estimate:
    """
    The prompt by the size of its body, and the most tokens that may be written.

    A body holds more than its prompt (names, roles), and a server adds a template to it. So the
    first answer of a model that reports its usage teaches more than any ratio: from then on a call
    of the same size is held for what the last ones took. Likewise for the length of answers to
    calls that name no maximum, and for the time that a call takes.
    """

    def __init__(self, *, bytes_per_token: float, default_max_tokens: int) -> None:
        self._slope = 1 / bytes_per_token
        self._default_max_tokens = default_max_tokens
        self._models: OrderedDict[str, _Model] = OrderedDict()

    def need(self, ask: Reserve) -> Need:
        """What to hold. Its cost is not known here."""
        model = self._models.get(ask.model)
        guess = ask.body_bytes * self._slope
        if model is not None and model.sizes:
            guess = model.sizes.get(ask.body_bytes) or model.prompt.at(ask.body_bytes)
        return Need(
            prompt=min(max(math.ceil(guess), 0), MOST_TOKENS),
            answer=self._answer(ask, model),
            compute=math.ceil((model.compute.value() if model else None) or 0),
        )

    def most_prompt(self, ask: Reserve) -> int:
        """
        A prompt that no call passes which is like those that were seen.

        Of a model that nobody knows yet: a token takes a byte at least.
        """
        model = self._models.get(ask.model)
        if model is None or not model.sizes:
            return ask.body_bytes + _TEMPLATE
        if ask.body_bytes in model.sizes:
            return max(1, model.sizes[ask.body_bytes])
        line = model.prompt
        too_low = max(tokens - line.at(size) for size, tokens in model.sizes.items())
        return max(1, math.ceil(line.at(ask.body_bytes) + max(0.0, too_low)))

    def learn(self, model: str, body_bytes: int, prompt_tokens: int) -> None:
        """What the upstream itself reported for a prompt."""
        if 0 < body_bytes <= _LARGEST_LESSON and prompt_tokens <= body_bytes + _TEMPLATE:
            known = self._known(model)
            known.prompt.add(body_bytes, prompt_tokens)
            before = int(known.sizes.get(body_bytes, 0) * _MEMORY)
            known.sizes[body_bytes] = max(prompt_tokens, before)
            known.sizes.move_to_end(body_bytes)
            if len(known.sizes) > _SIZES:
                known.sizes.popitem(last=False)

    def learn_answer(self, model: str, tokens: int) -> None:
        """The length of an answer to a call that named no maximum."""
        self._known(model).answer.add(tokens)

    def learn_compute(self, model: str, milliseconds: float) -> None:
        """How long a call took."""
        self._known(model).compute.add(milliseconds)

    def _answer(self, ask: Reserve, model: _Model | None) -> int:
        if ask.endpoint in _WRITES_NOTHING:
            return 0
        if ask.max_tokens:
            return ask.max_tokens
        usual = model.answer.value() if model else None
        return self._default_max_tokens if usual is None else math.ceil(usual)

    def _known(self, name: str) -> _Model:
        model = self._models.setdefault(name, _Model(_Line(self._slope)))
        self._models.move_to_end(name)
        if len(self._models) > _MODELS:
            self._models.popitem(last=False)
        return model
