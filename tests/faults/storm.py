"""A storm of cancels: nine of ten streams are abandoned; each is charged what was delivered."""

import asyncio
import json
import random
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from parallama.limits import Window
from tests.e2e.gateway import CHAT, Someone, says
from tests.faults.company import PLENTY
from tests.faults.databases import Books, Row
from tests.faults.judging import look_at_counters
from tests.faults.outcome import Outcome
from tests.faults.story import prepared, settle_down, stop
from tests.standin import Seen, StandIn
from tests.supervisor.supervised import up

AT_ONCE = 200
LENGTH = 100
LEAVE_AFTER = (1, 50)
PACES = (0, 0.001, 0.005, 0.02)
FLAVOURS = ("ollama", "openai", "llamacpp", "cumulative")

# How a client leaves. One that shuts its side still counts what was on its way to it; one that
# slams the door does not; and to one that does so in a pause of the model nothing was on its way.
SHUTS, SLAMS, SLAMS_IN_A_PAUSE, STAYS = "shuts", "slams", "slams in a pause", "stays"


@dataclass(slots=True)
class Stream:
    """What its client knows of it."""

    how: str
    what: str
    leave_after: int
    request_id: str = ""
    status: int = 0
    events: int = 0
    delivered: int = 0
    """Events with text."""


@dataclass
class Storm:
    """`calls` streams of one user, `at_once` at a time."""

    who: Someone
    calls: int
    at_once: int
    draw: random.Random
    streams: list[Stream] = field(default_factory=list)

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=self.at_once, max_keepalive_connections=20)
        base = self.who.gateway.url
        left = iter(range(self.calls))

        async def caller(client: httpx.AsyncClient) -> None:
            for _ in left:
                await self._stream(client)

        async with (
            httpx.AsyncClient(base_url=base, timeout=60, limits=limits, trust_env=False) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for _ in range(self.at_once):
                tasks.create_task(caller(client))

    async def _stream(self, client: httpx.AsyncClient) -> None:
        how = STAYS
        if self.draw.random() < 0.9:
            how = self.draw.choice((SHUTS, SLAMS, SLAMS_IN_A_PAUSE))
        leave_after = self.draw.randint(*LEAVE_AFTER)
        behaviour: dict[str, Any] = {"tokens": LENGTH, "gap": self.draw.choice(PACES)}
        if how == SLAMS_IN_A_PAUSE:
            behaviour["hold_at"] = leave_after
        path, body = "/api/chat", CHAT
        if self.draw.random() < 0.5:
            path, body = "/v1/chat/completions", {**CHAT, "stream": True}
            behaviour["flavour"] = self.draw.choice(FLAVOURS)
        what = f"{path} {behaviour.get('flavour', '')} {behaviour['gap']}"
        stream = Stream(how, what, leave_after)
        self.streams.append(stream)
        headers = {
            **self.who.headers, **says(**behaviour), "content-type": "application/json"
        }  # fmt: skip
        asked = client.stream("POST", path, content=json.dumps(body), headers=headers)
        try:
            await _listen(asked, stream)
        except httpx.RemoteProtocolError:
            assert stream.how == SHUTS, stream


async def _listen(asked: Any, stream: Stream) -> None:
    async with asked as answer:
        stream.status, stream.request_id = answer.status_code, answer.headers["x-request-id"]
        async for line in answer.aiter_lines():
            stream.events += bool(line)
            stream.delivered += '"content":"' in line and '"content":""' not in line
            if stream.events != stream.leave_after or not line or stream.how == STAYS:
                continue
            if stream.how != SHUTS:
                return
            connection = answer.extensions["network_stream"].get_extra_info("socket")
            connection.shutdown(socket.SHUT_WR)


def storm(
    folder: Path,
    books: Books,
    *,
    calls: int,
    at_once: int = AT_ONCE,
    seed: int = 1,
    hard: bool = False,
) -> Outcome:
    """All streams, and how each was charged."""
    began = time.monotonic()
    outcome = Outcome("storm", books.name)
    with StandIn() as upstream:
        books.settle_in(prepared(folder, upstream, hard=hard))
        with up(folder, upstream) as gateway:
            who = gateway.someone(tokens=PLENTY, window=Window.MONTH)
            told = Storm(who, calls, at_once, random.Random(seed))  # noqa: S311
            asyncio.run(told.run())
            settle_down(outcome, gateway)
            rows = books.rows()
            outcome.calls, outcome.rows = len(told.streams), len(rows)
            _judge(outcome, told.streams, upstream.requests, rows)
            look_at_counters(outcome, gateway, rows)
            stop(outcome, gateway)
    outcome.seconds = time.monotonic() - began
    return outcome


def _judge(outcome: Outcome, streams: list[Stream], seen: list[Seen], rows: list[Row]) -> None:
    times = Counter(row.request_id for row in rows)
    by_id = {row.request_id: row for row in rows}
    outcome.doubled += [id for id, count in times.items() if count > 1]
    emitted = {at.header("x-request-id"): at for at in seen}
    offs: Counter[tuple[str, int]] = Counter()
    cut = 0
    for stream in streams:
        row, at = by_id.get(stream.request_id), emitted.get(stream.request_id)
        if row is None or at is None:
            outcome.lost.append(str(stream))
            continue
        cut += at.client_gone
        off = _off(stream, row, at)
        offs[stream.how, off] += 1
        if off > (0 if stream.how == STAYS else 1):
            outcome.inexact.append(f"{stream}: {row}, {at.emitted} were emitted, off by {off}")
    if cut < len(streams) / 2:
        outcome.untried.append(f"only {cut} streams ended before the model had")
    told = [
        f"{cut} cut",
        *(f"{count} {how}, off by {off}" for (how, off), count in sorted(offs.items())),
    ]
    outcome.notes.append("; ".join(told))


def _off(stream: Stream, row: Row, seen: Seen) -> int:
    """By how many tokens the charge is beside what was delivered."""
    if stream.how == STAYS:
        return abs(row.tokens - seen.prompt_tokens - seen.emitted)
    charged = row.completion or 0
    if stream.how == SHUTS:
        return abs(charged - stream.delivered)
    if stream.how == SLAMS_IN_A_PAUSE:
        return abs(charged - seen.emitted)
    # It cannot know what was on its way to it.
    return max(stream.delivered - charged, charged - seen.emitted, 0)
