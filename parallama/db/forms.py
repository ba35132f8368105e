"""How SQLite keeps what it has no type for: times as text, money as whole numbers (pure)."""

from datetime import UTC, datetime
from decimal import Context, Decimal

_DECIMALS = 12
_TRILLION = 10**_DECIMALS
# Sums have more digits than Python's decimals keep on their own.
_EXACT = Context(prec=100)


def to_trillionths(amount: Decimal) -> int:
    """What is finer than a trillionth is rounded, half to even."""
    return int((amount * _TRILLION).to_integral_value())


def from_trillionths(count: int) -> Decimal:
    return Decimal(count).scaleb(-_DECIMALS, _EXACT)


def to_text(at: datetime) -> str:
    """Text that sorts by time and that SQLite's own date functions understand; UTC by agreement."""
    if at.tzinfo is not UTC:
        if at.tzinfo is None:
            raise ValueError("a time without its zone")
        at = at.astimezone(UTC)
    return at.isoformat(" ", "microseconds")[:26]


def from_text(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)
