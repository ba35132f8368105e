"""`/admin/v1/model-mappings`: those of the database, which counts before the configuration."""

from typing import Annotated

from fastapi import APIRouter, Response

from parallama.admin.cursors import USUAL, Cursor, Limit, Listing, listing, page
from parallama.admin.etags import etag
from parallama.admin.shapes import NewMapping
from parallama.admin.visit import Visit, needs
from parallama.db.manage import mappings
from parallama.db.manage.mappings import Mapping

router = APIRouter(prefix="/admin/v1/model-mappings", tags=["model mappings"])

Reads = Annotated[Visit, needs("mappings:read")]
Writes = Annotated[Visit, needs("mappings:write")]


@router.get("")
async def list_mappings(
    visit: Reads, limit: Limit = USUAL, cursor: Cursor = None
) -> Listing[Mapping]:
    """By gateway and name."""
    here = page(cursor, limit, str, str)
    found = await mappings.list_mappings(visit.engine, here)
    return listing(found, here, lambda each: (each.gateway, each.external_model))


@router.post("")
async def set_mapping(given: NewMapping, visit: Writes, response: Response) -> Mapping:
    """In place of the one that the name had. Requests follow it within a second."""
    told = visit.office.config.api_gateways
    async with visit.working() as desk:
        made = await mappings.set_mapping(
            desk,
            given.gateway,
            given.external_model,
            given.internal_model,
            configured=told.model_mappings.get(given.gateway, {}),
            default=told.default_models.get(given.gateway),
        )
    response.headers["etag"] = etag(made)
    return made


@router.get("/{id}")
async def get_mapping(id: str, visit: Reads, response: Response) -> Mapping:
    """What one name means."""
    found = await mappings.get_mapping(visit.engine, id)
    response.headers["etag"] = etag(found)
    return found


@router.delete("/{id}", status_code=204)
async def unset_mapping(id: str, visit: Writes) -> None:
    """The name means itself again."""
    async with visit.working() as desk:
        await mappings.unset_mapping(desk, id)
