"""`/admin/v1/prices`."""

from typing import Annotated

from fastapi import APIRouter, Response

from parallama.admin.cursors import USUAL, Cursor, Limit, Listing, listing, page
from parallama.admin.etags import etag
from parallama.admin.shapes import ListedPrice, NewPrice
from parallama.admin.visit import Visit, needs
from parallama.db.manage import prices
from parallama.db.manage.prices import Listed
from parallama.prices import Price

router = APIRouter(prefix="/admin/v1/prices", tags=["prices"])

Writes = Annotated[Visit, needs("prices:write")]


@router.get("")
async def list_prices(
    visit: Annotated[Visit, needs("prices:read")], limit: Limit = USUAL, cursor: Cursor = None
) -> Listing[ListedPrice]:
    """By model: for a million tokens, and for a second of computing."""
    here = page(cursor, limit, str)
    found = await prices.list_prices(visit.engine, here)
    shown = listing(found, here, lambda listed: (listed.price.model,))
    return Listing(items=list(map(_shown, shown.items)), next_cursor=shown.next_cursor)


@router.post("")
async def set_price(given: NewPrice, visit: Writes, response: Response) -> ListedPrice:
    """In place of the one that the model had. It counts for requests that end from now on."""
    price = Price(
        given.model,
        prompt=given.prompt_per_million,
        completion=given.completion_per_million,
        cached=given.cached_per_million,
        compute_second=given.compute_per_second,
    )
    async with visit.working() as desk:
        listed = await prices.set_price(desk, price)
    response.headers["etag"] = etag(listed)
    return _shown(listed)


@router.delete("", status_code=204)
async def unset_price(visit: Writes, model: str) -> None:
    """Requests that end from now on have the next that matches, or no cost."""
    async with visit.working() as desk:
        await prices.unset_price(desk, model)


def _shown(listed: Listed) -> ListedPrice:
    price = listed.price
    return ListedPrice(
        model=price.model,
        prompt_per_million=price.prompt,
        completion_per_million=price.completion,
        cached_per_million=price.cached,
        compute_per_second=price.compute_second,
        updated_at=listed.updated_at,
    )
