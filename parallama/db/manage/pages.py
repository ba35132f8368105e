"""A part of a long list, after the last that was seen: what is added meanwhile moves nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, tuple_


@dataclass(frozen=True, slots=True)
class Page:
    """At most `size` rows after the one with these values in the columns of the order."""

    size: int
    after: tuple[Any, ...] | None = None


def paged(
    query: Select[Any],
    page: Page,
    order: Sequence[ColumnElement[Any]],
    *,
    newest_first: bool = False,
) -> Select[Any]:
    """`query` in this order, which no two rows share, and of it the page."""
    if page.after is not None:
        here = tuple_(*order)
        last = tuple_(*page.after, types=[column.type for column in order])
        query = query.where(here < last if newest_first else here > last)
    return query.order_by(*(at.desc() if newest_first else at for at in order)).limit(page.size)
