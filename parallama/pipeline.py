"""Runs scripts in Redis, without waiting for one answer before the next call goes out."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

from parallama.lanes import PAUSE, Call, Lane
from parallama.lanes import Script as Script
from parallama.nodes import Cluster, Sentinels, explain, slot_of, until_astray
from parallama.resp import Address, Connection, Redis

# How often a cluster may send a call elsewhere. Twice is usual while a slot moves.
_MOST_MOVES = 5


class Pipeline:
    """
    A redis-py pipeline costs 20 us of CPU for each command of a long one and 80 us for one alone;
    this costs a fraction (docs/decisions/0004).

    Every call is answered within `timeout` seconds; what fails, fails as `Unavailable`. Calls for
    one server run in the order in which they came. Scripts must bear being run twice: after a lost
    connection what was not answered is sent once more. `scripts` are loaded on connecting; one that
    the server does not know all the same is sent as text, after what is on its way by then.

    In a cluster a call goes to the server that has its keys, which share one hash tag.
    """

    def __init__(self, redis: Redis, *scripts: Script, timeout: float) -> None:
        finder = redis.finder
        self._timeout = timeout
        self._watch: asyncio.TimerHandle | None = None
        self._ways: _One | _Many
        if isinstance(finder, Cluster):
            self._ways = _Many(finder, scripts, timeout)
        else:
            stray = until_astray if isinstance(finder, Sentinels) else None
            self._ways = _One(redis.new_connection(), scripts, timeout, stray)
        self._take = self._ways.take

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
        self._take(Call(script, (len(keys), *keys, *args), answer, deadline, patient))
        if self._watch is None:
            self._watch = loop.call_at(deadline, self._check_deadlines)
        return answer

    def prepared(self, script: Script, keys: Sequence[str], args: Sequence[str | int]) -> Call:
        """For `nudge`."""
        nobody = asyncio.get_running_loop().create_future()
        nobody.cancel()  # awaits its answer
        call = Call(script, (len(keys), *keys, *args), nobody, 0, patient=False)
        call.message = call.packed()
        return call

    def nudge(self, call: Call) -> None:
        """
        Have a script run before the one that is about to be called, where nothing else is on its
        way: the server is awake then, and has at hand what it needs.
        """
        call.deadline = asyncio.get_running_loop().time() + self._timeout
        self._ways.nudge(call)

    async def aclose(self) -> None:
        """Wait for everything under way, then hang up."""
        if under_way := [call.answer for call in self._ways.under_way()]:
            await asyncio.wait(under_way)
        if self._watch is not None:
            self._watch.cancel()
        await self._ways.aclose()

    def _check_deadlines(self) -> None:
        self._watch = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        for call in self._ways.under_way():
            if call.deadline <= now:
                call.fail(f"no answer within {self._timeout:g} s")
        for lane in self._ways.lanes():
            if lane.is_stuck(now):
                lane.hang_up("it did not answer in time")
        waiting = [call.deadline for call in self._ways.under_way() if not call.answer.done()]
        if waiting:
            self._watch = loop.call_at(min(waiting), self._check_deadlines)


class _One:
    """One server, or the one that is the master."""

    def __init__(
        self,
        connection: Connection,
        scripts: Sequence[Script],
        timeout: float,
        stray: Callable[[Connection], Coroutine[Any, Any, None]] | None,
    ) -> None:
        self._lane = Lane(
            connection,
            scripts,
            timeout=timeout,
            on_error=self._on_error,
            on_left=self._on_left,
            stray=stray,
        )
        self.take = self._lane.take
        self.nudge = self._lane.nudge
        self.under_way = self._lane.under_way
        self.aclose = self._lane.aclose

    def lanes(self) -> list[Lane]:
        return [self._lane]

    def _on_error(self, call: Call, text: str) -> None:
        call.fail(f"{text} (redis.mode)" if text.startswith("MOVED ") else text)

    def _on_left(self, calls: list[Call], why: str, may_have_run: bool) -> None:
        for call in calls:
            if call.retried or not may_have_run:
                call.fail(why)
            elif not call.answer.done():
                call.retried = True
                self.take(call)


class _Many:
    """The masters of a cluster, one lane to each that is needed."""

    def __init__(self, cluster: Cluster, scripts: Sequence[Script], timeout: float) -> None:
        self._cluster = cluster
        self._scripts = scripts
        self._timeout = timeout
        self._lanes: dict[Address, Lane] = {}
        # What waits until it is known anew who has which slots.
        self._unplaced: deque[Call] = deque()
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = -PAUSE

    def take(self, call: Call) -> None:
        slot = _slot(call)
        owner = self._cluster.owners[slot]
        if owner is not None:
            call.asking = False
            self._lane_to(owner).take(call)
        elif self._may_move(call):
            self._look_then_take(call)
        else:
            call.fail(f"no server of the cluster has slot {slot}")

    def nudge(self, call: Call) -> None:
        owner = self._cluster.owners[_slot(call)]
        if owner in self._lanes:
            self._lanes[owner].nudge(call)

    def lanes(self) -> Iterable[Lane]:
        return [*self._lanes.values()]

    def under_way(self) -> list[Call]:
        of_lanes = (call for lane in self._lanes.values() for call in lane.under_way())
        return [*of_lanes, *self._unplaced]

    async def aclose(self) -> None:
        if self._looking is not None:
            await self._looking
        while self._lanes:
            await self._lanes.popitem()[1].aclose()

    def _lane_to(self, server: Address) -> Lane:
        lane = self._lanes.get(server)
        if lane is None:
            lane = self._lanes[server] = Lane(
                self._cluster.connection(server),
                self._scripts,
                timeout=self._timeout,
                on_error=partial(self._on_error, server),
                on_left=self._on_left,
            )
        return lane

    def _on_left(self, calls: list[Call], why: str, may_have_run: bool) -> None:
        for call in calls:
            if call.retried:
                call.fail(why)
            elif not call.answer.done():
                call.retried = True
                self._unplaced.append(call)
        self._look()  # a replica may have taken over

    def _on_error(self, asked: Address, call: Call, text: str) -> None:
        kind, _, told = text.partition(" ")
        if kind in ("MOVED", "ASK") and self._may_move(call):
            slot, _, where = told.partition(" ")
            host, _, port = where.rpartition(":")
            server = self._cluster.named(host, int(port), by=asked)
            if kind == "MOVED":
                self._cluster.owners[int(slot)] = server
                self._look()
            call.asking = kind == "ASK"
            self._lane_to(server).take(call)
        elif kind == "TRYAGAIN" and self._may_move(call):
            self._look_then_take(call)
        else:
            if kind == "CLUSTERDOWN":
                self._look()
            call.fail(text)

    def _may_move(self, call: Call) -> bool:
        call.moves += 1
        return call.moves <= _MOST_MOVES

    def _look_then_take(self, call: Call) -> None:
        self._unplaced.append(call)
        self._look()

    def _look(self) -> None:
        if self._looking is None:
            self._looking = asyncio.create_task(self._learn(), name="cluster nodes")

    async def _learn(self) -> None:
        loop = asyncio.get_running_loop()
        why = ""
        try:
            await asyncio.sleep(self._looked_at + PAUSE - loop.time())
            self._looked_at = loop.time()
            async with asyncio.timeout(self._timeout):
                await self._cluster.look_again()
            await self._close_unused()
        except Exception as error:  # whatever it is, those who wait must hear of it
            why = explain(error, f"no node answered within {self._timeout:g} s")
        self._looking = None
        calls, self._unplaced = self._unplaced, deque()
        for call in calls:
            if why:
                call.fail(why)
            elif not call.answer.done():
                self.take(call)

    async def _close_unused(self) -> None:
        owners = set(self._cluster.owners)
        for server, lane in [*self._lanes.items()]:
            if server not in owners and not lane.under_way():
                del self._lanes[server]
                await lane.aclose()


def _slot(call: Call) -> int:
    return slot_of(str(call.args[1])) if call.args[0] else 0
