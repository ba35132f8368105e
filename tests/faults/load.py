"""A mix of calls as people make them: whole answers, streams, hang-ups, failures."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.e2e.gateway import CHAT, Someone, says

KINDS = ("json", "sse", "ndjson", "hang up", "fails", "cut")
MOST_ANSWER = 40
"""Tokens that any call asks for at most."""


@dataclass(slots=True)
class Told:
    """What the client knows of one call."""

    number: int
    kind: str
    user_id: str
    request_id: str | None = None
    status: int = 0
    complete: bool = False
    delivered: int = 0
    """Chunks with text that arrived before the client hung up."""
    seconds: float = 0.0


class Load:
    """
    At least `calls` of them and until it is `enough`, `at_once` at a time, chosen by `seed`. Each
    is made by one of `people`, with the weights they have.
    """

    def __init__(
        self, people: Sequence[tuple[Someone, int]], *, calls: int, at_once: int, seed: int
    ) -> None:
        self._people = [who for who, _ in people]
        self._weights = [weight for _, weight in people]
        self._calls = calls
        self._at_once = at_once
        self._draw = random.Random(seed)  # noqa: S311
        self._begun = 0
        self.enough = False
        self.told: list[Told] = []

    @property
    def done(self) -> int:
        return len(self.told)

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=self._at_once)
        base = self._people[0].gateway.url
        async with (
            httpx.AsyncClient(base_url=base, timeout=20, limits=limits, trust_env=False) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for _ in range(self._at_once):
                tasks.create_task(self._caller(client))

    async def _caller(self, client: httpx.AsyncClient) -> None:
        while self._begun < self._calls or not self.enough:
            self._begun += 1
            (who,) = self._draw.choices(self._people, self._weights)
            told = Told(self._begun, self._draw.choice(KINDS), who.user_id)
            await self._call(client, who, told)
            self.told.append(told)

    async def _call(self, client: httpx.AsyncClient, who: Someone, told: Told) -> None:
        path, body, headers, leaves_after = self._drawn(who, told)
        while True:
            began = time.monotonic()
            try:
                return await _converse(client, path, body, headers, told, leaves_after)
            except httpx.ConnectError:
                if self.enough:
                    return
                await asyncio.sleep(0.1)  # Nobody is there: as a client would, it comes again.
            except httpx.HTTPError:
                return
            finally:
                told.seconds = time.monotonic() - began
                if told.status == 503 and told.kind != "fails":
                    await asyncio.sleep(0.1)

    def _drawn(self, who: Someone, told: Told) -> tuple[str, bytes, dict[str, str], int]:
        """Path, body, headers, and after how many chunks the client leaves; 0: it stays."""
        tokens = self._draw.choice((self._draw.randint(1, 12), MOST_ANSWER))
        behaviour: dict[str, Any] = {"tokens": tokens, "gap": self._draw.choice((0, 0.002, 0.005))}
        leaves_after = 0
        path, body = "/v1/chat/completions", {**CHAT, "max_tokens": MOST_ANSWER, "stream": True}
        match told.kind:
            case "json":
                body["stream"] = False
            case "ndjson":
                path, body = "/api/chat", {**CHAT, "options": {"num_predict": MOST_ANSWER}}
            case "hang up":
                behaviour |= {"tokens": MOST_ANSWER, "gap": 0.005}
                leaves_after = self._draw.randint(1, 8)
            case "fails":
                behaviour |= {"status": self._draw.choice((400, 500, 503))}
            case "cut":
                behaviour |= {"cut_after": self._draw.randint(0, tokens)}
        headers = {
            **who.headers, **says(**behaviour), "x-number": str(told.number),
            "content-type": "application/json",
        }  # fmt: skip
        return path, json.dumps(body).encode(), headers, leaves_after


async def _converse(
    client: httpx.AsyncClient,
    path: str,
    body: bytes,
    headers: dict[str, str],
    told: Told,
    leaves_after: int,
) -> None:
    async with client.stream("POST", path, content=body, headers=headers) as answer:
        told.status, told.request_id = answer.status_code, answer.headers.get("x-request-id")
        async for line in answer.aiter_lines():
            if '"content":' in line:
                told.delivered += 1
                if told.delivered == leaves_after:
                    return
    told.complete = told.status == 200
