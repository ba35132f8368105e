"""A stand-in for Ollama, llama.cpp and OpenAI-style servers that can be slow, cut, lie and count.

In a test:

    with StandIn() as upstream:
        upstream.next(Behaviour(tokens=50, cut_after=20))
        ...                                     # call upstream.url, or a gateway in front of it
        assert upstream.wait(lambda seen: seen.ended).emitted == 20

As a process: `python -m tests.standin --port 0`. Its first line is `{"url": ..., "pid": ...}`.

A request may say itself how it wants to be answered, in a header: `x-standin: {"tokens": 50}`.
Without the header the queue decides (`next`), and with nothing there `default`. Over HTTP:

    POST /__standin__/next      {"tokens": 50, "path": "/api/chat"}    (path: only there)
    POST /__standin__/default   {"tokens": 50}
    POST /__standin__/release   {"gate": "gate"}
    POST /__standin__/reset
    GET  /__standin__/log
    GET  /__standin__/wait?state=ended&id=3    (or held, or gone; without an id: the first)
"""

import argparse
import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, get_args
from urllib.parse import parse_qsl

from tests import standin_dialects as dialects
from tests.standin_answers import JSON, READ, Exchange, Seen, dump
from tests.standin_dialects import Behaviour, Flavour, Json
from tests.standin_wire import Connection, Request

__all__ = ["Behaviour", "Flavour", "Seen", "StandIn"]


class StandIn:
    """
    A server on loopback, in a thread of its own. Every public method may be called from any thread.

    Port 0 takes a free one; `host` is where it listens. `models` are the names it knows; pull,
    copy and delete change them until `reset`.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        flavour: Flavour = "ollama",
        models: Iterable[str] = ("smollm2",),
        default: Behaviour | None = None,
        keep_log: bool = True,
    ) -> None:
        self._host = host
        self.port = port
        self.flavour = flavour
        self.default = default or Behaviour()
        self.models = list(models)
        self.blobs = set[str]()
        self.health = 200
        self._connections: set[Connection] = set()
        self._at_start = (self.default, tuple(self.models))
        self._keep_log = keep_log
        self._queue: list[tuple[Behaviour, str | None]] = []
        self._released: set[str] = set()
        self._log: list[Seen] = []
        self._asked: list[Seen] = []
        self._count = 0
        self._watchers: list[tuple[Callable[[Seen], bool], Future[Seen]]] = []
        self._lock = threading.Lock()  # the queue, the log and those who watch it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[Seen]:
        with self._lock:
            return list(self._log)

    @property
    def asked(self) -> list[Seen]:
        """What Parallama itself wanted to know, which is nobody's request: its lists of models."""
        with self._lock:
            return list(self._asked)

    def last(self) -> Seen:
        """The last request, once it has ended: a client may have its answer a little earlier."""
        return self.wait_ended(self.requests[-1].id)

    def next(self, behaviour: Behaviour, path: str | None = None) -> None:
        """Decides the next call of this path; without a path, the next that is no GET or HEAD."""
        with self._lock:
            self._queue.append((behaviour, path))

    def release(self, gate: str = "gate") -> None:
        """Lets all pass who are held at this gate, now and later."""
        self._released.add(gate)
        self._loop.call_soon_threadsafe(self._poke_all)

    def wait(self, check: Callable[[Seen], bool], timeout: float = 10.0) -> Seen:
        """The first request that meets the check, now or soon; raises TimeoutError."""
        watcher = self._watch(check)
        try:
            return watcher.result(timeout)
        finally:
            watcher.cancel()

    def wait_ended(self, number: int, timeout: float = 10.0) -> Seen:
        return self.wait(lambda seen: seen.id == number and seen.ended, timeout)

    def reset(self) -> None:
        """Behaviour, models, gates and log as they were at the start; numbers go on."""
        with self._lock:
            self.default, models = self._at_start
            self.models[:] = models
            self.blobs.clear()
            self.health = 200
            self._queue.clear()
            self._released.clear()
            self._log.clear()
            self._asked.clear()

    def __enter__(self) -> Self:
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="stand-in")
        self._thread.start()
        started.result(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self, started: "Future[None]") -> None:
        try:
            asyncio.run(self.serve(lambda: started.set_result(None)))
        except OSError as error:  # the port is taken
            started.set_exception(error)

    async def serve(self, ready: Callable[[], None]) -> None:
        """Serves until `stop`."""
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        make = self._loop.create_server(
            lambda: Connection(self._connections, self._exchange),
            self._host,
            self.port,
            backlog=1024,
        )
        server = await make
        self.port = server.sockets[0].getsockname()[1]
        ready()
        await self._stopping.wait()
        server.close()
        open_now = list(self._connections)
        for connection in open_now:
            connection.transport.abort()
        await asyncio.gather(*(connection.task for connection in open_now))

    def stop(self) -> None:
        """For its own loop only, such as a signal handler there."""
        self._stopping.set()

    # What an exchange needs.

    def released(self, gate: str) -> bool:
        return gate in self._released

    def model(self, name: str, flavour: Flavour) -> str | None:
        """The known model that this name runs."""
        if flavour != "ollama":
            return name if name in self.models else None
        full = dialects.ollama_name(name)
        return next((m for m in self.models if full and dialects.ollama_name(m) == full), None)

    def changed(self, seen: Seen) -> None:
        """Wakes those whose check this request meets now."""
        with self._lock:
            if not self._watchers:
                return
            waiting = [pair for pair in self._watchers if not pair[1].done()]
            met = [pair for pair in waiting if pair[0](seen)]
            self._watchers = [pair for pair in waiting if pair not in met]
        for _, watcher in met:
            if watcher.set_running_or_notify_cancel():
                watcher.set_result(seen)

    async def _exchange(self, connection: Connection, request: Request) -> bool:
        """Answers; says whether the connection may carry another request."""
        if request.path.startswith("/__standin__/"):
            return await self._control(connection, request)
        if request.get("user-agent") == "Envoy/HC":  # asks how we are, and is nobody's call
            return await self._tell(connection, self.health, {"status": "as told"})
        self._count += 1
        seen = Seen(self._count, request.method, request.target, request.headers, request.body)
        seen.received = request.received
        if self._keep_log:
            with self._lock:
                ours = request.get("user-agent") == "parallama"
                (self._asked if ours else self._log).append(seen)
        try:
            behaviour = self._behaviour(request)
        except (TypeError, ValueError) as error:
            return await self._tell(connection, 500, {"error": f"x-standin: {error}"})
        exchange = Exchange(self, connection, request, seen, behaviour)
        try:
            self.changed(seen)
            await exchange.run()
        finally:
            seen.ended, seen.held = True, False
            self.changed(seen)
        return exchange.keep_alive

    def _behaviour(self, request: Request) -> Behaviour:
        if header := request.get("x-standin"):
            return Behaviour.from_json(json.loads(header))
        with self._lock:
            for at, (behaviour, path) in enumerate(self._queue):
                if path == request.path or (path is None and request.method not in READ):
                    del self._queue[at]
                    return behaviour
        return self.default

    def _poke_all(self) -> None:
        for connection in list(self._connections):
            connection.poke()

    def _watch(self, check: Callable[[Seen], bool]) -> "Future[Seen]":
        watcher: Future[Seen] = Future()
        with self._lock:
            found = next((seen for seen in self._log if check(seen)), None)
            if found is None:
                self._watchers.append((check, watcher))
        if found is not None:
            watcher.set_result(found)
        return watcher

    # Control over HTTP.

    async def _control(self, connection: Connection, request: Request) -> bool:
        order = request.path.removeprefix("/__standin__/")
        query = dict(parse_qsl(request.target.partition("?")[2]))
        try:
            body = json.loads(request.body) if request.body else {}
            answer = await self._obey(order, body, query)
        except TimeoutError:
            return await self._tell(connection, 504, {"error": "it did not happen"})
        except (KeyError, TypeError, ValueError) as error:
            return await self._tell(connection, 400, {"error": repr(error)})
        return await self._tell(connection, 200, answer)

    async def _obey(self, order: str, body: Json, query: dict[str, str]) -> Any:
        if order == "next":
            path = body.pop("path", None)
            self.next(Behaviour.from_json(body), path)
        elif order == "default":
            self.default = Behaviour.from_json(body)
        elif order == "release":
            self.release(body.get("gate", "gate"))
        elif order == "reset":
            self.reset()
        elif order == "log":
            return [seen.as_dict() for seen in self.requests]
        elif order == "wait":
            name = {"ended": "ended", "held": "held", "gone": "client_gone"}[
                query.get("state", "ended")
            ]
            number = int(query.get("id", 0))
            watcher = self._watch(lambda seen: number in (0, seen.id) and getattr(seen, name))
            async with asyncio.timeout(float(query.get("timeout", 10))):
                return (await asyncio.wrap_future(watcher)).as_dict()
        else:
            raise ValueError(f"no such order: {order}")
        return {"ok": True}

    async def _tell(self, connection: Connection, status: int, value: Any) -> bool:
        body = dump(value, spaces=True)
        head = f"HTTP/1.1 {status} .\r\ncontent-type: {JSON}\r\ncontent-length: {len(body)}\r\n\r\n"
        await connection.write(head.encode() + body)
        return True


async def _main(server: StandIn) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)
    await server.serve(
        lambda: print(json.dumps({"url": server.url, "pid": os.getpid()}), flush=True)
    )


if __name__ == "__main__":
    args = argparse.ArgumentParser(prog="python -m tests.standin", description=__doc__)
    args.formatter_class = argparse.RawDescriptionHelpFormatter
    args.add_argument("--host", default="127.0.0.1")
    args.add_argument("--port", type=int, default=0)
    args.add_argument("--flavour", choices=get_args(Flavour), default="ollama")
    args.add_argument("--models", default="smollm2", help="names, comma-separated")
    args.add_argument("--default", default="{}", help="the default behaviour, as JSON")
    args.add_argument("--no-log", action="store_true", help="do not keep requests")
    chosen = args.parse_args()
    asyncio.run(
        _main(
            StandIn(
                host=chosen.host,
                port=chosen.port,
                flavour=chosen.flavour,
                models=chosen.models.split(","),
                default=Behaviour.from_json(json.loads(chosen.default)),
                keep_log=not chosen.no_log,
            )
        )
    )
