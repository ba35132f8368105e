"""Model mappings: the names that clients may use, and the models that they mean."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from parallama.db import names
from parallama.db.manage.engine import reading
from parallama.db.manage.pages import Page, paged
from parallama.db.manage.tables import model_mappings as table
from parallama.desk import Desk
from parallama.errors import NotFound, UsageError
from parallama.mappings import Table, check_name, in_the_way, merged, plain, wrong_with
from parallama.roles import GATEWAYS

_ALONE = "LOCK TABLE model_mappings IN SHARE ROW EXCLUSIVE MODE"


@dataclass(frozen=True, slots=True)
class Mapping:
    """Who asks this gateway for `external_model` means `internal_model`."""

    id: str
    gateway: str
    external_model: str
    internal_model: str
    created_at: datetime
    updated_at: datetime


async def set_mapping(
    desk: Desk,
    gateway: str,
    external: str,
    internal: str,
    *,
    configured: Table = MappingProxyType({}),
    default: str | None = None,
) -> Mapping:
    """
    In place of the one that the name had on this gateway, if any, under whatever spelling.

    `configured` are the mappings of this gateway that the configuration has, and `default` is its
    model for those who name none. Raises UsageError.
    """
    check_gateway(gateway)
    external, internal = check_name(external), check_name(internal)
    async with desk.writing() as work:
        # Two that are made at once may not make a chain.
        if desk.engine.dialect.name == "postgresql":
            await work.connection.execute(text(_ALONE))
        rows = await _of_gateway(work.connection, gateway)
        stored = {row.external_model: row.internal_model for row in rows}
        known = merged(configured, stored)
        if wrong := wrong_with(known, external, internal, default):
            raise UsageError(f"{external!r} {wrong}")
        if other := in_the_way(known, external):
            raise UsageError(
                f"{other!r} means {external!r}, and a mapping is one step: map {other!r} to "
                f"{internal!r} first"
            )
        before = next((_mapping(row) for row in rows if _same(row, external)), None)
        after = replace(
            before or Mapping(str(uuid4()), gateway, external, internal, desk.now, desk.now),
            external_model=external,
            internal_model=internal,
            updated_at=desk.now,
        )
        values = asdict(after)
        values["gateway_type"] = values.pop("gateway")
        query = delete(table).where(table.c.id == after.id)
        await work.connection.execute(query)
        await work.connection.execute(insert(table).values(**values))
        await work.record("mappings.set", external, id=after.id, before=before, after=after)
        work.changed("mappings")
    return after


async def list_mappings(engine: AsyncEngine, page: Page) -> list[Mapping]:
    """By gateway and name."""
    query = paged(select(table), page, (table.c.gateway_type, table.c.external_model))
    async with reading(engine) as connection:
        return [_mapping(row) for row in await connection.execute(query)]


async def list_all(engine: AsyncEngine) -> list[Mapping]:
    """By gateway and name."""
    query = select(table).order_by(table.c.gateway_type, table.c.external_model)
    async with reading(engine) as connection:
        return [_mapping(row) for row in await connection.execute(query)]


async def get_mapping(engine: AsyncEngine, id: str) -> Mapping:
    """Raises NotFound."""
    async with reading(engine) as connection:
        return await _find(connection, id)


async def find_mapping(engine: AsyncEngine, gateway: str, external: str) -> Mapping:
    """By its name, in any spelling. Raises NotFound."""
    check_gateway(gateway)
    async with reading(engine) as connection:
        for row in await _of_gateway(connection, gateway):
            if _same(row, external):
                return _mapping(row)
    raise NotFound(f"the database maps no {external!r} on {gateway}: see `parallama models list`")


async def unset_mapping(desk: Desk, id: str) -> Mapping:
    """Raises NotFound."""
    async with desk.writing() as work:
        found = await _find(work.connection, id)
        await work.connection.execute(delete(table).where(table.c.id == found.id))
        await work.record("mappings.unset", found.external_model, id=found.id, before=found)
        work.changed("mappings")
    return found


def check_gateway(gateway: str) -> None:
    """Raises UsageError."""
    if gateway not in GATEWAYS:
        raise UsageError(f"there is no gateway {gateway!r}: the gateways are {', '.join(GATEWAYS)}")


async def _of_gateway(connection: AsyncConnection, gateway: str) -> Sequence[Any]:
    query = select(table).where(table.c.gateway_type == gateway).order_by(table.c.external_model)
    return (await connection.execute(query)).all()


def _same(row: Any, external: str) -> bool:
    return plain(row.external_model) == plain(external)


async def _find(connection: AsyncConnection, id: str) -> Mapping:
    row = None
    if names.looks_like_id(id):
        row = (await connection.execute(select(table).where(table.c.id == id.lower()))).first()
    if row is None:
        raise NotFound(f"there is no model mapping {id!r}")
    return _mapping(row)


def _mapping(row: Any) -> Mapping:
    return Mapping(
        id=row.id,
        gateway=row.gateway_type,
        external_model=row.external_model,
        internal_model=row.internal_model,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
