"""Sums that are exact however much is stored (pure)."""

from decimal import Decimal
from typing import Literal

from parallama.db.forms import from_trillionths

_BITS = 32


def exact_sum(column: str, dialect: Literal["sqlite", "postgresql"]) -> str:
    """
    A sum of whole numbers or of money, in SQL. None where nothing but NULL is added up.

    PostgreSQL needs no help. SQLite gives up beyond 64 bits, so there the upper and the lower bits
    are added up on their own, and `from_parts` puts the two sums together.
    """
    if dialect == "postgresql":
        return f"SUM({column})"
    lower = 2**_BITS - 1
    return f"SUM(({column}) >> {_BITS}) || ':' || SUM(({column}) & {lower})"


def from_parts(told: str) -> int:
    upper, lower = told.split(":")
    return (int(upper) << _BITS) + int(lower)


def money_from_parts(told: str) -> Decimal:
    return from_trillionths(from_parts(told))
