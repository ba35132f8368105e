"""`/me` and `/auth/me`: about the caller alone."""

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from parallama.admin.quota import quotas
from parallama.admin.shapes import Quotas
from parallama.admin.visit import Known, Visit, needs
from parallama.db.manage import people
from parallama.db.manage.people import User

router = APIRouter(tags=["me"])


class Me(BaseModel):
    """`permissions`: what both the user and the credential of this call may do."""

    user: User
    credential: str
    permissions: list[str]


@router.get("/auth/me")
async def get_me(visit: Annotated[Visit, Depends(Known())]) -> Me:
    """Who calls, by which credential, and what both may do."""
    return Me(
        user=await people.get_user(visit.engine, visit.user_id),
        credential=visit.credential,
        permissions=sorted(visit.permissions),
    )


@router.get("/me/quota")
async def get_own_quota(visit: Annotated[Visit, needs("limits:read", own=True)]) -> Quotas:
    """What is left of the caller's limits, and when each starts again."""
    return await quotas(visit.office, visit.user_id, visit.key_id)
