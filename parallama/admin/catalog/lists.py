"""Answers what the servers offer, as one caller may see it: a small ASGI application."""

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import unquote

from parallama import identity
from parallama.admin.catalog import merging
from parallama.admin.catalog.aliases import Aliases
from parallama.admin.catalog.asking import Answer, Unanswered
from parallama.admin.catalog.catalog import MODELS, VERSION, Catalog
from parallama.admin.catalog.kept import Look
from parallama.admin.catalog.merging import Unreadable, View
from parallama.dialects import OLLAMA, content_type, refusal
from parallama.identity import Viewer

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CACHE = "x-parallama-cache"

OWN_WORDS = {"x-content-type-options": "nosniff"}
"""On what no server said."""

_ONE = f"{MODELS}/"
_SHOW = "/api/show"
_LARGEST_QUESTION = 1 << 16


class Refused(Exception):
    """An answer that is none, to be said in the caller's dialect."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Lists:
    """`/api/tags`, `/api/ps`, `/api/version`, `/api/show`, `/v1/models` and one of them."""

    def __init__(self, catalog: Catalog, aliases: Aliases) -> None:
        self._catalog = catalog
        self._aliases = aliases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = headers_of(scope)
        viewer = identity.viewer(told)
        if viewer is None or len(viewer.gateways) != 1:  # Envoy lets nobody come so far
            raise RuntimeError("a list is asked for by nobody")
        more: dict[str, str] = {}
        try:
            look = await self._look(viewer, scope["method"], receive)
            answer = look.answer
            cache = "fresh" if look.fresh else "stale"
            more = {"age": str(int(look.age)), CACHE: cache}
        except Refused as error:
            answer, more = _refusal(viewer.dialect, told, error), OWN_WORDS
        except (Unanswered, Unreadable):
            answer = _refusal(viewer.dialect, told, _AWAY)
            more = {"retry-after": "1", **OWN_WORDS}
        except Exception:
            log.exception("list not answered", extra={"list": _name(viewer)})
            answer, more = _refusal(viewer.dialect, told, _BROKEN), OWN_WORDS
        await respond(send, answer, more)

    async def _look(self, viewer: Viewer, method: str, receive: Receive) -> Look:
        (gateway,) = viewer.gateways
        if viewer.endpoint == _SHOW:
            if method != "POST":
                raise Refused(405, "method_not_allowed", f"{method} is not allowed here.")
            return await self._catalog.show(gateway, await _question(receive))
        named = None
        path = viewer.endpoint
        if path.startswith(_ONE):
            path, named = MODELS, unquote(path.removeprefix(_ONE))
        try:
            look = await self._catalog.look(gateway, path)
        except LookupError:
            message = "This gateway offers no such endpoint."
            raise Refused(404, "unknown_endpoint", message) from None
        if look.answer.status != 200 or path == VERSION:
            return look
        view = View(viewer.models, await self._aliases.of(gateway))
        body = look.answer.body
        if named is None:
            seen = merging.shown(body, view)
        else:
            entry = merging.one(body, view, named)
            if entry is None:
                raise unknown_model(viewer.dialect, named)
            seen = merging.text(entry)
        return Look(Answer(200, look.answer.content_type, seen), look.age, look.fresh)


def unknown_model(dialect: str, model: str) -> Refused:
    """The same words for one that is hidden: those of authz."""
    if dialect == OLLAMA:
        return Refused(404, "model_not_found", f'model "{model}" not found, try pulling it first')
    message = f"The model '{model}' does not exist or you do not have access to it."
    return Refused(404, "model_not_found", message)


_AWAY = Refused(
    503,
    "upstream_unavailable",
    "The model server does not say right now what it offers: try again in a moment.",
)
_BROKEN = Refused(500, "internal_error", "Something is wrong here: tell your administrator.")


def headers_of(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def respond(send: Send, answer: Answer, more: Mapping[str, str]) -> None:
    """To a HEAD uvicorn sends no more than the headers."""
    headers = {"content-length": str(len(answer.body)), **more}
    if answer.content_type:
        headers["content-type"] = answer.content_type
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})
    await send({"type": "http.response.body", "body": answer.body})


def _refusal(dialect: str, told: Mapping[str, str], error: Refused) -> Answer:
    id = told.get("x-request-id", "")
    body = refusal(dialect, error.status, error.code, error.message, request_id=id)
    return Answer(error.status, content_type(dialect), body)


async def _question(receive: Receive) -> bytes:
    """The whole body."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "incomplete_request", "The request ended before its body did.")
        body += message.get("body", b"")
        if len(body) > _LARGEST_QUESTION:
            raise Refused(413, "request_too_large", "The question for one model is too large.")
        more = message.get("more_body", False)
    return bytes(body)


def _name(viewer: Viewer) -> str:
    """Without what clients write."""
    path = viewer.endpoint
    return f"{viewer.gateways[0]} {MODELS if path.startswith(_ONE) else path}"
