"""Amounts of money: exact decimals, as people write them (pure)."""

import re
from decimal import Decimal

from parallama.errors import UsageError

_AMOUNT = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_SHOWN = 40


def parse(text: str) -> Decimal:
    """`12.50`, and nothing else that Python would take for a number. Raises UsageError."""
    if not _AMOUNT.fullmatch(text):
        raise UsageError(
            f"not an amount: {text[:_SHOWN]!r}; write a number from 0 such as 12.50, without a "
            "currency and without anything between thousands"
        )
    return Decimal(text)


def check(amount: Decimal, what: str, *, decimals: int, most: int) -> Decimal:
    """`amount` where it can be kept exactly. Raises UsageError."""
    if not amount.is_finite() or not 0 <= amount <= most:
        raise UsageError(f"{what} is an amount from 0 to {most}, not {str(amount)[:_SHOWN]}")
    written = plain(amount)
    if len(written.partition(".")[2]) > decimals:
        raise UsageError(f"{what} has at most {decimals} decimals: {written[:_SHOWN]}")
    return amount


def plain(amount: Decimal) -> str:
    """All digits that count and no others: neither an exponent nor zeros at the end."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
