"""compose.yaml as people use it. What stands in for images of others: see standins/."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.containers.engine import RUNNING, Stack, run
from tests.e2e.gateway import CHAT, says, until


class Caller:
    """A user with a key, who notes the ids of the calls that were answered."""

    def __init__(self, stack: Stack, name: str) -> None:
        self.id = stack.cli("users", "create", name)["id"]
        key = stack.cli("keys", "create", name)["key"]
        self._http = httpx.Client(
            base_url=stack.url,
            headers={"authorization": f"Bearer {key}"},
            timeout=30,
            trust_env=False,
        )
        self._stack = stack
        self.answered: list[str] = []

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def chat(self, **behaviour: object) -> httpx.Response:
        answer = self._http.post("/v1/chat/completions", json=CHAT, headers=says(**behaviour))
        if answer.status_code == 200:
            self.answered.append(answer.headers["x-request-id"])
        return answer

    @contextmanager
    def stream(self, **behaviour: object) -> Iterator[httpx.Response]:
        body = {**CHAT, "stream": True}
        with self._http.stream("POST", "/api/chat", json=body, headers=says(**behaviour)) as answer:
            yield answer

    def answers(self, *, more: int) -> None:
        """Return when so many more calls have been answered."""
        before = len(self.answered)
        until(lambda: len(self.answered) >= before + more, 60)

    def rows(self) -> dict[str, dict[str, object]]:
        told = self._stack.cli("usage", "list", "--user", self.id, "--limit", "100000")
        counts = Counter(row["request_id"] for row in told)
        assert set(counts.values()) <= {1}
        return {row["request_id"]: row for row in told}


class Busy:
    """Calls without a pause, some of them streams, until the block ends."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(2)]

    def _call(self) -> None:
        while not self._over.wait(0.1):
            try:
                self._caller.chat(tokens=5)
                with self._caller.stream(tokens=5) as answer:
                    answer.read()
                    if answer.status_code == 200:
                        self._caller.answered.append(answer.headers["x-request-id"])
            except httpx.HTTPError:
                pass  # whoever restarts Envoy cuts connections

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def test_a_first_user_makes_a_first_call_and_it_is_a_row(stack: Stack) -> None:
    with Caller(stack, "anna") as anna:
        answer = anna.chat(tokens=7)
        assert answer.status_code == 200, answer.text
        row = until(anna.rows)[answer.headers["x-request-id"]]
    assert row["completion_tokens"] == 7
    assert row["token_source"] == "reported"
    query = "SELECT count(*) FROM gateway_usage_logs"
    told = stack.execute(
        "postgres", "psql", "-h", "/run/postgresql", "-U", "parallama", "-Atc", query
    )
    assert int(told) >= 1


def test_a_limit_counts_and_a_revoked_key_is_refused(stack: Stack) -> None:
    with Caller(stack, "ben") as ben:
        stack.cli("limits", "set", "ben", "--gateway", "*", "--requests-per-day", "1")
        assert ben.chat().status_code == 200
        assert ben.chat().status_code == 429
        (key,) = stack.cli("keys", "list", "--user", "ben")
        stack.cli("keys", "revoke", key["id"])
        until(lambda: ben.chat().status_code == 401)


@pytest.mark.parametrize("service", [name for name in RUNNING if name != "ollama"])
def test_no_container_can_do_more_than_it_has_to(stack: Stack, service: str) -> None:
    told = stack.inspect(service)
    host = told["HostConfig"]
    assert told["Config"]["User"].partition(":")[0] in {"10001", "999"}
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    status = stack.execute(service, "cat", "/proc/self/status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


def test_no_password_is_seen_from_outside_or_by_envoy(stack: Stack) -> None:
    names = ("db_password", "redis_password")
    passwords = [stack.execute("authz", "cat", f"/run/secrets/{name}").strip() for name in names]
    assert all(len(password) > 30 for password in passwords)
    for service in RUNNING:
        seen = json.dumps(stack.inspect(service)) + stack.do("logs", "--no-color", service)
        seen += run("docker", "top", stack.id(service))
        assert not [password for password in passwords if password in seen], service
    assert "secrets" not in json.dumps(stack.inspect("envoy")["Mounts"])


def test_nothing_but_envoy_is_reached_from_outside(stack: Stack) -> None:
    published = {
        name: [
            port for port, bound in stack.inspect(name)["NetworkSettings"]["Ports"].items() if bound
        ]
        for name in RUNNING
    }
    assert {name: ports for name, ports in published.items() if ports} == {"envoy": ["8000/tcp"]}
    networks = {name: set(stack.inspect(name)["NetworkSettings"]["Networks"]) for name in RUNNING}
    assert not networks["envoy"] & networks["postgres"]
    assert not networks["ollama"] & networks["postgres"]


def test_a_restart_of_each_container_loses_no_row(stack: Stack) -> None:
    with Caller(stack, "carl") as carl:
        stack.cli("limits", "set", "carl", "--gateway", "*", "--requests-per-day", "1000000")
        reached: set[str] = set()
        for service in RUNNING:
            with Busy(carl):
                carl.answers(more=10)
                reached |= set(stack.upstream_ids())
                stack.do("restart", service)
                stack.wait_well()
                carl.answers(more=10)
        reached |= set(stack.upstream_ids())
        expected = set(carl.answered)
        until(lambda: expected <= carl.rows().keys(), 30)
    # And what reached the model server, whether or not its answer reached the client.
    rows = {row["request_id"] for row in stack.cli("usage", "list", "--limit", "100000")}
    assert reached <= rows


def test_a_stop_lets_a_stream_end(stack: Stack) -> None:
    with Caller(stack, "dora") as dora:
        with dora.stream(tokens=20, gap=0.1) as answer:
            lines = answer.iter_lines()
            next(lines)
            stopping = stack.start("stop", "envoy")
            last = json.loads(list(lines)[-1])
        assert last["done"] is True
        assert stopping.wait(30) == 0
        stack.do("start", "envoy")
        stack.wait_well()
        row = until(dora.rows)[answer.headers["x-request-id"]]
    assert row["finished"] is True
    assert row["completion_tokens"] == 20
