"""Who answers a call to this process: lists, discovery, or the admin API."""

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable

from parallama import identity
from parallama.admin.catalog import discovery
from parallama.admin.catalog.asking import Answer
from parallama.admin.catalog.lists import OWN_WORDS, App, Receive, Scope, Send, respond
from parallama.dialects import PROBLEM, content_type, problem
from parallama.errors import ParallamaError

log = logging.getLogger(__name__)

_ENDPOINT = identity.ENDPOINT.encode()
_API = ("/admin/", "/auth/", "/me/")


class Front:
    """The whole service, as uvicorn sees it. What is None is not offered."""

    def __init__(self, *, lists: App, page: App, discovery: bool, api: App | None) -> None:
        self._lists = lists
        self._page = page
        self._discovery = discovery
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # what else there is was not asked for
            return
        app = self._choose(scope)
        if app is None:
            return await respond(send, _ABSENT, OWN_WORDS)
        try:
            await app(scope, receive, send)
        except ParallamaError as error:
            log.warning("call cannot be answered", extra={"cause": str(error)})
            await respond(send, _AWAY, {"retry-after": "1", **OWN_WORDS})
        except Exception:
            log.exception("call failed")
            await respond(send, _BROKEN, OWN_WORDS)

    def _choose(self, scope: Scope) -> App | None:
        path = scope["path"]
        if path == discovery.STATUS:
            return self._page
        if path == discovery.PATH:
            return self._page if self._discovery else None
        if any(name == _ENDPOINT for name, _ in scope["headers"]):
            return self._lists
        # Whatever else asks, such as a health check, does not have it loaded.
        return self._api if path.startswith(_API) else None


class Later:
    """The admin API, made when it is called first: it is larger than all the rest together."""

    def __init__(self, make: Callable[[], Awaitable[App]]) -> None:
        self._make = make
        self._made: App | None = None
        self._making = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ParallamaError where it cannot be made now; the next call tries again."""
        if self._made is None:
            async with self._making:
                if self._made is None:
                    self._made = await self._make()
                    gc.collect()
                    gc.freeze()
        await self._made(scope, receive, send)


def _problem(status: int, code: str, detail: str) -> Answer:
    return Answer(status, content_type(PROBLEM), problem(status, code, detail))


_ABSENT = _problem(404, "not_found", "This gateway does not offer that.")
_AWAY = _problem(
    503, "service_unavailable", "This cannot be done right now: try again in a moment."
)
_BROKEN = _problem(500, "internal_error", "Something is wrong here: tell your administrator.")
