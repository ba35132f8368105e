"""A mix of calls as people make them: whole answers, streams, hang-ups, failures."""

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

import httpx

from tests.e2e.gateway import CHAT, Someone, says

KINDS = ("json", "sse", "ndjson", "hang up", "fails", "cut")


@dataclass(slots=True)
class Told:
    """What the client knows of one call."""

    number: int
    kind: str
    status: int = 0
    complete: bool = False
    delivered: int = 0
    """Chunks with text that arrived before the client hung up."""


class Load:
    """`calls` of them, `at_once` at a time, chosen by `seed`."""

    def __init__(self, who: Someone, *, calls: int, at_once: int, seed: int) -> None:
        self._who = who
        self._at_once = at_once
        self._draw = random.Random(seed)  # noqa: S311
        self._numbers = iter(range(calls))
        self.told: list[Told] = []

    @property
    def done(self) -> int:
        return len(self.told)

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=self._at_once)
        base = self._who.gateway.url
        async with (
            httpx.AsyncClient(base_url=base, timeout=20, limits=limits) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for _ in range(self._at_once):
                tasks.create_task(self._caller(client))

    async def _caller(self, client: httpx.AsyncClient) -> None:
        for number in self._numbers:
            told = Told(number, self._draw.choice(KINDS))
            try:
                await self._call(client, told)
            except httpx.HTTPError:
                # Its gateway was killed: as a client would, it waits a moment.
                await asyncio.sleep(0.05)
            self.told.append(told)

    async def _call(self, client: httpx.AsyncClient, told: Told) -> None:
        tokens, leaves_after = self._draw.randint(1, 12), self._draw.randint(1, 8)
        behaviour: dict[str, Any] = {"tokens": tokens, "gap": self._draw.choice((0, 0.002, 0.01))}
        path, body = "/v1/chat/completions", {**CHAT, "max_tokens": 40, "stream": True}
        match told.kind:
            case "json":
                body["stream"] = False
            case "ndjson":
                path, body = "/api/chat", {**CHAT, "stream": True}
            case "hang up":
                behaviour |= {"tokens": 40, "gap": 0.005}
            case "fails":
                behaviour |= {"status": self._draw.choice((400, 500, 503))}
            case "cut":
                behaviour |= {"cut_after": self._draw.randint(0, tokens)}
        headers = {
            **self._who.headers, **says(**behaviour), "x-number": str(told.number),
            "content-type": "application/json",
        }  # fmt: skip
        content = json.dumps(body)
        async with client.stream("POST", path, content=content, headers=headers) as answer:
            told.status = answer.status_code
            async for line in answer.aiter_lines():
                if '"content":' not in line or "[DONE]" in line:
                    continue
                told.delivered += 1
                if told.kind == "hang up" and told.delivered >= leaves_after:
                    return
        told.complete = told.status == 200 and told.kind != "hang up"
