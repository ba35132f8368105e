"""
`Idempotency-Key`: who asks a second time, because no answer came, gets the first one's answer.

What was answered is kept in Redis for a day, without secrets.
"""

import hashlib
import json
import re
import secrets
from contextlib import suppress
from typing import Any

from starlette.responses import Response

from parallama import identity
from parallama.admin.edge import App, Message, Receive, Scope, Send, header, replaying
from parallama.admin.problems import response
from parallama.errors import Unavailable
from parallama.pipeline import Pipeline, Script

SECONDS = 24 * 3600
PREFIX = "admin:once:"

SECRETS = ("key",)
"""Fields of answers that are shown once and kept nowhere."""

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_BEGUN = "begun"


_BEGIN = Script.load("parallama.admin", "begin.lua")
_END = Script.load("parallama.admin", "end.lua")
SCRIPTS = (_BEGIN, _END)


class Once:
    """
    Keeps what is answered to a POST with the header, by caller, path and key.

    Only a success is kept: what was refused changed nothing, and may be tried again. Where a first
    call was begun and nobody knows how it ended, the second one is refused, for it might be done
    twice.
    """

    def __init__(self, app: App, redis: Pipeline) -> None:
        self._app = app
        self._redis = redis

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = header(scope, "idempotency-key") if scope["method"] == "POST" else None
        user = header(scope, identity.USER)
        if key is None or user is None or not scope["path"].startswith("/admin/"):
            await self._app(scope, receive, send)
            return
        body = (await receive())["body"]
        answer = await self._once(scope, body, receive, key, user)
        await answer(scope, receive, send)

    async def _once(
        self, scope: Scope, body: bytes, receive: Receive, key: str, user: str
    ) -> Response:
        if not _KEY.fullmatch(key):
            return response(
                400,
                "invalid_idempotency_key",
                "An Idempotency-Key has 1 to 255 visible ASCII characters.",
            )
        place = PREFIX + _digest(user, scope["path"], key)
        digest = _digest(scope["query_string"].decode("latin-1"), body.decode("latin-1"))
        mine = f"{_BEGUN} {digest} {secrets.token_hex(8)}"
        try:
            found = _text(await self._redis.run(_BEGIN, [place], [mine, SECONDS]))
        except Unavailable:
            return response(
                503,
                "service_unavailable",
                "It cannot be made sure right now that this is done only once: try again.",
            )
        if found != mine:
            return _again(found, digest)
        caught = _Caught()
        done = False
        try:
            await self._app(scope, replaying(body, receive), caught.take)
            done = 200 <= caught.status < 300
        finally:
            await self._end(place, caught.kept(digest) if done else None, caught.status)
        return caught.answer()

    async def _end(self, place: str, kept: str | None, status: int) -> None:
        """Without an answer nobody knows what was done, and that stays on record."""
        with suppress(Unavailable):  # it stays begun then, and a second one is refused
            if kept is not None or 400 <= status < 500:
                await self._redis.run(_END, [place], [kept or "", SECONDS])


class _Caught:
    """An answer on its way out."""

    def __init__(self) -> None:
        self.status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = b""

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._headers = list(message["headers"])
        else:
            self._body += message.get("body", b"")

    def answer(self) -> Response:
        answer = Response(self._body, self.status)
        answer.raw_headers = self._headers
        return answer

    def kept(self, digest: str) -> str:
        told: Any = json.loads(self._body) if self._body else None
        if isinstance(told, dict):
            told |= {name: None for name in SECRETS if name in told}
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in self._headers
            if name in (b"etag", b"location")
        }
        text = json.dumps({"status": self.status, "headers": headers, "body": told})
        return f"{digest} {text}"


def _again(stored: str, digest: str) -> Response:
    first, _, rest = stored.partition(" ")
    begun = first == _BEGUN
    if (rest.partition(" ")[0] if begun else first) != digest:
        return response(
            422, "idempotency_key_reused", "This Idempotency-Key was used for another request."
        )
    if begun:
        return response(
            409,
            "outcome_unknown",
            "The first request with this Idempotency-Key has not ended, or nobody knows how: look "
            "whether it was carried out; if not, use another key.",
        )
    told = json.loads(rest)
    body = b"" if told["body"] is None else json.dumps(told["body"]).encode()
    headers = {**told["headers"], "idempotency-replayed": "true"}
    return Response(body, told["status"], headers=headers, media_type="application/json")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _digest(*parts: str) -> str:
    text = json.dumps(parts).encode()
    return hashlib.sha256(text).hexdigest()
