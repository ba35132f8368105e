"""What keeps `parallama up` from starting: told in words that help, with nothing left running."""

import http.server
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from parallama.config import load
from parallama.supervisor.envoy_files import packaged
from tests.e2e.gateway import free_port, until
from tests.standin import StandIn
from tests.supervisor.supervised import ENVIRON, UP, made, refused, up

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return made(tmp_path, NOBODY)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own; only root may do that."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=False)
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_port_that_is_taken(config: Path) -> None:
    server = load(config, ENVIRON).server
    with socket.create_server((server.host, server.port)):
        said = refused(config)
    assert f"cannot listen on {server.host}:{server.port} (Address already in use)" in said
    assert "server.port" in said
    assert not (config.parent / "state" / "run" / "children.json").exists()


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="needs IPv6")
def test_a_port_that_is_taken_on_ipv6(config: Path) -> None:
    with socket.create_server(("::1", free_port()), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        environ = {"PARALLAMA_SERVER__HOST": "::1", "PARALLAMA_SERVER__PORT": str(port)}
        assert f"cannot listen on [::1]:{port} " in refused(config, environ=environ)


def test_a_state_folder_that_cannot_be_made(config: Path) -> None:
    said = refused(config, environ={"PARALLAMA_STATE_DIR": str(config / "state")})
    assert f"cannot write in state_dir {config / 'state'} (Not a directory): make it" in said


def test_a_state_folder_that_is_read_only(config: Path) -> None:
    state = config.parent / "state"
    with mounted(state, "ro"):
        assert f"cannot write in state_dir {state} (Read-only file system)" in refused(config)


def test_a_state_folder_that_is_full(config: Path) -> None:
    state = config.parent / "state"
    with mounted(state, "size=64k"):
        assert f"cannot write in state_dir {state} (No space left on device)" in refused(config)


def test_a_state_folder_whose_name_is_too_long_for_sockets(config: Path) -> None:
    said = refused(config, environ={"PARALLAMA_STATE_DIR": str(config.parent / ("long" * 30))})
    assert "too long a path for a unix socket: set state_dir to a shorter one" in said


def test_a_schema_that_is_behind(config: Path) -> None:
    with closing(sqlite3.connect(config.parent / "parallama.db")) as db:
        db.execute("DELETE FROM alembic_version")
        db.commit()
    assert "parallama db upgrade" in refused(config)
    assert not (config.parent / "state").exists()


def test_a_database_that_is_not_there(config: Path) -> None:
    (config.parent / "parallama.db").unlink()
    assert "run `parallama db upgrade`" in refused(config)


def test_a_configuration_with_mistakes(config: Path) -> None:
    with config.open("a") as file:
        file.write("sever: {port: 1}\nusage: {batch_rows: many}\n")
    said = refused(config)
    assert "2 mistakes" in said
    assert "did you mean server?" in said
    assert not (config.parent / "state").exists()


def _misspelt(name: str) -> Callable[[str], str]:
    return lambda text: text.replace(name, name + "x")


MISTAKES: dict[str, tuple[str, Callable[[str], str], str]] = {
    "field": ("envoy.yaml", _misspelt("failure_mode_allow"), "'failure_mode_allowx'"),
    "not yaml": ("envoy.yaml", lambda text: text + "}", "is not YAML"),
    "no listener": ("envoy.yaml", _misspelt("name: gateway"), "nothing is named gateway"),
    "route": ("routes.yaml", _misspelt("auto_host_rewrite"), "'auto_host_rewritex'"),
    "no routes": ("routes.yaml", lambda text: "", "compare them with"),
    "cluster": ("clusters.yaml", _misspelt("STRICT_DNS"), "STRICT_DNSx"),
    "no upstream": ("clusters.yaml", _misspelt("name: upstream"), "nothing is named upstream"),
    "lua": ("lua/usage.lua", lambda text: f"local = 1\n{text}", "'<name>' expected"),
}


@pytest.mark.parametrize(("file", "change", "cause"), MISTAKES.values(), ids=MISTAKES)
def test_envoy_files_with_mistakes(
    config: Path, file: str, change: Callable[[str], str], cause: str
) -> None:
    folder = config.parent / "envoy"
    shutil.copytree(packaged(), folder)
    path = folder / file
    path.write_text(change(path.read_text()))
    said = refused(config, environ={"PARALLAMA_ENVOY__DIR": str(folder)})
    assert cause in said
    assert len(said) < 2000


def test_a_service_that_cannot_start_ends_all(config: Path) -> None:
    in_the_way = config.parent / "state" / "run" / "authz.sock"
    in_the_way.mkdir(parents=True)
    done = subprocess.run(
        [*UP, config], env=ENVIRON, capture_output=True, timeout=20, check=False, text=True
    )
    assert done.returncode == 1
    assert "parallama up: authz does not start (code 1): its own messages are above" in done.stderr


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"object":"list","data":[{"id":"over-tls","object":"model"}]}'
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def over_tls(folder: Path) -> Iterator[tuple[int, Path]]:
    """A server for `localhost` with a certificate of its own: its port, and what to trust."""
    certificate, key = folder / "ca.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, certificate
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_an_upstream_over_tls_is_verified(tmp_path: Path) -> None:
    with StandIn() as unused, over_tls(tmp_path) as (port, trusted):
        config = made(tmp_path, f"https://localhost:{port}")
        with up(tmp_path, unused, environ={"SSL_CERT_FILE": str(trusted)}) as gateway:
            someone = gateway.someone()
            # More than once: `localhost` has two addresses, and the server has one.
            for _ in range(4):
                assert "over-tls" in someone.get("/v1/models").text
            # The same server, by a name that is not in its certificate.
            config.write_text(config.read_text().replace("//localhost", "//127.0.0.1"))
            gateway.process.send_signal(signal.SIGHUP)
            until(lambda: someone.get("/api/status").status_code == 503)
