"""What went wrong, as problem+json (RFC 9457)."""

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from parallama.db.manage import sessions
from parallama.dialects import PROBLEM, content_type, problem
from parallama.errors import (
    Conflict,
    NotFound,
    ParallamaError,
    Stale,
    UsageError,
)
from parallama.lockout import Locked

log = logging.getLogger(__name__)

# The one that fits best, first.
_STATUS: tuple[tuple[type[ParallamaError], int, str], ...] = (
    (NotFound, 404, "not_found"),
    (Conflict, 409, "conflict"),
    (Stale, 412, "changed_meanwhile"),
    (UsageError, 422, "not_acceptable_value"),
    (sessions.Refused, 401, "not_accepted"),
)
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_RETRY_SECONDS = "1"


class Refused(Exception):
    """An answer that is no success, in words for the caller."""

    def __init__(
        self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.headers = status, code, detail, headers


def forbidden(detail: str) -> Refused:
    return Refused(403, "permission_denied", detail)


def response(
    status: int,
    code: str,
    detail: str,
    *,
    errors: Sequence[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    return Response(
        problem(status, code, detail, errors=errors),
        status,
        headers=dict(headers or {}),
        media_type=content_type(PROBLEM),
    )


def install(app: FastAPI) -> None:
    """Every error of `app` is one of these."""
    for kind, handler in (
        (Refused, _refused),
        (ParallamaError, _ours),
        (RequestValidationError, _invalid),
        (DataError, _unstorable),
        (HTTPException, _http),
        (Exception, _broken),
    ):
        app.add_exception_handler(kind, handler)


async def _refused(_: Request, error: Any) -> Response:
    return response(error.status, error.code, error.detail, headers=error.headers)


async def _ours(_: Request, error: Exception) -> Response:
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return response(status, code, f"{_sentence(str(error))}.")
    if isinstance(error, Locked):
        headers = {"retry-after": str(error.seconds)}
        return response(429, "too_many_attempts", f"{_sentence(str(error))}.", headers=headers)
    # The cause is not the caller's concern.
    log.warning("call cannot be answered", extra={"cause": str(error)})
    return response(
        503,
        "service_unavailable",
        "This cannot be done right now: try again in a moment.",
        headers={"retry-after": _RETRY_SECONDS},
    )


async def _invalid(_: Request, error: Any) -> Response:
    """The request is not of the form that the endpoint takes."""
    errors = [{"field": _field(each["loc"]), "message": _message(each)} for each in error.errors()]
    told = "; ".join(
        f"{each['field']}: {each['message']}" if each["field"] else each["message"]
        for each in errors[:3]
    )
    return response(400, "invalid_request", f"The request is not acceptable: {told}", errors=errors)


async def _unstorable(_: Request, error: Exception) -> Response:
    return response(
        400, "invalid_request", "A value is not one that the database can hold, such as a NUL."
    )


async def _http(request: Request, error: Any) -> Response:
    status = HTTPStatus(error.status_code)
    code = _CODES.get(status, status.phrase.lower().replace(" ", "_"))
    headers = error.headers
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers = {"allow": ", ".join(sorted(_methods(request)))}
    return response(status, code, _words(status), headers=headers)


def _methods(request: Request) -> set[str]:
    """Of all endpoints at this path."""
    found = (
        route.methods or set()
        for route in request.app.routes
        if isinstance(route, APIRoute) and route.matches(request.scope)[0] is not Match.NONE
    )
    return set().union(*found)


async def _broken(_: Request, error: Exception) -> Response:
    return response(500, "internal_error", "Something is wrong here: tell your administrator.")


def _words(status: int) -> str:
    match status:
        case 404:
            return "There is no such endpoint: /admin/openapi.json lists all."
        case 405:
            return "This endpoint has other methods: see `allow`."
        case 400:
            return "The body is not JSON that can be read."
    return HTTPStatus(status).phrase + "."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _field(place: tuple[Any, ...]) -> str:
    """Without where it stands: `body`, `query`, `path`, `header`."""
    return ".".join(str(step) for step in place[1:])


def _message(error: Mapping[str, Any]) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "there is no such field"
        case "json_invalid":
            return "the body is not JSON"
        case "missing":
            return "is missing"
        case "model_attributes_type":
            return "is no JSON object"
    return str(error["msg"])
