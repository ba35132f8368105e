"""Which limits and grants does this user have? What ratelimit asks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType

from parallama.clock import system_clock
from parallama.db.store import Store
from parallama.limits import Grant, Limit, Unit, Window, merge

Cell = tuple[Unit, Window]

COLUMNS: Mapping[Cell, str] = MappingProxyType(
    {
        (Unit.REQUESTS, Window.MINUTE): "request_limit_minute",
        (Unit.REQUESTS, Window.HOUR): "request_limit_hourly",
        (Unit.REQUESTS, Window.DAY): "request_limit_daily",
        (Unit.REQUESTS, Window.MONTH): "request_limit_monthly",
        (Unit.TOKENS, Window.MINUTE): "token_limit_minute",
        (Unit.TOKENS, Window.HOUR): "token_limit_hourly",
        (Unit.TOKENS, Window.DAY): "token_limit_daily",
        (Unit.TOKENS, Window.MONTH): "token_limit_monthly",
        (Unit.COMPUTE_SECONDS, Window.MINUTE): "compute_limit_minute",
        (Unit.COMPUTE_SECONDS, Window.HOUR): "compute_limit_hourly",
        (Unit.COMPUTE_SECONDS, Window.DAY): "compute_limit_daily",
        (Unit.COMPUTE_SECONDS, Window.MONTH): "compute_limit_monthly",
        (Unit.COST, Window.DAY): "cost_limit_daily",
        (Unit.COST, Window.MONTH): "cost_limit_monthly",
        (Unit.CONCURRENT, Window.MOMENT): "concurrent_limit",
    }
)

_AMOUNTS = ", ".join(
    f'l.{name} AS "{name} [money]"' if unit is Unit.COST else f"l.{name}"
    for (unit, _), name in COLUMNS.items()
)
_LIMITS = f"""
SELECT l.role, l.key_id, l.shadow, l.gateway_type, l.model,
  l.updated_at AS "updated_at [datetime]", {_AMOUNTS},
  EXISTS (SELECT 1 FROM limit_grants AS g WHERE g.user_id = ?) AS has_grants
"""  # noqa: S608 - our own column names

# Three questions in one, each by an index: an OR of them makes PostgreSQL read the whole table.
_LIMITS_OF = f"""
{_LIMITS} FROM gateway_rate_limits AS l WHERE l.user_id = ?
UNION ALL
{_LIMITS} FROM users AS u JOIN gateway_rate_limits AS l ON l.role = u.role WHERE u.id = ?
UNION ALL
{_LIMITS} FROM api_keys AS k JOIN gateway_rate_limits AS l ON l.key_id = k.id WHERE k.user_id = ?
ORDER BY gateway_type, model
"""
_GRANTS_OF = """
SELECT id, gateway_type, model, unit, amount, cost AS "cost [money]", created_at, expires_at
FROM limit_grants
WHERE user_id = ?
ORDER BY expires_at, id
"""


@dataclass(frozen=True, slots=True)
class Policy:
    """
    All that decides how much a user may use. Grants that end soon come first.

    `read_at` is when the database said so, in seconds since the epoch.
    """

    limits: tuple[Limit, ...]
    grants: tuple[Grant, ...]
    read_at: float = field(default=0.0, compare=False)


async def policy_of(store: Store, user_id: str) -> Policy:
    """
    What counts for this user: the role's defaults, cell by cell replaced by the user's own, and
    what the user's keys are limited to besides.
    """
    read_at = system_clock()
    defaults: list[Limit] = []
    own: list[Limit] = []
    rows = await store.read(_LIMITS_OF, (user_id,) * 6)
    for role, key, shadow, gateway, model, set_at, *amounts, _ in rows:
        limits = own if role is None else defaults
        since = set_at.timestamp()
        for (unit, window), amount in zip(COLUMNS, amounts, strict=True):
            if amount is not None:
                parts = amount_in_parts(unit, amount)
                limits.append(Limit(gateway, model, unit, window, parts, key or "", shadow, since))
    may_have_grants = rows[0][-1] if rows else True
    found = await store.read(_GRANTS_OF, (user_id,)) if may_have_grants else []
    grants = [_grant(*row) for row in found]
    return Policy(merge(defaults, own), tuple(grants), read_at)


def amount_in_parts(unit: Unit, amount: int | Decimal) -> int:
    """An amount in the parts that are counted; what is finer than a part is left out."""
    return int(amount * unit.parts)


def _grant(
    id: str,
    gateway: str,
    model: str,
    unit: str,
    amount: int | None,
    cost: Decimal | None,
    created_at: datetime,
    expires_at: datetime,
) -> Grant:
    """The columns of _GRANTS_OF, in its order."""
    kind = Unit(unit)
    stored = cost if amount is None else amount
    return Grant(
        id=id,
        gateway=gateway,
        model=model,
        unit=kind,
        amount=amount_in_parts(kind, stored or 0),
        created_at=created_at.timestamp(),
        expires_at=expires_at.timestamp(),
    )
