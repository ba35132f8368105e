"""Prices: which counts, what a request costs, and what is remembered."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from parallama.changes import Change, Kind
from parallama.config import Database
from parallama.db.manage import prices as manage
from parallama.db.prices import prices_of
from parallama.errors import NotFound, Unavailable, UsageError
from parallama.prices import (
    LARGEST_COST,
    Price,
    PriceList,
    Prices,
    cost_of,
    cost_of_record,
    price_for,
)
from tests.parallama.db_on_disk import NOW, Opened, a_record, on


def a_price(model: str = "llama3", **fields: Any) -> Price:
    amounts: dict[str, Any] = {name: Decimal(amount) for name, amount in fields.items()}
    return replace(Price(model, prompt=Decimal("0.15"), completion=Decimal("0.60")), **amounts)


# What it costs

AMOUNTS = st.decimals(0, 1000, places=6)
COUNTS = st.integers(0, 10**6)
MILLISECONDS = st.integers(0, 10**9).map(lambda micros: micros / 1000)
PRICES = st.builds(
    Price,
    st.just("m"),
    prompt=AMOUNTS,
    completion=AMOUNTS,
    cached=st.none() | AMOUNTS,
    compute_second=st.none() | AMOUNTS,
)


@pytest.mark.parametrize(
    ("price", "used", "cost"),
    [
        pytest.param(a_price(), {"prompt": 10**6}, "0.15", id="a million of prompt"),
        pytest.param(a_price(), {"completion": 10**6}, "0.60", id="a million of answer"),
        pytest.param(a_price(), {"prompt": 1}, "0.00000015", id="a token"),
        pytest.param(
            a_price(prompt="0.000001"), {"prompt": 1}, "0.000000000001", id="the least there is"
        ),
        pytest.param(a_price(), {"prompt": 100, "cached": 40}, "0.000015", id="cached as prompt"),
        pytest.param(
            a_price(cached="0.05"), {"prompt": 100, "cached": 40}, "0.000011", id="cached is part"
        ),
        pytest.param(
            a_price(cached="0.05"), {"prompt": 100, "cached": 400}, "0.000005", id="never more"
        ),
        pytest.param(a_price(cached="0"), {"prompt": 100, "cached": 100}, "0", id="cached is free"),
        pytest.param(a_price(cached="0.05"), {"cached": 40}, "0", id="cached of nothing"),
        pytest.param(a_price(), {"compute_ms": 5000.0}, "0", id="computing without a price"),
        pytest.param(
            a_price(compute_second="0.0001"), {"compute_ms": 1500.0}, "0.00015", id="computing"
        ),
        pytest.param(
            a_price(compute_second="1"), {"compute_ms": 0.1 + 0.2}, "0.0003", id="no float's tail"
        ),
        pytest.param(
            a_price(compute_second="1"), {"compute_ms": float("nan")}, "0", id="no number"
        ),
        pytest.param(a_price(compute_second="1"), {"compute_ms": -3.0}, "0", id="time backwards"),
        pytest.param(a_price(), {"prompt": -5, "completion": -5}, "0", id="less than nothing"),
        pytest.param(a_price(), {}, "0", id="nothing known"),
        pytest.param(
            a_price(), {"prompt": 2**63 - 1, "completion": 2**63}, "9000000", id="absurdly much"
        ),
    ],
)
def test_the_cost_is_exact(price: Price, used: dict[str, Any], cost: str) -> None:
    assert cost_of(price, **used) == Decimal(cost)


@given(PRICES, COUNTS, COUNTS, COUNTS, MILLISECONDS)
def test_no_product_is_ever_rounded(
    price: Price, prompt: int, completion: int, cached: int, compute_ms: float
) -> None:
    cached = min(cached, prompt)
    of_cached = price.prompt if price.cached is None else price.cached
    exact = (
        (prompt - cached) * Fraction(price.prompt)
        + cached * Fraction(of_cached)
        + completion * Fraction(price.completion)
    ) / 10**6
    exact += Fraction(price.compute_second or 0) * round(compute_ms * 1000) / 10**6
    with localcontext() as context:
        context.prec = 50
        cost = cost_of(price, prompt, completion, cached, compute_ms)
    assert Fraction(cost) == min(exact, Fraction(LARGEST_COST))
    assert cost >= 0
    assert cost == cost_of(price, prompt, completion, cached, compute_ms)


@given(PRICES, *(st.none() | st.integers(-(2**70), 2**70) for _ in range(3)), st.floats())
@example(Price("m", Decimal(), Decimal(), None, Decimal()), None, None, None, 1.7e305)
def test_whatever_an_upstream_makes_up_can_be_stored(
    price: Price, prompt: Any, completion: Any, cached: Any, compute_ms: float
) -> None:
    cost = cost_of(price, prompt, completion, cached, compute_ms)
    assert 0 <= cost <= LARGEST_COST
    assert -cost.normalize().as_tuple().exponent <= 12  # type: ignore[operator]


@given(PRICES, st.lists(st.tuples(COUNTS, COUNTS, MILLISECONDS), max_size=5))
def test_parts_cost_what_the_whole_does(price: Price, parts: list[tuple[int, int, float]]) -> None:
    whole = cost_of(
        price,
        sum(prompt for prompt, _, _ in parts),
        sum(completion for _, completion, _ in parts),
        # In microseconds: sums of floats are another matter.
        compute_ms=sum(round(ms * 1000) for _, _, ms in parts) / 1000,
    )
    each = [cost_of(price, prompt, completion, None, ms) for prompt, completion, ms in parts]
    assert min(sum(each, Decimal()), LARGEST_COST) == whole


@pytest.mark.parametrize(
    ("counts", "cost"),
    [
        pytest.param((100, 50, 150), "0.000045", id="both known"),
        pytest.param((None, None, 50), "0.00003", id="only a total: as the answer"),
        pytest.param((100, None, 150), "0.000045", id="the rest is the answer"),
        pytest.param((None, 50, 150), "0.000045", id="the rest is the prompt"),
        pytest.param((None, 50, 50), "0.00003", id="no rest"),
        pytest.param((100, 50, 170), "0.000057", id="a rest though both are known"),
        pytest.param((100, 50, 120), "0.000045", id="a total that is too small"),
        pytest.param((None, None, 0), "0", id="nothing"),
    ],
)
def test_every_token_that_was_used_has_its_price(
    counts: tuple[int | None, int | None, int], cost: str
) -> None:
    prompt, completion, total = counts
    record = a_record(prompt_tokens=prompt, completion_tokens=completion, tokens_used=total)
    assert cost_of_record(a_price(), record) == Decimal(cost)


# Which price counts


@pytest.mark.parametrize(
    ("served", "requested", "found"),
    [
        pytest.param("llama3", None, "llama3", id="its name"),
        pytest.param("library/Llama3:latest", None, "llama3", id="its name by another spelling"),
        pytest.param("llama3:70b", None, "llama3:*", id="a prefix"),
        pytest.param("llama3:70b-q4", None, "llama3:70b-*", id="the longer prefix"),
        pytest.param("llama2", None, "llama*", id="a shorter prefix"),
        pytest.param("gemma", None, None, id="none"),
        pytest.param(None, None, None, id="nobody knows which"),
        pytest.param("", "llama3", "llama3", id="without a served one"),
        pytest.param("/models/x.gguf", "llama3", "llama3", id="the server calls it otherwise"),
        pytest.param("llama3:70b", "gpt-4", "gpt-4", id="an exact name before a prefix"),
        pytest.param("llama3", "gpt-4", "llama3", id="of two exact ones, what answered"),
        pytest.param("llama3:70b", "llama2:7b", "llama3:*", id="of two prefixes, the longer one"),
    ],
)
def test_one_price_counts(served: str | None, requested: str | None, found: str | None) -> None:
    models = ("llama*", "llama3:*", "gpt-4", "llama3:70b-*", "llama3")
    for ordered in (models, models[::-1]):
        price = PriceList(map(a_price, ordered)).of(served, requested)
        assert (price.model if price else None) == found
        if served and requested is None:
            assert price_for(map(a_price, ordered), served) == price


def test_a_missing_price_is_no_cost_and_a_price_of_nothing_is_0() -> None:
    assert PriceList([]).priced(a_record()).cost is None
    free = a_price("*", prompt=0, completion=0)
    assert PriceList([free]).priced(a_record()).cost == 0
    assert PriceList([a_price()]).priced(a_record(model_name=None, served_model=None)).cost is None


def test_a_cost_that_is_known_stays() -> None:
    record = a_record(cost=Decimal("0.5"))
    assert PriceList([a_price()]).priced(record) is record


# What is remembered


class Table:
    """A price table that counts how often it was read."""

    def __init__(self) -> None:
        self.prices: tuple[Price, ...] = (a_price(),)
        self.reads = 0
        self.away = False

    async def load(self) -> tuple[Price, ...]:
        self.reads += 1
        if self.away:
            raise Unavailable("gone")
        return self.prices


async def cost(prices: Prices) -> Decimal | None:
    return (await prices.current()).priced(a_record()).cost


def test_prices_are_read_once_until_they_change() -> None:
    async def work() -> None:
        table = Table()
        prices = Prices(table.load)
        assert prices.peek() is None
        for _ in range(3):
            assert await cost(prices) == Decimal("0.0000135")
        assert table.reads == 1
        listed = prices.peek()
        assert listed is not None
        assert listed.of("llama3") == a_price()
        table.prices = ()
        prices.on_change(Change("prices"))
        assert prices.peek() is None
        assert await cost(prices) is None
        assert prices.peek() is not None, "an empty list is remembered too"
        assert table.reads == 2

    asyncio.run(work())


@pytest.mark.parametrize(
    ("kind", "forgotten"),
    [("prices", True), ("everything", True), ("key", False), ("user", False), ("limits", False)],
)
def test_only_what_may_be_about_prices_makes_them_forgotten(kind: Kind, forgotten: bool) -> None:
    async def work() -> None:
        prices = Prices(Table().load)
        await prices.current()
        prices.on_change(Change(kind, "x"))
        assert (prices.peek() is None) is forgotten

    asyncio.run(work())


def test_without_the_signal_nothing_is_remembered() -> None:
    async def work() -> None:
        table = Table()
        prices = Prices(table.load)
        await prices.current()
        prices.pause()
        await prices.current()
        await prices.current()
        assert (prices.peek(), table.reads) == (None, 3)
        prices.resume()
        await prices.current()
        assert prices.peek() is not None

    asyncio.run(work())


def test_without_the_database_what_is_remembered_counts() -> None:
    async def work() -> None:
        table = Table()
        table.away = True
        prices = Prices(table.load)
        with pytest.raises(Unavailable):
            await cost(prices)
        table.away = False
        await prices.current()
        table.away = True
        assert await cost(prices) == Decimal("0.0000135")

    asyncio.run(work())


# In the database


def test_prices_come_back_as_they_were_set(db: Database) -> None:
    full = a_price("gpt*", prompt="999999.999999", cached="0.000001", compute_second="0.0001")

    async def work(at: Opened) -> None:
        assert await prices_of(at.store) == ()
        for price in (a_price(), full):
            assert (await manage.set_price(at.desk(), price)).price == price
        assert await prices_of(at.store) == (full, a_price())
        assert [each.price for each in await manage.list_prices(at.engine)] == [full, a_price()]
        assert {each.updated_at for each in await manage.list_prices(at.engine)} == {NOW}

    on(db, work)


def test_a_price_takes_the_place_of_the_models_last_one(db: Database) -> None:
    async def work(at: Opened) -> None:
        later = NOW + timedelta(1)
        await manage.set_price(at.desk(), a_price(cached="0.01"))
        await manage.set_price(at.desk(later), a_price(prompt=1))
        assert await prices_of(at.store) == (a_price(prompt=1),)
        renamed = a_price("library/LLAMA3:latest", prompt=2)
        await manage.set_price(at.desk(later), renamed)
        assert await prices_of(at.store) == (renamed,)
        await manage.set_price(at.desk(later), a_price("llama3*"))
        assert len(await prices_of(at.store)) == 2
        await manage.unset_price(at.desk(), "llama3")
        assert await prices_of(at.store) == (a_price("llama3*"),)
        with pytest.raises(NotFound, match="there is no price of 'llama3'"):
            await manage.unset_price(at.desk(), "llama3")

    on(db, work)


@pytest.mark.parametrize(
    ("price", "complaint"),
    [
        (a_price(prompt="-0.01"), "the price of a prompt is an amount from 0 to 1000000"),
        (a_price(completion="NaN"), "the price of a completion is an amount"),
        (a_price(cached="0.0000001"), "the price of what was cached has at most 6 decimals"),
        (a_price(compute_second="1000000.01"), "the price of computing is an amount from 0 to"),
        (a_price("a*b"), "only at the end"),
        (a_price(""), "1 to 255"),
    ],
)
def test_a_price_that_cannot_be_kept_is_refused(db: Database, price: Price, complaint: str) -> None:
    async def work(at: Opened) -> None:
        with pytest.raises(UsageError, match=complaint):
            await manage.set_price(at.desk(), price)
        assert await prices_of(at.store) == ()

    on(db, work)
