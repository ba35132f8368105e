"""Runs scripts on one connection, without waiting for one answer before the next call goes out."""

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import hiredis
from redis.asyncio import Redis

from parallama.errors import Unavailable

# Its stub knows tuples of one only.
_pack: Callable[[tuple[str | int, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


# Seconds that a patient call waits for company: it saves both sides a turn.
_PATIENCE = 0.005


@dataclass(frozen=True, slots=True)
class Script:
    text: str
    sha: str

    @classmethod
    def load(cls, name: str) -> "Script":
        """The file `name` of this package."""
        text = files("ratelimit").joinpath(name).read_text()
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@dataclass(eq=False, slots=True)
class _Call:
    script: Script
    args: tuple[str | int, ...]
    answer: asyncio.Future[Any]
    deadline: float
    patient: bool
    retried: bool = False

    def packed(self) -> bytes:
        return _pack(("EVALSHA", self.script.sha, *self.args))

    def packed_with_text(self) -> bytes:
        return _pack(("EVAL", self.script.text, *self.args))

    def fail(self, why: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(Unavailable(f"the counters cannot be used: {why}"))

    def finish(self, reply: Any) -> None:
        if isinstance(reply, hiredis.ReplyError):
            self.fail(str(reply))
        elif not self.answer.done():
            self.answer.set_result(reply)


class _Link(asyncio.Protocol):
    """One connection: replies come in the order of the calls."""

    def __init__(self, transport: Any, lost: Callable[["_Link"], None]) -> None:
        self.unanswered: deque[_Call] = deque()
        self._lost = lost
        self._replies = hiredis.Reader()
        self._transport = transport
        self._patient: list[bytes] = []
        self._flush: asyncio.TimerHandle | None = None
        transport.set_protocol(self)

    def send(self, call: _Call) -> None:
        self.unanswered.append(call)
        self._patient.append(call.packed())
        if not call.patient:
            self.flush()
        elif self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(_PATIENCE, self.flush)

    def flush(self) -> None:
        """Everything that still waits goes out."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        if self._patient:
            self._transport.write(b"".join(self._patient))
            self._patient.clear()

    def data_received(self, data: bytes) -> None:
        self._replies.feed(data)
        while (reply := self._replies.gets()) is not False:
            if isinstance(reply, hiredis.PushNotification):
                continue
            call = self.unanswered.popleft()
            if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
                self.flush()  # what waits is counted as unanswered already
                self.unanswered.append(call)
                self._transport.write(call.packed_with_text())
            else:
                call.finish(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._flush is not None:
            self._flush.cancel()
        self._lost(self)

    def abort(self) -> None:
        self._transport.abort()


class Pipeline:
    """
    A redis-py pipeline costs 20 us of CPU for each command of a long one and 80 us for one alone;
    this costs a fraction (docs/decisions/0004). With uvloop, the calls of one turn of the event
    loop go out together.

    Every call is answered within `timeout` seconds; what fails, fails as `Unavailable`. Calls run
    in the order in which they came. Scripts must bear being run twice: after a lost connection
    what was not answered is sent once more. `scripts` are loaded on connecting; one that the
    server does not know all the same is sent as text, after what is on its way by then.
    """

    def __init__(self, redis: Redis, *scripts: Script, timeout: float) -> None:
        self._scripts = scripts
        # redis-py connects and logs in. Its streams are what costs: a _Link takes their place.
        pool: Any = redis.connection_pool
        self._connection = pool.make_connection()
        self._timeout = timeout
        self._link: _Link | None = None
        self._waiting: deque[_Call] = deque()
        self._opening: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None

    def run(
        self,
        script: Script,
        keys: Sequence[str],
        args: Sequence[str | int],
        *,
        patient: bool = False,
    ) -> asyncio.Future[Any]:
        """
        What `script` returns. It is on its way, whether or not anybody awaits it.

        A `patient` call may wait a few milliseconds, to go out together with the next one.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        answer = loop.create_future()
        call = _Call(script, (len(keys), *keys, *args), answer, deadline, patient)
        if self._link is not None:
            self._link.send(call)
        else:
            self._wait_for_link(call)
        if self._watch is None:
            self._watch = loop.call_at(deadline, self._check_deadlines)
        return call.answer

    async def aclose(self) -> None:
        """Wait for everything under way, then hang up."""
        if under_way := [call.answer for call in self._under_way()]:
            await asyncio.wait(under_way)
        if self._opening is not None:
            await self._opening
        if self._watch is not None:
            self._watch.cancel()
        self._link = None
        await self._connection.disconnect(nowait=True)

    def _under_way(self) -> list[_Call]:
        return [*(self._link.unanswered if self._link else ()), *self._waiting]

    def _wait_for_link(self, *calls: _Call) -> None:
        self._waiting.extend(calls)
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(), name="counters connection")

    async def _open(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._connection.disconnect(nowait=True)
                await self._connection.connect()
                for script in self._scripts:
                    await self._connection.send_command("SCRIPT LOAD", script.text)
                    await self._connection.read_response()
        except Exception as error:  # whatever it is, those who wait must hear of it
            why = str(error) or f"no connection within {self._timeout:g} s"
            while self._waiting:
                self._waiting.popleft().fail(why)
        else:
            self._link = _Link(self._connection._writer.transport, self._on_lost)
            while self._waiting:
                call = self._waiting.popleft()
                if not call.answer.done():
                    self._link.send(call)
        finally:
            self._opening = None

    def _on_lost(self, link: _Link) -> None:
        if self._link is not link:  # closed by us
            return
        self._link = None
        again = []
        for call in link.unanswered:
            if call.retried:
                call.fail("the connection was lost")
            else:
                call.retried = True
                again.append(call)
        if again:
            self._wait_for_link(*again)

    def _check_deadlines(self) -> None:
        self._watch = None
        loop = asyncio.get_running_loop()
        late = [call for call in self._under_way() if call.deadline <= loop.time()]
        for call in late:
            call.fail(f"no answer within {self._timeout:g} s")
        if self._link is not None and self._link.unanswered and self._link.unanswered[0] in late:
            self._link.abort()
        if left := [call.deadline for call in self._under_way() if not call.answer.done()]:
            self._watch = loop.call_at(min(left), self._check_deadlines)
