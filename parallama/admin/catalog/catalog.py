"""Everything that is kept: which questions there are, and when they are asked."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable

from parallama.admin.catalog import merging
from parallama.admin.catalog.asking import Answer, Unanswered, ask
from parallama.admin.catalog.kept import Kept, Look, Said
from parallama.clock import Clock
from parallama.dialects import OLLAMA, refusal

VERSION, TAGS, PS, MODELS = "/api/version", "/api/tags", "/api/ps", "/v1/models"

_SHOW = "/api/show"
_ASK_SECONDS = 10.0
_LARGEST = 8 << 20
_LARGEST_SHOWN = 32 << 20  # with `verbose` it names every token
_KEEP_SHOWN = 1 << 20  # of one
_ALL_SHOWN = 8 << 20

_TICK_SECONDS = 5.0
_INTEREST_SECONDS = 60.0
"""So long after somebody asked, what is running is asked for at each tick."""

NO_OLLAMA_API = Answer(
    404,
    "application/json",
    refusal(
        OLLAMA,
        404,
        "no_ollama_api",
        "the model server behind this gateway has no Ollama API (/api/): "
        "use its OpenAI API under /v1/",
    ),
)

Asks = Callable[[str, str, bytes | None, int], Awaitable[Answer]]
"""With method, path, body and the largest answer."""

Source = tuple[str, str]
"""A gateway and the server's own path."""

# What the prefix adds to the path, at which the servers of that gateway are found.
_PATHS = {
    ("ollama", VERSION): VERSION,
    ("ollama", TAGS): TAGS,
    ("ollama", PS): PS,
    ("ollama", MODELS): f"/ollama{MODELS}",
    ("openai", MODELS): MODELS,
}


def through(socket: str) -> Asks:
    """Asks Envoy, at a unix socket."""

    async def asks(method: str, path: str, body: bytes | None, largest: int) -> Answer:
        return await ask(socket, method, path, body, seconds=_ASK_SECONDS, largest=largest)

    return asks


class Catalog:
    """
    What the servers of each gateway say of their models. `every` is how often (in seconds) they are
    asked though nobody wants to know; 0: never.
    """

    def __init__(self, asks: Asks, *, gateways: Iterable[str], every: float, clock: Clock) -> None:
        self._asks = asks
        self._every = every
        self._clock = clock
        self._wanted = float("-inf")
        named = frozenset(gateways)
        self._lists = {
            source: Kept(f"{source[0]} {source[1]}", self._asker(*source), clock=clock)
            for source in _PATHS
            if source[0] in named
        }
        self._shown: OrderedDict[tuple[str, bytes], Kept] = OrderedDict()

    def sources(self, gateway: str) -> dict[str, Kept]:
        """By the server's own path."""
        return {path: kept for (of, path), kept in self._lists.items() if of == gateway}

    async def look(self, gateway: str, path: str) -> Look:
        """Raises Unanswered, and LookupError where this gateway has no such list."""
        self._wanted = self._clock()
        return await self._lists[gateway, path].look()

    async def show(self, gateway: str, body: bytes) -> Look:
        """What the server says of one model: any answer that it gives. Raises Unanswered."""
        key = (gateway, hashlib.sha256(body).digest())
        kept = self._shown.get(key)
        if kept is None:
            kept = Kept(
                f"{gateway} {_SHOW}",
                self._shower(body),
                clock=self._clock,
                patience=_ASK_SECONDS,
            )
            self._shown[key] = kept
        self._shown.move_to_end(key)
        try:
            return await kept.look()
        finally:
            self._tidy()

    async def run(self) -> None:
        """For ever: the lists are known before anybody asks, and while nobody does."""
        while True:
            self.ask_what_is_due()
            await asyncio.sleep(self._pause())

    def ask_what_is_due(self) -> None:
        for (_, path), kept in self._lists.items():
            if self._due(path, kept):
                kept.refresh()

    def _due(self, path: str, kept: Kept) -> bool:
        state = kept.state()
        wanted = self._clock() - self._wanted < _INTEREST_SECONDS
        if state.age is None:
            return self._every > 0 or wanted
        if wanted and (path == PS or state.trouble):
            return state.age >= _TICK_SECONDS
        return self._every > 0 and state.age >= self._every

    def _pause(self) -> float:
        """Envoy may come a little later than we do."""
        nothing = all(kept.state().answer is None for kept in self._lists.values())
        return 1.0 if nothing else _TICK_SECONDS

    def _asker(self, gateway: str, path: str) -> Callable[[], Awaitable[Answer]]:
        async def asks() -> Answer:
            said = await self._asks("GET", _PATHS[gateway, path], None, _LARGEST)
            return _good(path, said)

        return asks

    def _shower(self, body: bytes) -> Callable[[], Awaitable[Answer]]:
        async def asks() -> Answer:
            said = await self._asks("POST", _SHOW, body, _LARGEST_SHOWN)
            if lacks_ollama_api(said):
                raise Said(NO_OLLAMA_API, final=True)
            if said.status == 200 and len(said.body) <= _KEEP_SHOWN:
                return said
            raise Said(said, final=said.status < 500)

        return asks

    def _tidy(self) -> None:
        """Drops what nobody asked for the longest, and what there is nothing to keep of."""
        for key in [key for key, kept in self._shown.items() if kept.empty]:
            del self._shown[key]
        size = sum(_size(kept) for kept in self._shown.values())
        while size > _ALL_SHOWN:
            _, dropped = self._shown.popitem(last=False)
            size -= _size(dropped)


def lacks_ollama_api(said: Answer) -> bool:
    """
    What llama.cpp says to everything under /api/ is `not found`, in words of its own. Those of
    Ollama's are `{"error": "..."}`.
    """
    if said.status != 404:
        return False
    try:
        return not isinstance(merging.read(said.body).get("error"), str)
    except merging.Unreadable:
        return True


def _good(path: str, said: Answer) -> Answer:
    """The answer, if it is what the path promises. Raises Unanswered."""
    if path != MODELS and lacks_ollama_api(said):
        return Answer(404, NO_OLLAMA_API.content_type, NO_OLLAMA_API.body, said.cluster)
    if said.status != 200:
        raise Unanswered(f"it answers {said.status}")
    try:
        if path != VERSION:
            merging.read_list(said.body)
        elif not isinstance(merging.read(said.body).get("version"), str):
            raise merging.Unreadable("no version")
    except merging.Unreadable as error:
        raise Unanswered(f"its answer cannot be read: {error}") from None
    return said


def _size(kept: Kept) -> int:
    """With what it takes to keep one, however small."""
    answer = kept.state().answer
    return 1024 + (len(answer.body) if answer is not None else 0)
