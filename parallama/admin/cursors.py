"""Pages of lists: where one ends, in a form that only we read."""

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field

from parallama.admin.problems import Refused
from parallama.db.manage.pages import Page

T = TypeVar("T")

LARGEST = 200
_USUAL = 50
_LONGEST = 2000

Limit = Annotated[int, Query(ge=1, le=LARGEST, description="At most so many items.")]
Cursor = Annotated[
    str | None,
    Query(max_length=_LONGEST, description="`next_cursor` of the page before this one."),
]
USUAL: int = _USUAL


class Listing(BaseModel, Generic[T]):
    """A page. `next_cursor` gives the next one; without it this is the last."""

    items: list[T]
    next_cursor: str | None = Field(default=None)


def page(cursor: str | None, limit: int, *kinds: type) -> Page:
    """One more than is shown: it tells whether there is another page."""
    return Page(limit + 1, None if cursor is None else _read(cursor, kinds))


def listing(found: Sequence[T], page: Page, place: Callable[[T], tuple[Any, ...]]) -> Listing[T]:
    """`place` gives the values that the list is ordered by."""
    shown = list(found[: page.size - 1])
    more = len(found) == page.size
    return Listing(items=shown, next_cursor=_write(place(shown[-1])) if more else None)


def _write(place: tuple[Any, ...]) -> str:
    values = [at.isoformat() if isinstance(at, datetime) else at for at in place]
    text = json.dumps(values, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _read(cursor: str, kinds: Sequence[type]) -> tuple[Any, ...]:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        values = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        found = tuple(_value(at, kind) for at, kind in zip(values, kinds, strict=True))
    except (ValueError, TypeError, OverflowError, RecursionError, binascii.Error):
        raise Refused(
            400, "invalid_cursor", "This is no cursor of this list: begin without one."
        ) from None
    return found


def _value(value: Any, kind: type) -> Any:
    if kind is datetime:
        at = datetime.fromisoformat(value)
        if at.tzinfo is None:
            raise ValueError("a time without its zone")
        return at.astimezone(UTC)
    if kind is int and type(value) is int and abs(value) < 2**63:
        return value
    if kind is str and type(value) is str:
        value.encode()  # half of a pair of surrogates is no text
        return value
    raise ValueError("another kind of value")
