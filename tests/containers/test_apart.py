"""The arrangement of the containers, as processes: each on its own, and nothing above them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from parallama import health, setup
from tests.e2e.gateway import CHAT, PARALLAMA, PATIENCE, Gateway, free_port, says, until
from tests.parallama.servers import Server
from tests.standin import StandIn
from tests.supervisor.supervised import wait_for_event

_CONFIG = """\
server: {{port: {port}}}
state_dir: state
database: {{path: users.db}}
authentication: {{signing_keys_dir: signing}}
redis: {{host: 127.0.0.1, port: {redis}, password_file: secrets/redis_password}}
api_gateways: {{ollama: {{host: "http://127.0.0.1", port: {upstream}}}}}
"""
_SERVICES = ("authz", "ratelimit", "usage_sink")
_ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("PARALLAMA_")}
# As compose.yaml has it: Envoy is given no password.
_ENVOYS = {"PARALLAMA_REDIS__PASSWORD_FILE": "null"}


@contextmanager
def process(log: Path, *argv: str | Path, **environ: str) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("ab") as out:
        made = subprocess.Popen(
            argv, env={**_ENVIRON, **environ}, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        yield made
    finally:
        if made.poll() is None:
            made.terminate()
            try:
                made.wait(20)
            except subprocess.TimeoutExpired:
                made.kill()
                made.wait()


def service(folder: Path, name: str) -> tuple[str | Path, ...]:
    return (sys.executable, "-P", "-m", name, "--config", folder / "config.yaml")


class Apart:
    def __init__(self, folder: Path, upstream: StandIn, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        passwords = folder / "secrets"
        passwords.mkdir()
        setup.make(passwords, folder / "state", folder / "signing")
        password = (passwords / "redis_password").read_text().strip()
        redis = stack.enter_context(
            Server(
                folder / "redis", (passwords / "valkey.conf").read_text().strip(), password=password
            )
        )
        self.config = folder / "config.yaml"
        self.config.write_text(
            _CONFIG.format(port=free_port(), redis=redis.port, upstream=upstream.port)
        )
        subprocess.run(
            [PARALLAMA, "db", "upgrade", "--config", self.config],
            env=_ENVIRON,
            check=True,
            capture_output=True,
            timeout=60,
        )
        self.services = {name: self.begin(name) for name in _SERVICES}
        self.envoy = stack.enter_context(
            process(folder / "up.log", PARALLAMA, "envoy", "--config", self.config, **_ENVOYS)
        )
        self.gateway = Gateway(folder, upstream, self.envoy)
        stack.callback(lambda: self.gateway.http.close())
        wait_for_event(self.gateway, "serving", service="up")

    def begin(self, name: str, module: str = "") -> "subprocess.Popen[bytes]":
        log = self.folder / "up.log"
        made = self._stack.enter_context(process(log, *service(self.folder, module or name)))
        until(lambda: self.healthy(name))
        return made

    def healthy(self, name: str) -> bool:
        path = self.folder / "state" / "run" / f"{name}.sock"
        return health.serves(f"unix:{path}" if name == "admin" else str(path))


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    with StandIn() as upstream, ExitStack() as stack:
        yield Apart(tmp_path_factory.mktemp("a"), upstream, stack)


def test_people_log_in_with_keys_that_nobody_had_to_make(apart: Apart) -> None:
    """Also where the admin process is not the one that made them, and comes back in between."""
    user = apart.gateway.someone()
    subprocess.run(
        [PARALLAMA, "users", "set-password", user.name, "--config", apart.config],
        env=_ENVIRON, input=b"correct horse battery", check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    given = {"username": user.name, "password": "correct horse battery"}
    before = None
    for _ in range(2):
        admin = apart.begin("admin", module="parallama.admin")
        told = until(lambda: logged_in(apart, given))
        for token in filter(None, (before, told["access_token"])):
            answer = apart.gateway.http.post(
                "/api/chat", json=CHAT, headers={"authorization": f"Bearer {token}"}
            )
            assert answer.status_code == 200, answer.text
        before = told["access_token"]
        admin.terminate()
        admin.wait()
    assert len([*(apart.folder / "signing").iterdir()]) == 1


def logged_in(apart: Apart, given: dict[str, str]) -> dict[str, str] | None:
    answer = apart.gateway.http.post("/auth/login", json=given)
    return dict(answer.json()) if answer.status_code == 200 else None


def test_calls_pass_and_are_rows(apart: Apart) -> None:
    answer = apart.gateway.someone(requests=10).post("/api/chat", {**CHAT, "stream": False})
    assert answer.status_code == 200, answer.text
    assert apart.gateway.row(answer)["token_source"] == "reported"


@pytest.mark.parametrize("name", _SERVICES)
def test_a_service_that_is_killed_comes_back_and_no_row_is_lost(apart: Apart, name: str) -> None:
    anna = apart.gateway.someone(requests=1000)

    def served() -> httpx.Response | None:
        answer = anna.post("/v1/chat/completions", CHAT)
        return answer if answer.status_code == 200 else None

    answers = [until(served)]
    apart.services[name].kill()
    apart.services[name].wait()
    assert not apart.healthy(name)
    if name == "usage_sink":
        answers.append(served())
    else:
        assert served() is None
    apart.begin(name)
    answers.append(until(served))
    assert all(apart.gateway.row(answer)["finished"] for answer in answers if answer is not None)
    assert None not in answers


@pytest.mark.parametrize("named", [(), ("envoy",)])
def test_envoy_is_replaced_where_there_is_no_way_to_a_database(
    apart: Apart, named: tuple[str, ...]
) -> None:
    text = apart.config.read_text()
    nowhere = apart.folder / "nowhere.yaml"
    nowhere.write_text(
        text.replace("{path: users.db}", "{host: 127.0.0.1, port: 9, name: x, user: x}")
    )
    anna, before = apart.gateway.someone(), apart.gateway.child("envoy")
    apart.gateway.http.close()
    del apart.gateway.http
    done = subprocess.run(
        [PARALLAMA, "restart", *named, "--config", nowhere],
        env={**_ENVIRON, **_ENVOYS}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "envoy restarted\n", "")
    assert apart.gateway.child("envoy") != before
    assert anna.post("/api/chat", CHAT).status_code == 200


# The last one: it stops Envoy.


def test_envoy_lets_a_stream_end_before_it_stops(apart: Apart) -> None:
    anna = apart.gateway.someone()
    with anna.stream(
        "/api/chat", {**CHAT, "stream": True}, headers=says(tokens=5, gap=0.1)
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        apart.envoy.send_signal(signal.SIGTERM)
        assert len(list(lines)) == 5
    assert apart.envoy.wait(PATIENCE) == 0
    assert apart.gateway.row(answer)["finished"]
    with pytest.raises(httpx.TransportError):
        anna.get("/api/tags")
