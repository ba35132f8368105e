"""
What is revoked is refused within a second by two replicas of each service, while both are busy.

Two gateways on one database, of either kind, and one Valkey. Each story measures from the moment at
which the change is committed to the last answer that lets somebody in, at either of the two.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from redis import Redis

from parallama import signing, sshkeys, tokens
from parallama.changes import publish
from parallama.clock import system_clock
from parallama.db.manage import credentials, people, roles, sessions
from parallama.db.manage.schema import managed
from parallama.desk import Desk
from parallama.roles import Role
from parallama.stores import connect_redis
from tests.e2e.gateway import CHAT, Gateway, Someone, free_port, running, until
from tests.ollama_cli import OllamaCommand
from tests.parallama.db_on_disk import a_desk
from tests.postgres import Postgres
from tests.standin import StandIn
from tests.valkey import Valkey

BOUND = 1.0
BUSY = 3  # callers

Signal = Callable[[], None]


@dataclass
class Pair:
    gateways: tuple[Gateway, Gateway]
    redis: "Redis[bytes]"
    answered: int = 0
    seconds: list[float] = field(default_factory=list)
    """From each change to the last request that was let in all the same; mostly before it."""
    _stop: threading.Event = field(default_factory=threading.Event)

    def someone(self, role: str = Role.USER) -> Someone:
        return self.gateways[0].someone(role=role)  # type: ignore[arg-type]

    def token_of(self, someone: Someone) -> tuple[str, str]:
        """An access token, and its id."""
        config = self.gateways[0].config
        jti = str(uuid4())
        token = tokens.issue(
            signing.KeyFolder(config, clock=system_clock).keys(),
            user_id=someone.user_id,
            jti=jti,
            now=time.time(),
            settings=config.authentication,
        )
        self.gateways[0].tokens.append(someone.token)
        return token, jti

    def statuses(self, token: str) -> set[int]:
        """What both say: each of them on a new connection, so that any worker may answer."""
        return {ask(gateway, token) for gateway in self.gateways}

    def change(self, work: Callable[[Desk], Awaitable[object]]) -> float:
        """When it was committed. The services are told after that."""

        async def change() -> float:
            config = self.gateways[0].config
            async with managed(config.database) as engine:
                desk = a_desk(engine, datetime.now(UTC))
                await work(desk)
                at = time.monotonic()
                async with connect_redis(config) as redis:
                    for each in desk.changes:
                        await publish(redis, each)
                return at

        return asyncio.run(change())

    def refused(
        self, status: int, work: Callable[[Desk], Awaitable[object]], signal: Signal, *given: str
    ) -> None:
        """
        Both are asked all the time, before, while and after the change is made. What was sent later
        than the bound is refused, by both and for good.
        """
        told: list[tuple[float, int]] = []
        stop = threading.Event()

        def hammer(gateway: Gateway) -> None:
            with httpx.Client(base_url=gateway.url, timeout=10, trust_env=False) as client:
                while not stop.is_set():
                    for token in given:
                        sent = time.monotonic()
                        headers = {"authorization": f"Bearer {token}"}
                        try:
                            code = client.post("/api/chat", json=CHAT, headers=headers).status_code
                        except httpx.RemoteProtocolError:
                            code = 200  # it was let in, and its answer cut
                        told.append((sent, code))

        with ThreadPoolExecutor(2) as pool:
            hammering = [pool.submit(hammer, gateway) for gateway in self.gateways]
            try:
                until(lambda: len(told) >= 8)
                signal()
                at = self.change(work)
                until(lambda: [code for _, code in told[-20:]] == [status] * 20, 8)
            finally:
                stop.set()
            for each in hammering:
                each.result()
        assert {code for _, code in told} <= {200, status}
        let_in = [sent - at for sent, code in told if code == 200]
        assert let_in
        self.seconds.append(max(let_in))
        assert max(let_in) < BOUND

    def cut(self) -> None:
        """Every subscription ends, at all services."""
        assert self.redis.execute_command("CLIENT", "KILL", "TYPE", "PUBSUB") >= 4

    def listened_to(self) -> None:
        """All of them follow the signal (again)."""
        until(lambda: self.redis.execute_command("PUBSUB", "NUMSUB", "parallama:changes")[1] >= 4)

    def keep_busy(self, someone: Someone) -> None:
        """Calls at both, in turn, until the end."""
        with httpx.Client(timeout=10, trust_env=False, headers=someone.headers) as client:
            while not self._stop.is_set():
                for gateway in self.gateways:
                    answer = client.post(f"{gateway.url}/api/chat", json=CHAT)
                    assert answer.status_code == 200, answer.text
                    self.answered += 1

    def stop(self) -> None:
        self._stop.set()


def ask(gateway: Gateway, token: str) -> int:
    headers = {"authorization": f"Bearer {token}"}
    return httpx.post(
        f"{gateway.url}/api/chat", json=CHAT, headers=headers, timeout=10, trust_env=False
    ).status_code


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """A folder, and what configurations say of the database that both share."""
    folder = tmp_path_factory.mktemp("pair")
    if request.param == "sqlite":
        yield folder, f"  path: {folder}/a/parallama.db\n"
        return
    server = Postgres()
    try:
        at = server.migrated()
        told = {name: getattr(at, name) for name in ("host", "port", "name", "user")}
        assert at.password_file is not None
        told["password_file"] = str(at.password_file.path)
        yield folder, "".join(f"  {name}: {value}\n" for name, value in told.items())
    finally:
        server.remove()


@pytest.fixture(scope="module")
def pair(place: tuple[Path, str]) -> Iterator[Pair]:
    folder, at = place
    password = folder / "password"
    password.write_text("a made-up password")
    password.chmod(0o600)
    valkey, port = Valkey(folder), free_port()
    valkey.start("--bind", "127.0.0.1", "--port", str(port), "--requirepass", password.read_text())
    shared = {
        "PARALLAMA_REDIS__HOST": "127.0.0.1",
        "PARALLAMA_REDIS__PORT": str(port),
        "PARALLAMA_REDIS__PASSWORD_FILE": str(password),
        "PARALLAMA_AUTHENTICATION__SIGNING_KEYS_DIR": str(folder / "signing"),
    }
    signing.ensure(folder / "signing", algorithm="RS256", now=time.time())
    try:
        with (
            StandIn(models=("smollm2",)) as upstream,
            running(folder / "a", upstream, database=at, environ=shared, complaints=True) as first,
            running(folder / "b", upstream, database=at, environ=shared, complaints=True) as second,
            Redis(host="127.0.0.1", port=port, password=password.read_text()) as redis,
        ):
            made = Pair((first, second), redis)
            made.listened_to()
            callers = [first.someone() for _ in range(BUSY)]
            with ThreadPoolExecutor(BUSY) as pool:
                calling = [pool.submit(made.keep_busy, caller) for caller in callers]
                try:
                    yield made
                finally:
                    made.stop()
                    for each in calling:
                        each.result()
            assert made.answered > 50
            longest = max(made.seconds, default=0.0)
            print(f"{made.answered} calls beside, {longest:.3f} s at most till all knew")
    finally:
        valkey.stop()


@pytest.fixture(params=["connected", "cut"])
def signal(request: pytest.FixtureRequest, pair: Pair) -> Callable[[], None]:
    """Called right before a change. Once it was cut it has come back by the next story."""
    pair.listened_to()
    return pair.cut if request.param == "cut" else lambda: None


def test_a_revoked_key(pair: Pair, signal: Signal) -> None:
    someone = pair.someone()
    assert pair.statuses(someone.token) == {200}
    pair.refused(
        401, lambda desk: credentials.revoke_key(desk, someone.key_id), signal, someone.token
    )


def test_a_revoked_token(pair: Pair, signal: Signal) -> None:
    someone = pair.someone()
    (token, jti), (other, _) = pair.token_of(someone), pair.token_of(someone)
    assert pair.statuses(token) == pair.statuses(other) == {200}
    told = pair.gateways[0].config.authentication
    pair.refused(401, lambda desk: sessions.revoke_token(desk, jti, told), signal, token)
    assert pair.statuses(other) == {200}


def test_a_token_that_neither_of_them_has_seen_before(pair: Pair, signal: Signal) -> None:
    """Its user is known to both, by another token."""
    someone = pair.someone()
    (token, jti), (other, _) = pair.token_of(someone), pair.token_of(someone)
    assert pair.statuses(other) == {200}
    told = pair.gateways[0].config.authentication
    signal()
    at = pair.change(lambda desk: sessions.revoke_token(desk, jti, told))
    while time.monotonic() < at + BOUND:
        if pair.statuses(token) == {401}:
            break
    assert pair.statuses(token) == {401}


def test_a_disabled_user(pair: Pair, signal: Signal) -> None:
    someone = pair.someone()
    token, _ = pair.token_of(someone)
    assert pair.statuses(someone.token) == pair.statuses(token) == {200}
    pair.refused(
        403, lambda desk: people.disable_user(desk, someone.name), signal, someone.token, token
    )


def test_a_deleted_user(pair: Pair, signal: Signal) -> None:
    someone = pair.someone()
    token, _ = pair.token_of(someone)
    assert pair.statuses(someone.token) == pair.statuses(token) == {200}
    pair.refused(
        401, lambda desk: people.delete_user(desk, someone.name), signal, someone.token, token
    )


def test_a_role_that_was_taken_away(pair: Pair, signal: Signal) -> None:
    someone = pair.someone()
    token, _ = pair.token_of(someone)
    assert pair.statuses(someone.token) == pair.statuses(token) == {200}
    pair.refused(
        403,
        lambda desk: people.update_user(desk, someone.name, role=Role.READONLY),
        signal,
        someone.token,
        token,
    )


def test_a_permission_that_a_role_lost(pair: Pair, signal: Signal) -> None:
    name = f"r{uuid4().hex[:8]}"
    pair.change(lambda desk: roles.create_role(desk, name, ["models:infer", "models:read"]))
    someone = pair.someone(name)
    token, _ = pair.token_of(someone)
    assert pair.statuses(someone.token) == pair.statuses(token) == {200}
    pair.refused(
        403,
        lambda desk: roles.update_role(desk, name, granted=["models:read"]),
        signal,
        someone.token,
        token,
    )


def test_a_signed_request_is_accepted_by_one_of_them_once(pair: Pair) -> None:
    """Of the `ollama` command. Whoever saw it on its way has nothing to gain at the other one."""
    someone, command = pair.someone(), OllamaCommand()
    public_key = sshkeys.read(command.public_key_file)
    pair.change(lambda desk: credentials.add_public_key(desk, someone.name, public_key))
    first, second = pair.gateways
    for one, other in ((first, second), (second, first)):
        target, authorization = command.call("POST", "/api/chat", at=time.time() - (one is first))
        statuses = [
            httpx.post(
                f"{gateway.url}{target}",
                json=CHAT,
                headers={"authorization": authorization},
                timeout=10,
                trust_env=False,
            ).status_code
            for gateway in (one, other, one)
        ]
        assert statuses == [200, 403, 403]
