"""Prices: set, shown, removed."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama import money
from parallama.db import names
from parallama.db.manage.engine import insert_or, reading
from parallama.db.manage.pages import Page, paged
from parallama.db.manage.tables import model_prices as table
from parallama.desk import Desk
from parallama.errors import NotFound
from parallama.prices import DECIMALS, Price, plain_model

_LARGEST = 10**6


@dataclass(frozen=True, slots=True)
class Listed:
    """A price and since when it is so."""

    price: Price
    updated_at: datetime


async def set_price(desk: Desk, price: Price) -> Listed:
    """
    In place of the one that the model had, if any, under whatever spelling of its name.

    Raises UsageError for an amount that cannot be kept exactly.
    """
    values = {
        "prompt_per_million": _checked(price.prompt, "the price of a prompt"),
        "completion_per_million": _checked(price.completion, "the price of a completion"),
        "cached_per_million": _maybe(price.cached, "the price of what was cached"),
        "compute_per_second": _maybe(price.compute_second, "the price of computing"),
        "updated_at": desk.now,
    }
    model = names.check_model(price.model)
    async with desk.writing() as work:
        connection = work.connection
        same = await _same(connection, model)
        before = await _listed_as(connection, same)
        others = [name for name in same if name != model]
        await connection.execute(delete(table).where(table.c.model.in_(others)))
        query = insert_or(desk.engine, table).values(id=str(uuid4()), model=model, **values)
        await connection.execute(query.on_conflict_do_update(index_elements=["model"], set_=values))
        (after,) = await _listed_as(connection, [model])
        await work.record("prices.set", model, before=before[0] if before else None, after=after)
        work.changed("prices")
    return after


async def list_prices(engine: AsyncEngine, page: Page | None = None) -> list[Listed]:
    """By model."""
    query = select(table).order_by(table.c.model)
    if page is not None:
        query = paged(select(table), page, (table.c.model,))
    async with reading(engine) as connection:
        return [_listed(row) for row in await connection.execute(query)]


async def unset_price(desk: Desk, model: str) -> None:
    """Raises NotFound where the model has none."""
    model = names.check_model(model)
    async with desk.writing() as work:
        same = await _same(work.connection, model)
        if not same:
            raise NotFound(f"there is no price of {model!r}: `parallama prices list` shows all")
        before = await _listed_as(work.connection, same)
        await work.connection.execute(delete(table).where(table.c.model.in_(same)))
        await work.record("prices.unset", model, before=before[0])
        work.changed("prices")


async def _listed_as(connection: AsyncConnection, models: list[str]) -> list[Listed]:
    query = select(table).where(table.c.model.in_(models)).order_by(table.c.model)
    return [_listed(row) for row in await connection.execute(query)]


async def _same(connection: AsyncConnection, model: str) -> list[str]:
    """The listed names that mean this very model, or this very prefix."""
    listed = await connection.scalars(select(table.c.model))
    return [name for name in listed if plain_model(name) == plain_model(model)]


def _checked(amount: Decimal, what: str) -> Decimal:
    return money.check(amount, what, decimals=DECIMALS, most=_LARGEST)


def _maybe(amount: Decimal | None, what: str) -> Decimal | None:
    return None if amount is None else _checked(amount, what)


def _listed(row: Any) -> Listed:
    price = Price(
        row.model,
        prompt=row.prompt_per_million,
        completion=row.completion_per_million,
        cached=row.cached_per_million,
        compute_second=row.compute_per_second,
    )
    return Listed(price, row.updated_at)
