"""The way to one server: calls go out, answers come in, and what happens when it breaks."""

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pkgutil import get_data
from typing import Any

import hiredis

from parallama.errors import Unavailable
from parallama.nodes import explain
from parallama.resp import Connection, pack

PAUSE = 0.05
"""Seconds between two attempts at what just failed."""

# Seconds that a patient call waits for company: it saves both sides a turn.
_PATIENCE = 0.005

# Answers that one server may owe us. What comes on top fails at once: memory is bounded.
_MOST_UNANSWERED = 10_000


@dataclass(frozen=True, slots=True)
class Script:
    text: str
    sha: str

    @classmethod
    def load(cls, package: str, *names: str, head: str = "") -> "Script":
        """The files of these names in `package`, below `head`."""
        text = head + "".join((get_data(package, name) or b"").decode() for name in names)
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@dataclass(eq=False, slots=True)
class Call:
    """`args` begins with the number of keys, then the keys."""

    script: Script
    args: tuple[str | int, ...]
    answer: asyncio.Future[Any]
    deadline: float
    patient: bool
    retried: bool = False
    moves: int = 0  # how often a cluster sent it elsewhere
    asking: bool = False  # whether its slot is on the way to the server that is asked
    as_text: bool = False  # whether that server did not know the script
    message: bytes = b""  # what is sent, where that was made before

    def packed(self) -> bytes:
        if self.as_text:
            return pack(("EVAL", self.script.text, *self.args))
        return self.message or pack(("EVALSHA", self.script.sha, *self.args))

    def fail(self, why: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(Unavailable(f"the counters cannot be used: {why}"))


class _Link(asyncio.Protocol):
    """One connection: replies come in the order of the calls."""

    def __init__(
        self,
        transport: Any,
        on_error: Callable[[Call, str], None],
        on_lost: Callable[["_Link"], None],
    ) -> None:
        self.unanswered: deque[Call] = deque()
        self._on_error = on_error
        self._on_lost = on_lost
        self._replies = hiredis.Reader()
        self._transport = transport
        self._unsent: list[bytes] = []
        self._flush: asyncio.TimerHandle | None = None
        transport.set_protocol(self)

    def send(self, call: Call) -> None:
        if len(self.unanswered) >= _MOST_UNANSWERED:
            call.fail("too many calls wait for an answer")
            return
        if call.asking:
            self._say_asking(call)
        self.unanswered.append(call)
        self._unsent.append(call.packed())
        if not call.patient:
            self.flush()
        elif self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(_PATIENCE, self.flush)

    def flush(self) -> None:
        """Everything that still waits goes out."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        if self._unsent:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()

    def data_received(self, data: bytes) -> None:
        self._replies.feed(data)
        while self.unanswered and (reply := self._replies.gets()) is not False:
            if isinstance(reply, hiredis.PushNotification):
                continue
            call = self.unanswered.popleft()
            if isinstance(reply, hiredis.ReplyError):
                self._on_error(call, str(reply))
            elif not call.answer.done():
                call.answer.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(self)

    def close(self) -> list[Call]:
        """Hang up. Returns the calls that were not answered."""
        if self._flush is not None:
            self._flush.cancel()
        self._transport.abort()
        left = list(self.unanswered)
        self.unanswered.clear()
        return left

    def _say_asking(self, call: Call) -> None:
        said = asyncio.get_running_loop().create_future()
        said.cancel()  # its own answer is of no interest
        self.unanswered.append(Call(call.script, (), said, call.deadline, patient=False))
        self._unsent.append(pack(("ASKING",)))


class Lane:
    """The way to one server: connects when a call needs it, and again when the link was lost."""

    def __init__(
        self,
        connection: Connection,
        scripts: Sequence[Script],
        *,
        timeout: float,
        on_error: Callable[[Call, str], None],
        on_left: Callable[[list[Call], str, bool], None],
        stray: Callable[[Connection], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """
        `on_error` is given what a server refuses for reasons of its own. `on_left` is given calls
        that were not answered, why, and whether they may have run.
        `stray` ends when the connection works and leads to the wrong server.
        """
        # It connects and logs in. Its streams would cost too much: a _Link takes their place.
        self._connection = connection
        self._scripts = scripts
        self._timeout = timeout
        self._on_error = on_error
        self._on_left = on_left
        self._stray = stray
        self._link: _Link | None = None
        self._waiting: deque[Call] = deque()
        self._opening: asyncio.Task[None] | None = None
        self._opened_at = -PAUSE
        self._lookout: asyncio.Task[None] | None = None

    def take(self, call: Call) -> None:
        if self._link is not None:
            self._link.send(call)
        elif len(self._waiting) >= _MOST_UNANSWERED:
            call.fail("too many calls wait for a connection")
        else:
            self._waiting.append(call)
            if self._opening is None:
                self._opening = asyncio.create_task(self._open(), name="counters connection")

    def nudge(self, call: Call) -> None:
        """Where it would be the only one on its way."""
        if self._link is not None and not self._link.unanswered:
            self._link.send(call)

    def under_way(self) -> list[Call]:
        return [*(self._link.unanswered if self._link else ()), *self._waiting]

    def is_stuck(self, now: float) -> bool:
        """Whether the next answer is late: a server that says nothing may be dead."""
        if self._link is None or not self._link.unanswered:
            return False
        return self._link.unanswered[0].deadline <= now

    def hang_up(self, why: str, *back: Call) -> None:
        """Leave what is not answered, with `back` before it. The next call connects anew."""
        link, self._link = self._link, None
        if self._lookout is not None:
            self._lookout.cancel()
            self._lookout = None
        left = link.close() if link is not None else []
        if back or left:
            self._on_left([*back, *left], why, True)

    async def aclose(self) -> None:
        if self._opening is not None:
            await self._opening
        self.hang_up("closed")
        self._connection.close()

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await asyncio.sleep(self._opened_at + PAUSE - loop.time())
            self._opened_at = loop.time()
            async with asyncio.timeout(self._timeout):
                await self._connection.connect()
                for script in self._scripts:
                    await self._connection.run("SCRIPT", "LOAD", script.text)
        except Exception as error:  # whatever it is, those who wait must hear of it
            self._opening = None
            left, self._waiting = [*self._waiting], deque()
            self._on_left(left, explain(error, f"no connection within {self._timeout:g} s"), False)
        else:
            self._opening = None
            self._start(_Link(self._connection.transport, self._wrong, self._lost))

    def _start(self, link: _Link) -> None:
        self._link = link
        if self._stray is not None:
            self._lookout = asyncio.create_task(self._stray(self._connection), name="lookout")
            self._lookout.add_done_callback(self._strayed)
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            if not call.answer.done():
                link.send(call)

    def _wrong(self, call: Call, text: str) -> None:
        if text.startswith("NOSCRIPT") and not call.as_text:
            call.as_text = True
            self.take(call)
        elif text.startswith(("READONLY", "MASTERDOWN")) or "-READONLY " in text:
            self.hang_up(text, call)  # it was the master when we came
        else:
            self._on_error(call, text)

    def _lost(self, link: _Link) -> None:
        if self._link is link:  # otherwise it was us who hung up
            self.hang_up("the connection was lost")

    def _strayed(self, lookout: asyncio.Task[None]) -> None:
        if self._lookout is lookout:
            self.hang_up("another server took over")
