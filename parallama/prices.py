"""What a model costs, and what a request did (pure, but for a memory of the list)."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from math import isfinite

from parallama.cache import Cache
from parallama.changes import Change
from parallama.limits import ANY, name_matches, plain_name
from parallama.usage import UsageRecord

DECIMALS = 6
"""Of a price. A token's is a millionth of it, so a cost has 12, and no product is ever rounded."""

_PER_UNIT = 10**DECIMALS
_COST_DECIMALS = 12

_LARGEST_COMPUTE_MS = 1e15  # 30,000 years; a thousand times the largest float is none

LARGEST_COST = Decimal(9_000_000)
"""Of one request; whatever an upstream makes up. SQLite and the counters hold no more of it."""


@dataclass(frozen=True, slots=True)
class Price:
    """
    For a million tokens, and for a second of computing. `model` is a name, or its beginning with *.

    `cached` is for those tokens of the prompt that the upstream remembered; None is as `prompt`.
    """

    model: str
    prompt: Decimal
    completion: Decimal
    cached: Decimal | None = None
    compute_second: Decimal | None = None


class PriceList:
    """All prices of one moment, ready to be asked for each request."""

    def __init__(self, prices: Iterable[Price]) -> None:
        self._exact: dict[str, Price] = {}
        prefixes: dict[str, Price] = {}
        for price in prices:
            known = prefixes if price.model.endswith(ANY) else self._exact
            known.setdefault(plain_model(price.model), price)
        self._prefixes = sorted(prefixes.items(), key=lambda item: -len(item[0]))

    def of(self, served: str | None, requested: str | None = None) -> Price | None:
        """
        An exact name before a prefix, a longer prefix before a shorter one; among equals the price
        of the model that answered before that of the one asked for.

        So a server that calls its model by a path is priced by the name that clients use, and an
        alias by what stands behind it, if only that has a price.
        """
        names = [plain_name(name) for name in (served, requested) if name]
        for name in names:
            price = self._exact.get(plain_model(name))
            if price is not None:
                return price
        for pattern, price in self._prefixes:
            if any(name_matches(pattern, name) for name in names):
                return price
        return None

    def priced(self, record: UsageRecord) -> UsageRecord:
        """With its cost; without one where the model has no price. A cost once set stays."""
        if record.cost is not None:
            return record
        price = self.of(record.served_model, record.model_name)
        return record if price is None else replace(record, cost=cost_of_record(price, record))


class Prices:
    """The price list, remembered until a change signal names it or means everything."""

    def __init__(self, load: Callable[[], Awaitable[tuple[Price, ...]]]) -> None:
        self._load = load
        self._cache: Cache[None, PriceList] = Cache(size=1)

    def peek(self) -> PriceList | None:
        """What is remembered; None where the database has to be asked."""
        return self._cache.peek(None)

    async def current(self) -> PriceList:
        """Raises Unavailable."""
        return await self._cache.get(None, self._read) or PriceList(())

    def on_change(self, change: Change) -> None:
        if change.kind in ("prices", "everything"):
            self._cache.forget_all()

    def pause(self) -> None:
        self._cache.pause()

    def resume(self) -> None:
        self._cache.resume()

    async def _read(self) -> PriceList:
        return PriceList(await self._load())


def price_for(prices: Iterable[Price], model: str) -> Price | None:
    """What counts for this one name. Whoever asks often keeps a PriceList."""
    return PriceList(prices).of(model)


def plain_model(name: str) -> str:
    """One spelling for all names that Ollama takes for the same model; of a prefix, for itself."""
    plain = plain_name(name)
    return plain if plain.endswith(ANY) else plain.removesuffix(":latest")


def cost_of(
    price: Price,
    prompt: int | None = None,
    completion: int | None = None,
    cached: int | None = None,
    compute_ms: float | None = None,
) -> Decimal:
    """
    Exact to its 12 decimals; computing counts in whole microseconds.

    Cached tokens are part of the prompt. What is not known or negative is zero.
    """
    asked, answered = _count(prompt), _count(completion)
    remembered = min(_count(cached), asked)
    cost = (asked - remembered) * _per_unit(price.prompt) + answered * _per_unit(price.completion)
    cost += remembered * _per_unit(price.prompt if price.cached is None else price.cached)
    if price.compute_second is not None and compute_ms is not None and isfinite(compute_ms):
        microseconds = round(min(max(compute_ms, 0.0), _LARGEST_COMPUTE_MS) * 1000)
        cost += microseconds * _per_unit(price.compute_second)
    return min(Decimal(cost).scaleb(-_COST_DECIMALS), LARGEST_COST)


def cost_of_record(price: Price, record: UsageRecord) -> Decimal:
    """
    Every token that was used has its price: those beyond the two counts are the prompt's where
    only that is unknown, else the answer's, as with a stream that was cut before its end.
    """
    prompt, completion = record.prompt_tokens, record.completion_tokens
    rest = max(0, record.tokens_used - (prompt or 0) - (completion or 0))
    if prompt is None and completion is not None:
        prompt = rest
    else:
        completion = (completion or 0) + rest
    return cost_of(price, prompt, completion, record.cached_tokens, record.compute_ms)


def _count(number: int | None) -> int:
    return max(0, number or 0)


def _per_unit(price: Decimal) -> int:
    return int(price * _PER_UNIT)
