"""Which limits does this user have? What ratelimit asks."""

from collections.abc import Mapping
from types import MappingProxyType

from parallama.db.store import Store
from parallama.limits import Limit, Unit, Window, merge

Cell = tuple[Unit, Window]

COLUMNS: Mapping[Cell, str] = MappingProxyType(
    {
        (Unit.REQUESTS, Window.MINUTE): "request_limit_minute",
        (Unit.REQUESTS, Window.HOUR): "request_limit_hourly",
        (Unit.REQUESTS, Window.DAY): "request_limit_daily",
        (Unit.TOKENS, Window.MINUTE): "token_limit_minute",
        (Unit.TOKENS, Window.HOUR): "token_limit_hourly",
        (Unit.TOKENS, Window.DAY): "token_limit_daily",
    }
)

_LIMITS_OF = f"""
SELECT l.role, l.gateway_type, l.model, {", ".join(f"l.{name}" for name in COLUMNS.values())}
FROM users AS u JOIN gateway_rate_limits AS l ON l.user_id = u.id OR l.role = u.role
WHERE u.id = ?
ORDER BY l.gateway_type, l.model
"""  # noqa: S608 - our own column names


async def limits_of(store: Store, user_id: str) -> tuple[Limit, ...]:
    """What counts for this user: the role's defaults, cell by cell replaced by the user's own."""
    defaults: list[Limit] = []
    own: list[Limit] = []
    for role, gateway, model, *amounts in await store.read(_LIMITS_OF, (user_id,)):
        limits = own if role is None else defaults
        for (unit, window), amount in zip(COLUMNS, amounts, strict=True):
            if amount is not None:
                limits.append(Limit(gateway, model, unit, window, amount))
    return merge(defaults, own)
