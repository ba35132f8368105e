"""Model mappings: the names that clients may use, and the models that they mean."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama.db import names
from parallama.db.manage.engine import insert_or, reading
from parallama.db.manage.pages import Page, paged
from parallama.db.manage.tables import model_mappings as table
from parallama.desk import Desk
from parallama.errors import NotFound, UsageError
from parallama.roles import GATEWAYS


@dataclass(frozen=True, slots=True)
class Mapping:
    """Who asks this gateway for `external_model` means `internal_model`."""

    id: str
    gateway: str
    external_model: str
    internal_model: str
    created_at: datetime
    updated_at: datetime


async def set_mapping(desk: Desk, gateway: str, external: str, internal: str) -> Mapping:
    """In place of the one that the name had on this gateway, if any."""
    if gateway not in GATEWAYS:
        raise UsageError(f"there is no gateway {gateway!r}: the gateways are {', '.join(GATEWAYS)}")
    external, internal = _checked(external), _checked(internal)
    async with desk.writing() as work:
        this = (table.c.gateway_type == gateway, table.c.external_model == external)
        before = (await work.connection.execute(select(table).where(*this))).first()
        query = insert_or(desk.engine, table).values(
            id=str(uuid4()),
            gateway_type=gateway,
            external_model=external,
            internal_model=internal,
            created_at=desk.now,
            updated_at=desk.now,
        )
        await work.connection.execute(
            query.on_conflict_do_update(
                index_elements=["gateway_type", "external_model"],
                set_={"internal_model": internal, "updated_at": desk.now},
            )
        )
        row = (await work.connection.execute(select(table).where(*this))).one()
        after = _mapping(row)
        await work.record(
            "mappings.set",
            external,
            id=after.id,
            before=None if before is None else _mapping(before),
            after=after,
        )
    return after


async def list_mappings(engine: AsyncEngine, page: Page) -> list[Mapping]:
    """By gateway and name."""
    query = paged(select(table), page, (table.c.gateway_type, table.c.external_model))
    async with reading(engine) as connection:
        return [_mapping(row) for row in await connection.execute(query)]


async def get_mapping(engine: AsyncEngine, id: str) -> Mapping:
    """Raises NotFound."""
    async with reading(engine) as connection:
        return await _find(connection, id)


async def unset_mapping(desk: Desk, id: str) -> Mapping:
    """Raises NotFound."""
    async with desk.writing() as work:
        found = await _find(work.connection, id)
        await work.connection.execute(delete(table).where(table.c.id == found.id))
        await work.record("mappings.unset", found.external_model, id=found.id, before=found)
    return found


async def _find(connection: AsyncConnection, id: str) -> Mapping:
    row = None
    if names.looks_like_id(id):
        row = (await connection.execute(select(table).where(table.c.id == id.lower()))).first()
    if row is None:
        raise NotFound(f"there is no model mapping {id!r}")
    return _mapping(row)


def _checked(model: str) -> str:
    model = names.check_model(model)
    if model.endswith("*"):
        raise UsageError(f"a mapping is of one name to one model, without *: {model!r}")
    return model


def _mapping(row: Any) -> Mapping:
    return Mapping(
        id=row.id,
        gateway=row.gateway_type,
        external_model=row.external_model,
        internal_model=row.internal_model,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
