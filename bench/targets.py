"""What is measured: bare Envoy and Parallama, each started in front of the same upstream."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import procs

_BARE = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bare
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: /}}
                route: {{cluster: upstream, timeout: 0s}}
          http_filters:
          - name: router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
  - name: upstream
    type: STATIC
    load_assignment:
      cluster_name: upstream
      endpoints:
      - lb_endpoints:
        - endpoint:
            address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}
"""  # noqa: E501


@dataclass(slots=True)
class Target:
    """A running gateway."""

    name: str
    port: int
    root: int
    """The process all others are below."""
    headers: dict[str, str] = field(default_factory=dict)

    def pids(self) -> dict[int, str]:
        return procs.tree(self.root)

    def request(self, path: str, body: dict[str, Any]) -> str:
        """A whole HTTP/1.1 request as the load client sends it."""
        text = json.dumps(body)
        headers = {
            "host": f"127.0.0.1:{self.port}",
            "content-type": "application/json",
            "content-length": str(len(text)),
            **self.headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {path} HTTP/1.1\r\n{lines}\r\n{text}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _process(
    command: list[str], log: Path, environ: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block; what it says goes to `log`."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environ)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _serving(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _wait(
    check: Callable[[], bool], log: Path, process: subprocess.Popen[bytes], seconds: float = 60.0
) -> None:
    """Returns once the check holds; ends the run, with the log's end, where it does not come to."""
    until = time.monotonic() + seconds
    while not check():
        if process.poll() is not None or time.monotonic() > until:
            tail = log.read_text(errors="replace")[-3000:]
            raise SystemExit(f"{log.name} did not start serving:\n{tail}")
        time.sleep(0.05)


def envoy_binary() -> str:
    beside = os.path.dirname(sys.executable)
    found = shutil.which("envoy", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise SystemExit("no envoy beside this Python and none on the path")
    return found


@contextlib.contextmanager
def bare_envoy(directory: Path, upstream: int, concurrency: str = "1") -> Iterator[Target]:
    """One listener, the router, one cluster: what Envoy costs by itself."""
    port = free_port()
    config = directory / "bare.yaml"
    config.write_text(_BARE.format(port=port, upstream=upstream))
    log = directory / "bare-envoy.log"
    command = [envoy_binary(), "-c", str(config), "--concurrency", concurrency, "-l", "warning"]
    with _process([*command, "--disable-hot-restart"], log) as process:
        _wait(lambda: _serving(port, "/"), log, process)
        yield Target("bare", port, process.pid)


@contextlib.contextmanager
def parallama(directory: Path, upstream: int, program: Path) -> Iterator[Target]:
    """The whole chain on one machine, with a user whose limits are counted and never reached."""
    port = free_port()
    state = directory / "state"
    environ = {**os.environ, "PARALLAMA_CONFIG": str(state / "config.yaml")}

    def run(*words: str) -> str:
        done = subprocess.run(
            [str(program), *words], env=environ, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"parallama {' '.join(words)}: {done.stderr or done.stdout}")
        return done.stdout

    url = f"http://127.0.0.1:{upstream}"
    run("init", "--dir", str(state), "--listen", f"127.0.0.1:{port}", "--upstream", url)
    run("users", "create", "bench", "--role", "user", "-o", "json")
    key = json.loads(run("keys", "create", "bench", "-o", "json"))["key"]
    limits = ["--requests-per-minute", "100000000", "--tokens-per-day", "1000000000"]
    run("limits", "set", "bench", "--gateway", "*", *limits)
    log = directory / "parallama-up.log"
    command = [str(program), "up", "--config", environ["PARALLAMA_CONFIG"]]
    with _process(command, log, environ) as process:
        _wait(lambda: _serving(port, "/healthz"), log, process)
        yield Target("parallama", port, process.pid, {"authorization": f"Bearer {key}"})
