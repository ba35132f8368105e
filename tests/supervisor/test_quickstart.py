"""`make run`: from an empty folder to a line that works when it is pasted."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from parallama.config import load
from parallama.quickstart import choose_model
from tests.e2e.gateway import free_port, until
from tests.standin import StandIn
from tests.supervisor.supervised import ENVIRON, made

FINISHED = re.compile(
    r"\d\d:\d\d:\d\d demo \S+ /v1/chat/completions 200: tokens [\d,]+ in, [\d,]+ out,"
    r" first after \d+\.\d\d s, done after \d+\.\d\d s, [\d,]+ tokens left\n"
)


@dataclass
class Shown:
    """What `make run` shows, as far as it has come."""

    file: Path
    process: "subprocess.Popen[bytes]"
    port: int

    @property
    def text(self) -> str:
        return self.file.read_text()

    @property
    def key(self) -> str:
        return re.findall(r"Bearer (plm_\w+)'", self.text)[0]

    def paste(self) -> str:
        """The curl line, run by a shell as it stands."""
        (line,) = re.findall(r"^  curl .*?(?=\n\n)", self.text, re.MULTILINE | re.DOTALL)
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout


@contextmanager
def make_run(folder: Path, upstream_port: int) -> Iterator[Shown]:
    port = free_port()
    file = folder.with_suffix(".shown")
    environ = {
        "PARALLAMA_SERVER__PORT": str(port),
        "PARALLAMA_API_GATEWAYS__OLLAMA__PORT": str(upstream_port),
    }
    with file.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "parallama.quickstart", "--dir", folder],
            env=ENVIRON | environ,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    shown = Shown(file, process, port)
    try:
        until(lambda: process.poll() is not None or "Each finished" in shown.text, 60)
        yield shown
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(15) == 0, shown.text
    finally:
        process.kill()
        process.wait(5)


def private_files(folder: Path, secret: str) -> dict[str, int]:
    """Where the secret stands, and who may read it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.stat().st_mode & 0o777
        for path in files
        if secret.encode() in path.read_bytes()
    }


def test_an_ollama_is_used_and_without_one_the_bundled_model(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with StandIn(models=["llama3.2:1b"]) as ollama, make_run(folder, ollama.port) as shown:
        assert f"using the Ollama on http://127.0.0.1:{ollama.port}" in shown.text
        assert "llama3.2:1b behind it" in shown.text
        answer = shown.paste()
        assert answer.startswith("data: {")
        assert answer.endswith("data: [DONE]\n\n")
        until(lambda: FINISHED.search(shown.text))
        for client in ("curl ", "from openai import OpenAI", "from ollama import Client"):
            assert client in shown.text
        key = shown.key
        unused = free_port()
        alarming = [line for line in shown.text.splitlines() if re.search("WARN|ERROR", line)]
        assert alarming == []
        assert private_files(folder, key) == {"welcome.txt": 0o600, "secrets/demo_key": 0o600}

    pytest.importorskip("xllamacpp")
    with make_run(folder, unused) as shown:
        assert f"127.0.0.1:{unused} does not answer: using the small bundled model" in shown.text
        assert shown.key == key
        assert '"content":"' in shown.paste()
        until(lambda: FINISHED.search(shown.text))


@pytest.mark.parametrize(
    ("models", "chosen"),
    [
        pytest.param(["llama3.2:1b", "qwen3"], "llama3.2:1b", id="the latest"),
        pytest.param([], None, id="an Ollama without models"),
    ],
)
def test_which_model_is_shown(tmp_path: Path, models: list[str], chosen: str | None) -> None:
    with StandIn(models=models) as ollama:
        config = load(made(tmp_path, ollama.url), {})
        assert choose_model(config) == chosen
