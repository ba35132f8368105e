"""
The description of the API for programs.

`python -m parallama.admin.openapi docs/openapi.json` writes it; a test compares.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from parallama.admin.visit import Known, Needs, Open

_ABOUT = """\
Users, keys, roles, limits, usage and the record of changes. Every call but those to log in carries
a key or an access token. Times are RFC 3339, amounts of money are text, unknown fields are refused,
and every error is a problem (RFC 9457) whose `code` stays. See docs/admin-api.md.
"""
_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}
_REFUSED = {
    "description": "A problem.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
_ONCE = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Whoever asks again with the same one gets the first answer.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
_IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "description": "An ETag: the change is made only where it is still so.",
    "schema": {"type": "string"},
}


def asked(route: APIRoute) -> Needs | Known | Open | None:
    """What a route asks of its caller; None where it does not say."""
    found = [each for each in _calls(route.dependant) if isinstance(each, Needs | Known | Open)]
    return found[0] if len(found) == 1 else None


def routes(app: FastAPI) -> list[APIRoute]:
    return [route for route in app.routes if isinstance(route, APIRoute)]


def describe(app: FastAPI) -> dict[str, Any]:
    told = get_openapi(title=app.title, version=app.version, description=_ABOUT, routes=app.routes)
    schemas = told["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Problem"] = _PROBLEM
    told["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for route in routes(app):
        if route.include_in_schema:
            for method in route.methods or ():
                _complete(told["paths"][route.path][method.lower()], method, route)
    return told


def text(app: FastAPI) -> str:
    return json.dumps(describe(app), indent=1, ensure_ascii=False) + "\n"


def _complete(operation: dict[str, Any], method: str, route: APIRoute) -> None:
    operation["operationId"] = route.name
    operation["responses"].pop("422", None)
    operation["responses"]["default"] = _REFUSED
    match asked(route):
        case Needs() as needed:
            operation["x-permission"] = needed.permission
            operation["x-own"] = needed.own
            operation["security"] = [{"bearer": []}]
        case Known():
            operation["security"] = [{"bearer": []}]
    parameters = operation.get("parameters", [])
    under_admin = route.path.startswith("/admin/")
    if under_admin and method == "POST":
        parameters = [*parameters, _ONCE]
    if under_admin and method != "GET" and "{" in route.path:
        parameters = [*parameters, _IF_MATCH]
    if parameters:
        operation["parameters"] = parameters


def _calls(dependant: Dependant) -> Iterator[Any]:
    for each in dependant.dependencies:
        yield each.call
        yield from _calls(each)


if __name__ == "__main__":
    from parallama.admin.app import api

    for name in sys.argv[1:]:
        Path(name).write_text(text(api()), "utf-8")
