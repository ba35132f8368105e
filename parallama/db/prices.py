"""The price list, as services read it."""

from parallama.db.store import Store
from parallama.prices import Price

_PRICES = """
SELECT model,
       prompt_per_million AS "prompt [money]",
       completion_per_million AS "completion [money]",
       cached_per_million AS "cached [money]",
       compute_per_second AS "compute [money]"
FROM model_prices
ORDER BY model
"""


async def prices_of(store: Store) -> tuple[Price, ...]:
    """Raises Unavailable."""
    return tuple(Price(*row) for row in await store.read(_PRICES))
