"""A whole running gateway for stories: `parallama up` before the stand-in, easy to use."""

import asyncio
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar

import httpx

from parallama import keys
from parallama.changes import Change, publish
from parallama.cli.init import init
from parallama.config import Config, Database, load
from parallama.db.manage import credentials, limits, people
from parallama.db.manage.schema import managed
from parallama.limits import Unit, Window
from parallama.roles import Role
from parallama.stores import connect_redis
from tests.parallama.commands import invoke
from tests.parallama.db_on_disk import a_desk, migrate
from tests.standin import Seen, StandIn

T = TypeVar("T")
Json = dict[str, Any]

PARALLAMA = Path(sys.executable).with_name("parallama")
PATIENCE = 30.0
PROMPT = "a prompt that nobody else may read"

CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": PROMPT}]}
GENERATE = {"model": "smollm2", "prompt": PROMPT}
EMBED = {"model": "smollm2", "input": PROMPT}

# What is said of upstreams that lie, which stories about counting make them do.
_LIES = "the upstream reported a usage that cannot be"

# Rows come at once instead of waiting for company.
_QUICK = "usage: {flush_seconds: 0.01}\n"

_ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("PARALLAMA_")}


def says(**behaviour: Any) -> dict[str, str]:
    """The header that tells the stand-in how to answer this one request."""
    return {"x-standin": json.dumps(behaviour)}


def until(check: Callable[[], T], seconds: float = PATIENCE) -> T:
    """
    What `check` returns once that is true. It asks another process, so it has to ask again: the
    longer it has waited the less often, since what it waits for needs the machine, too.
    """
    began = time.monotonic()
    while not (found := check()):
        waited = time.monotonic() - began
        if waited > seconds:
            raise AssertionError(f"not within {seconds:g} s")
        time.sleep(min(0.005 + waited / 20, 0.05))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Someone:
    """A user with a key."""

    gateway: "Gateway"
    name: str
    user_id: str
    key_id: str
    token: str = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"}

    def ask(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        given = {**self.headers, **(headers or {})}
        return self.gateway.http.request(method, path, headers=given, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.ask("GET", path, **more)

    def post(self, path: str, body: Json | bytes, **more: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, content=content, **more)

    @contextmanager
    def stream(
        self, path: str, body: Json, *, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        """The answer as it comes. Leaving the block hangs up."""
        given = {**self.headers, **(headers or {})}
        with self.gateway.http.stream("POST", path, json=body, headers=given) as answer:
            yield answer

    def spent(self, *, limit: int) -> int:
        """
        How much of the token limit is used or held: as the headers of a call tell that costs
        nothing itself. Nothing was learned of its model, so what it holds is a quarter of its
        bytes.
        """
        body = json.dumps({"model": "no-such-model", "input": "x"}).encode()
        answer = self.post("/api/embed", body)
        assert answer.status_code == 404, answer.text
        return limit - int(answer.headers["x-ratelimit-remaining-tokens"]) - -(-len(body) // 4)

    def expect_spent(self, tokens: int | Callable[[], int], *, limit: int) -> None:
        """This much of the token limit is used, now or soon, and nothing is held any more."""
        told = []

        def agrees() -> bool:
            told[:] = [self.spent(limit=limit), tokens() if callable(tokens) else tokens]
            return told[0] == told[1]

        try:
            until(agrees, 3)
        except AssertionError:
            raise AssertionError("spent {} tokens, expected {}".format(*told)) from None


@dataclass
class Gateway:
    """A running `parallama up`. `tokens` are all keys that were ever made for it."""

    folder: Path
    upstream: StandIn
    process: "subprocess.Popen[bytes]"
    tokens: list[str] = field(default_factory=list, repr=False)
    environ: Mapping[str, str] = field(default_factory=lambda: _ENVIRON, repr=False)
    _count: int = 0

    @cached_property
    def config(self) -> Config:
        return load(self.folder / "config.yaml", self.environ)

    @property
    def address(self) -> tuple[str, int]:
        return self.config.server.host, self.config.server.port

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            timeout=PATIENCE,
            trust_env=False,
            # None is closed for being one too many: another thread may just have taken it.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    # People.

    def someone(
        self,
        *,
        role: Role = Role.USER,
        requests: int | None = None,
        tokens: int | None = None,
        window: Window = Window.DAY,
        expired: bool = False,
        **key: Any,
    ) -> Someone:
        """A new user with a key of their own, and limits for all that they do."""
        self._count += 1
        name = f"user-{self._count}"
        minted = keys.mint(os.urandom, rounds=4)
        self.tokens.append(minted.token)
        given = {Unit.REQUESTS: requests, Unit.TOKENS: tokens}
        amounts = {(unit, window): n for unit, n in given.items() if n is not None}
        now = datetime.now(UTC)
        if expired:
            now -= timedelta(days=2)
            key["expires_at"] = now + timedelta(days=1)

        async def make() -> Someone:
            async with managed(self.config.database) as engine:
                user = await people.create_user(a_desk(engine, now), name, role)
                made = await credentials.create_key(a_desk(engine, now), user.id, minted, **key)
                if amounts:
                    await limits.set_limits(
                        a_desk(engine, now), user.id, gateway="*", model="*", amounts=amounts
                    )
            return Someone(self, name, user.id, made.id, minted.token)

        return asyncio.run(make())

    def limit(
        self,
        whose: str,
        amounts: Mapping[tuple[Unit, Window], int],
        *,
        gateway: str = "*",
        model: str = "*",
    ) -> None:
        """Set limits and tell the services."""

        async def change() -> None:
            now = datetime.now(UTC)
            async with managed(self.config.database) as engine:
                await limits.set_limits(
                    a_desk(engine, now), whose, gateway=gateway, model=model, amounts=amounts
                )
            with chdir(self.config.state_dir):  # sockets are named by their shortest path
                async with connect_redis(self.config) as redis:
                    await publish(redis, Change("everything"))

        asyncio.run(change())

    def cli(self, *words: str) -> Any:
        """What `parallama ... -o json` prints. It runs in this process, which is quicker."""
        given = ["--config", str(self.config.source), *words, "-o", "json"]
        done = invoke(*given, environ=self.environ)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    # What happened.

    def rows(self, request_id: str) -> list[Json]:
        return self._rows("request_id", request_id)

    def rows_of(self, user_id: str) -> list[Json]:
        return self._rows("user_id", user_id)

    def _rows(self, column: str, value: str) -> list[Json]:
        with closing(sqlite3.connect(f"file:{self.config.database.path}?mode=ro", uri=True)) as db:
            db.row_factory = sqlite3.Row
            query = f"SELECT * FROM gateway_usage_logs WHERE {column} = ?"  # noqa: S608
            return [dict(row) for row in db.execute(query, (value,))]

    def row(self, answer: httpx.Response) -> Json:
        """The one usage row of this answer, now or soon."""
        (row,) = until(lambda: self.rows(answer.headers["x-request-id"]))
        return row

    def seen(self, answer: httpx.Response) -> Seen:
        """What the upstream saw and said for this answer, once it has ended."""
        mine = answer.headers["x-request-id"]
        return self.upstream.wait(lambda s: s.header("x-request-id") == mine and s.ended)

    def log(self) -> str:
        """What all processes wrote so far."""
        files = [self.folder / "up.log", *(self.folder / "state").rglob("*.log")]
        return "\n".join(file.read_text(errors="replace") for file in files)

    def events(self) -> list[Json]:
        """The log lines of our own processes."""
        lines = (self.folder / "up.log").read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"time"')]

    def raw(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """A call whose target nobody tidies up: status, headers, body."""
        with closing(HTTPConnection(*self.address, timeout=PATIENCE)) as connection:
            connection.request(method, target, body, dict(headers or {}))
            answer = connection.getresponse()
            return (
                answer.status,
                {name.lower(): value for name, value in answer.getheaders()},
                answer.read(),
            )

    def admin(self, path: str) -> str:
        """What Envoy's own admin interface says."""
        transport = httpx.HTTPTransport(uds=str(self.config.run_dir / "envoy-admin.sock"))
        with httpx.Client(transport=transport, timeout=PATIENCE) as client:
            return client.get(f"http://admin{path}").text

    def active_requests(self) -> int:
        stat = self.admin("/stats?filter=^http.gateway.downstream_rq_active$")
        return int(stat.rpartition(":")[2])

    # Processes.

    def child(self, name: str) -> int:
        """The process id of a child that serves."""

        def pid() -> int | None:
            told = json.loads((self.config.run_dir / "children.json").read_text())[name]
            return int(told["pid"]) if told["state"] == "serving" and told["pid"] else None

        return until(pid) or 0

    def processes(self) -> list[int]:
        """The supervisor, and all that stand below it."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = stat.read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            pid, rest = text.split(" ", 1)[0], text.rpartition(")")[2].split()
            if rest[0] != "Z":
                parents[int(pid)] = int(rest[1])
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found


def initialised(folder: Path, upstream_url: str) -> Path:
    """A folder as `parallama init` leaves it; its config.yaml."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = Database.model_validate({"path": str(folder / "parallama.db")})
    asyncio.run(migrate(database))  # what is there already `init` leaves as it is
    init(folder, f"127.0.0.1:{free_port()}", upstream_url)
    return folder / "config.yaml"


@contextmanager
def running(
    folder: Path,
    upstream: StandIn,
    *,
    settings: str = "",
    database: str = "",
    hosts: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    complaints: bool = False,
) -> Iterator[Gateway]:
    """
    A gateway from `parallama init` to a clean end, before `upstream` or these `hosts`, with SQLite
    or the `database` of these lines. Whatever
    happens within, at the end all processes are gone, no key and no prompt is in any log, and,
    unless there are to be `complaints`, nobody warned of anything.
    """
    config = initialised(folder, upstream.url).read_text() + _QUICK + settings
    if database:
        config, count = re.subn(r"(?m)^  path: parallama.db\n", database, config)
        assert count == 1
    if hosts:
        several = f"    hosts: {json.dumps(list(hosts))}\n"
        config, count = re.subn(r"(?m)^    host: .*\n    port: .*\n", several, config)
        assert count == 1
    (folder / "config.yaml").write_text(config)
    environment = {**_ENVIRON, **(environ or {})}
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(
            [PARALLAMA, "up", "--config", folder / "config.yaml"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    gateway = Gateway(folder, upstream, process, environ=environment)
    try:
        until(lambda: _serves(gateway), 60)
        yield gateway
    finally:
        gateway.http.close()
        left = _stop(gateway)
    assert process.returncode == 0, gateway.log()[-3000:]
    assert not left, "processes outlived `parallama up`"
    _check_log(gateway, complaints=complaints)


def _serves(gateway: Gateway) -> bool:
    assert gateway.process.poll() is None, gateway.log()
    try:
        return gateway.http.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def _stop(gateway: Gateway) -> Sequence[int]:
    """Those of its processes that are still there in the end; they are killed."""
    everybody = gateway.processes()
    gateway.process.send_signal(signal.SIGTERM)
    try:
        gateway.process.wait(40)
    except subprocess.TimeoutExpired:
        gateway.process.kill()
        gateway.process.wait(5)
    left = [pid for pid in everybody if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def _check_log(gateway: Gateway, *, complaints: bool) -> None:
    log = gateway.log()
    assert PROMPT not in log
    for token in gateway.tokens:
        assert token not in log
        assert keys.parse(token).secret not in log  # type: ignore[union-attr]
    assert "Traceback" not in log, log[log.index("Traceback") :][:3000]
    assert "Warning: " not in log, log[log.index("Warning: ") - 200 :][:1000]
    assert "script log" not in log, log[log.index("script log") - 200 :][:1000]
    bad = [
        event
        for event in gateway.events()
        if event["level"] not in ("debug", "info") and event["event"] != _LIES
    ]
    assert complaints or not bad, bad
