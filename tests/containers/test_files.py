"""What compose.yaml and its neighbours say, looked at without any engine."""

import asyncio
import re
import socket
import stat
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from parallama import health, rpc, setup
from parallama.config import load
from tests.e2e.gateway import free_port

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONCE = ("setup", "migrate")
BEHIND = ("authz", "ratelimit", "usage_sink", "admin")
STAYING = [name for name in SERVICES if name not in ONCE]
OWN = [name for name in SERVICES if name != "ollama"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("name", OWN)
def test_every_container_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_is_checked_and_comes_back(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_logs_do_not_fill_the_disk() -> None:
    assert all("max-size" in service["logging"]["options"] for service in SERVICES.values())


def test_only_envoy_is_published_and_on_this_machine_alone() -> None:
    assert [name for name in SERVICES if "ports" in SERVICES[name]] == ["envoy"]
    assert SERVICES["envoy"]["ports"] == ["${PARALLAMA_LISTEN:-127.0.0.1:8000}:8000"]


def test_who_takes_requests_has_no_way_to_the_stores() -> None:
    on_stores = {name for name in SERVICES if "stores" in SERVICES[name].get("networks", [])}
    assert on_stores == {*BEHIND, "migrate", "postgres", "valkey"}
    assert COMPOSE["networks"]["stores"]["internal"] is True
    assert not [mount for mount in SERVICES["envoy"]["volumes"] if mount.startswith("secrets")]


def test_envoy_starts_after_the_services_and_so_stops_before_them() -> None:
    assert set(SERVICES["envoy"]["depends_on"]) == set(BEHIND)


def test_those_who_know_of_tokens_share_their_keys_and_nobody_else_has_them() -> None:
    at = load(ROOT / "containers" / "config.yaml", SERVICES["envoy"]["environment"]).signing_dir
    mount = f"signing:{at}"
    assert {name for name in SERVICES if mount in SERVICES[name].get("volumes", [])} == {
        *("setup", "authz", "admin")
    }
    assert SERVICES["setup"]["command"][-1] == str(at)
    assert not [name for name in STAYING if f"{mount}:ro" in SERVICES[name].get("volumes", [])]


def test_a_stop_leaves_time_to_drain() -> None:
    config = load(ROOT / "containers" / "config.yaml", SERVICES["envoy"]["environment"])
    for name in ("envoy", *BEHIND):
        grace = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert grace >= config.shutdown.drain_seconds + 20


def test_the_configuration_is_what_the_containers_are() -> None:
    config = load(ROOT / "containers" / "config.yaml", SERVICES["envoy"]["environment"])
    assert config.database.host in SERVICES
    assert config.redis.host in SERVICES
    assert str(config.state_dir) == "/var/lib/parallama"
    assert config.server.port == 8000
    assert SERVICES["postgres"]["environment"]["POSTGRES_USER"] == config.database.user
    assert SERVICES["postgres"]["environment"]["POSTGRES_DB"] == config.database.name


def test_no_password_stands_in_a_file() -> None:
    for path in (ROOT / "compose.yaml", ROOT / "containers" / "config.yaml", ROOT / "Dockerfile"):
        assert not re.search(r"(?i)password[=:] *[^\s/\"{$]", path.read_text())


# The image


def test_the_image_is_built_with_all_that_the_build_needs() -> None:
    named = re.search(r"/\^\((hatchling[^)]*)\)==/", DOCKERFILE)
    assert named is not None
    assert set(named[1].split("|")) == needs("hatchling")


def needs(name: str) -> set[str]:
    found = {name}
    for text in requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found |= needs(requirement.name)
    return found


def test_what_the_image_is_made_of_is_sent_to_the_builder() -> None:
    copied = re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", DOCKERFILE)
    sources = {source for line in copied for source in line.split()}
    admitted = re.findall(r"(?m)^!(.+)$", (ROOT / ".dockerignore").read_text())
    assert sources == set(admitted)
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_does_not_run_as_root() -> None:
    assert re.findall(r"(?m)^USER (.*)$", DOCKERFILE) == ["10001:10001"]


# What runs in it before and beside the services


def test_passwords_are_made_once_and_for_a_group_alone(tmp_path: Path) -> None:
    passwords, state, signing_keys = (tmp_path / name for name in ("secrets", "state", "signing"))
    passwords.mkdir()
    setup.make(passwords, state, signing_keys)
    before = {file.name: file.read_text() for file in passwords.iterdir()}
    assert before.keys() == {"db_password", "redis_password", "valkey.conf"}
    assert before["db_password"] != before["redis_password"]
    assert before["valkey.conf"] == f"requirepass {before['redis_password']}"
    assert {stat.S_IMODE(file.stat().st_mode) for file in passwords.iterdir()} == {0o440}
    assert stat.S_IMODE((state / "run").stat().st_mode) == 0o700
    (key,) = signing_keys.iterdir()
    assert (stat.S_IMODE(key.stat().st_mode), b"PRIVATE KEY" in key.read_bytes()) == (0o600, True)
    setup.make(passwords, state, signing_keys)
    assert {file.name: file.read_text() for file in passwords.iterdir()} == before
    assert [*signing_keys.iterdir()] == [key]


def test_a_password_that_was_half_written_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / ".db_password").write_text("hal")
    setup.make(tmp_path, tmp_path / "state", tmp_path / "signing")
    assert len((tmp_path / "db_password").read_text().strip()) > 40


def test_a_service_that_answers_is_healthy(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    assert not health.serves(path)

    async def story() -> bool:
        server = rpc.Server({})
        await server.start(path)
        try:
            return await asyncio.to_thread(health.serves, path)
        finally:
            await server.stop(0)

    assert asyncio.run(story())


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_one_that_hangs_up_is_not(tmp_path: Path, says: bytes) -> None:
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def hang_up() -> None:
            peer, _ = listening.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(says)

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert not health.serves(path)
        thread.join()


def test_one_that_says_nothing_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "a.sock"))
        listening.listen()
        assert not health.serves(str(tmp_path / "a.sock"))


@pytest.mark.parametrize(
    ("says", "well"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", True),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", False),
        (b"", False),
    ],
)
def test_http_on_a_socket_is_asked_for_an_answer(tmp_path: Path, says: bytes, well: bool) -> None:
    path = str(tmp_path / "a.sock")
    assert not health.serves(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def answer() -> None:
            peer, _ = listening.accept()
            with peer:
                assert peer.recv(1000).startswith(b"GET / HTTP/1.1\r\n")
                peer.sendall(says)

        thread = threading.Thread(target=answer)
        thread.start()
        assert health.serves(f"unix:{path}") is well
        thread.join()


@pytest.mark.parametrize("status", [200, 503])
def test_http_is_asked_for_its_status(status: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert health.serves(f"http://127.0.0.1:{server.server_port}/healthz") is (status == 200)
        thread.join()
    assert not health.serves(f"http://127.0.0.1:{free_port()}/healthz")
