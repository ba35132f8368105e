"""`/auth`: log in with a password, and stay so by refresh tokens."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field

from parallama.admin.shapes import Given
from parallama.admin.visit import Known, Open, Visit, address_of, office_of
from parallama.db.manage import people, sessions
from parallama.db.manage.people import User
from parallama.errors import UsageError

router = APIRouter(prefix="/auth", tags=["auth"])

_LONGEST = 1000

Secret = Annotated[str, Field(min_length=1, max_length=_LONGEST, json_schema_extra={"format": "password"})]  # fmt: skip  # noqa: E501
Visitor = Annotated[Visit, Depends(Known())]


class Login(Given):
    username: Annotated[str, Field(min_length=1, max_length=_LONGEST)]
    password: Secret


class Refresh(Given):
    refresh_token: Secret


class Logout(Given):
    refresh_token: Secret | None = Field(
        default=None, description="The session of this one, instead of the access token's."
    )
    everywhere: bool = Field(default=False, description="All sessions of the user.")


class PasswordChange(Given):
    current: Secret
    new: Secret


class Tokens(BaseModel):
    """Lives are in seconds. The refresh token is good for one use, which gives another one."""

    access_token: str
    token_type: str = "Bearer"  # noqa: S105
    expires_in: int
    refresh_token: str
    refresh_expires_in: int


class KeySet(BaseModel):
    """Public keys, as RFC 7517 has them."""

    keys: list[dict[str, Any]]


@router.post("/login", dependencies=[Depends(Open())])
async def login(given: Login, request: Request, response: Response) -> Tokens:
    """One answer for a wrong password, an unknown user and a disabled one."""
    office = office_of(request)
    address = address_of(request)
    async with office.desk_for_strangers(request) as desk:
        session = await office.sessions.login(
            desk, given.username, given.password, address=address or ""
        )
    return _tokens(session, response)


@router.post("/refresh", dependencies=[Depends(Open())])
async def refresh(given: Refresh, request: Request, response: Response) -> Tokens:
    """Another pair of tokens. Whoever uses a refresh token a second time ends its session."""
    office = office_of(request)
    async with office.desk_for_strangers(request) as desk:
        session = await office.sessions.refresh(desk, given.refresh_token)
    return _tokens(session, response)


@router.post("/logout", status_code=204)
async def logout(visit: Visitor, given: Logout | None = None) -> None:
    """End the session of this access token, that of a refresh token, or all."""
    given = given or Logout()
    settings = visit.office.config.authentication
    async with visit.working() as desk:
        if given.everywhere:
            await people.log_out(desk, visit.user_id)
        elif given.refresh_token is not None:
            await visit.office.sessions.logout(desk, given.refresh_token)
        elif visit.token_id is not None:
            await sessions.end_session(desk, visit.token_id, settings)
        elif visit.outside_token:
            raise UsageError(
                "this access token is of another issuer, where its session has to be ended: here "
                "it is good until it expires, unless `everywhere` ends all that were issued so far"
            )
        else:
            raise UsageError("a key has no session: name a refresh_token, or revoke the key")


@router.post("/password")
async def change_password(given: PasswordChange, visit: Visitor) -> User:
    """By who knows the current one. It ends all sessions."""
    async with visit.working() as desk:
        return await visit.office.sessions.change_password(
            desk,
            visit.user_id,
            current=given.current,
            new=given.new,
            address=visit.address or "",
        )


@router.get("/.well-known/jwks.json", dependencies=[Depends(Open())])
async def get_key_set(request: Request, response: Response) -> KeySet:
    """The public keys of our access tokens."""
    response.headers["cache-control"] = "public, max-age=300"
    return KeySet(**office_of(request).signing.keys().jwks())


def _tokens(session: sessions.Session, response: Response) -> Tokens:
    response.headers["cache-control"] = "no-store"
    return Tokens(
        access_token=session.access_token,
        expires_in=session.expires_in,
        refresh_token=session.refresh_token,
        refresh_expires_in=session.refresh_expires_in,
    )
