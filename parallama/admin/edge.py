"""Around every call: a bound for its body and its time, and one line in the log."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import Response

from parallama import identity
from parallama.admin.problems import response

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 256 * 1024


class Edge:
    """The whole service, as uvicorn sees it. `seconds` is how long a call may take."""

    def __init__(self, app: App, *, seconds: float, tell: bool) -> None:
        self._app = app
        self._seconds = seconds
        self._tell = tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # what else there is was not asked for
            return
        began = time.monotonic()
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def refuse(answer: Response) -> None:
            if not status:
                await answer(scope, receive, noting)

        try:
            async with asyncio.timeout(self._seconds):
                body = await _read(scope, receive)
                if isinstance(body, Response):
                    await refuse(body)
                else:
                    await self._app(scope, replaying(body, receive), noting)
        except TimeoutError:
            log.warning("call took too long", extra=_facts(scope))
            await refuse(response(504, "timeout", "This takes too long: ask for less at once."))
        except Exception:
            log.exception("call failed", extra=_facts(scope))
            await refuse(response(500, "internal_error", "Something is wrong here."))
        if self._tell:
            took = round(time.monotonic() - began, 4)
            log.info("call", extra={**_facts(scope), "status": status, "seconds": took})


def replaying(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, once."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def header(scope: Scope, name: str) -> str | None:
    for key, value in scope["headers"]:
        if key == name.encode():
            return str(value.decode("latin-1"))
    return None


async def _read(scope: Scope, receive: Receive) -> bytes | Response:
    """All of the body, or what is wrong with it."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return response(400, "incomplete_request", "The request ended before its body did.")
        part = message.get("body", b"")
        size += len(part)
        if size > LARGEST_BODY:
            return response(
                413,
                "request_too_large",
                f"The body is larger than {LARGEST_BODY // 1024} KiB.",
                headers={"connection": "close"},
            )
        parts.append(part)
        more = message.get("more_body", False)
    kind = (header(scope, "content-type") or "").partition(";")[0].strip().lower()
    if size and kind != "application/json":
        return response(
            415, "unsupported_media_type", "Send the body as JSON: content-type: application/json."
        )
    return b"".join(parts)


def _facts(scope: Scope) -> dict[str, Any]:
    """Of the path only what is ours: the rest is written by clients."""
    route = scope.get("route")
    return {
        "method": scope["method"],
        "route": getattr(route, "path", "none"),
        "user": identity.username(header(scope, identity.USERNAME) or "") or None,
        "request_id": header(scope, "x-request-id"),
    }
