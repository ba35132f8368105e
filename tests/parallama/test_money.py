"""Amounts of money as people write them."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama import money
from parallama.errors import UsageError


@pytest.mark.parametrize(
    ("text", "amount"), [("0", "0"), ("12.50", "12.5"), (".5", "0.5"), ("007", "7"), ("1.000", "1")]
)
def test_an_amount_is_written_as_one_would(text: str, amount: str) -> None:
    assert money.parse(text) == Decimal(amount)
    assert money.plain(money.parse(text)) == amount


@pytest.mark.parametrize(
    "text",
    ["", "-1", "+1", "1e3", "NaN", "Infinity", "1_000", "1,000", "1,5", "$5", "5 EUR", " 5", "5\n",
     "1.", ".", "\u0661", "0x10"],
)  # fmt: skip
def test_what_else_python_or_people_take_for_an_amount_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not an amount"):
        money.parse(text)


@given(st.decimals(0, 10**12, places=12))
def test_no_digit_is_lost_between_text_and_number(amount: Decimal) -> None:
    assert money.parse(money.plain(amount)) == amount


@given(st.decimals(allow_nan=True, allow_infinity=True))
def test_what_passes_the_check_is_what_can_be_kept(amount: Decimal) -> None:
    try:
        checked = money.check(amount, "it", decimals=6, most=100)
    except UsageError:
        return
    assert 0 <= checked <= 100
    assert checked * 10**6 == int(checked * 10**6)


def test_zeros_at_the_end_are_no_decimals() -> None:
    assert money.check(Decimal("1.5000000"), "it", decimals=1, most=2) == Decimal("1.5")
