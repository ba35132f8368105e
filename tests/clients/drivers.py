"""The client libraries, each in a process of its own that does what it is told."""

import json
import os
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".venv" / "clients"
PYTHON = HOME / "bin" / "python"
NODE = HOME / "bin" / "node"
PACKAGES = HOME / "npm"
HERE = Path(__file__).parent / "drivers"

LIBRARIES = {
    "ollama, Python": "ollama_python.py",
    "ollama, npm": "ollama_node.mjs",
    "openai, Python": "openai_python.py",
    "openai, npm": "openai_node.mjs",
    "anthropic, Python": "anthropic_python.py",
    "langchain-ollama": "langchain_python.py",
    "langchain-openai": "langchain_python.py",
    "llm, its Ollama plugin": "llm_python.py",
    "llm, as OpenAI's client": "llm_python.py",
    "litellm, of Ollama": "litellm_python.py",
    "litellm, of OpenAI": "litellm_python.py",
}
"""Those that share a process stand together; each call tells the API that it wants."""

# Nobody is told of the calls, nothing is looked up elsewhere, and no proxy stands between.
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_PROXY": "*",
    "PYTHONDONTWRITEBYTECODE": "",
}


def missing(name: str) -> str | None:
    """Why this library cannot be called here."""
    if not PYTHON.exists():
        return "the client libraries are not installed: make clients"
    if LIBRARIES[name].endswith(".mjs") and not (PACKAGES / "node_modules").exists():
        return "npm's registry did not answer when the clients were installed: make clients"
    return None


@dataclass
class Raised(Exception):
    """What a library raised: the names of its classes, and what it says."""

    kinds: tuple[str, ...]
    message: str


class Driver:
    """One library in its process. A process that does not answer in time is killed."""

    def __init__(self, script: str, folder: Path) -> None:
        self.script = script
        node = script.endswith(".mjs")
        command = [NODE] if node else [PYTHON]
        folder.mkdir()
        self._errors = folder / "stderr"
        environ = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, HERE / script],
                cwd=PACKAGES if node else folder,
                env={**environ, **QUIET, "HOME": str(folder), "LLM_USER_PATH": str(folder)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._does: frozenset[str] | None = None

    @property
    def does(self) -> frozenset[str]:
        """What it can be told to do, once it is there."""
        if self._does is None:
            self._does = frozenset(self._read()["does"])
        return self._does

    def do(self, what: str, *, url: str, key: str, **more: Any) -> Any:
        """What the library gave; raises Raised."""
        assert what in self.does, f"does only {sorted(self.does)}"
        assert self._process.stdin is not None
        asked = {"do": what, "url": url, "key": key, **more}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if "raised" in answer:
            raise Raised(tuple(answer["raised"]), answer["message"])
        return answer["gave"]

    @property
    def complaints(self) -> str:
        """What it wrote beside its answers."""
        return self._errors.read_text()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        watch = threading.Timer(60, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        assert line, f"the library's process ended: {self.complaints}"
        return json.loads(line)

    def stop(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
