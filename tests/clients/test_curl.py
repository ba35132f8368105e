"""
The `curl` lines of Ollama's documentation, as they stand.

What a reader would change, the address and the key, stands in a `.curlrc`: each line connects to
the gateway where it says localhost:11434, and sends the key.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from parallama.roles import Role
from tests.e2e.gateway import Gateway, Someone
from tests.standin import StandIn

WORDS = "w0 w1 w2 w3 w4 w5 w6 "
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAG0AAABm"  # how the documentation's picture begins
EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

GENERATES = {
    "generate": """curl http://localhost:11434/api/generate -d '{
  "model": "llama3.2",
  "prompt": "Why is the sky blue?"
}'""",
    "generate, not streamed": """curl http://localhost:11434/api/generate -d '{
  "model": "llama3.2",
  "prompt": "Why is the sky blue?",
  "stream": false
}'""",
    "generate with a suffix": """curl http://localhost:11434/api/generate -d '{
  "model": "codellama:code",
  "prompt": "def compute_gcd(a, b):",
  "suffix": "    return result",
  "options": {
    "temperature": 0
  },
  "stream": false
}'""",
    "generate from a picture": f"""curl http://localhost:11434/api/generate -d '{{
  "model": "llava",
  "prompt":"What is in this picture?",
  "stream": false,
  "images": ["{PICTURE}"]
}}'""",
    "generate, raw": """curl http://localhost:11434/api/generate -d '{
  "model": "mistral",
  "prompt": "[INST] why is the sky blue? [/INST]",
  "raw": true,
  "stream": false
}'""",
    "generate with options": """curl http://localhost:11434/api/generate -d '{
  "model": "llama3.2",
  "prompt": "Why is the sky blue?",
  "stream": false,
  "options": {
    "num_keep": 5,
    "seed": 42,
    "num_predict": 100,
    "top_k": 20,
    "top_p": 0.9,
    "stop": ["\\n", "user:"],
    "num_ctx": 1024,
    "num_thread": 8
  }
}'""",
    "chat": """curl http://localhost:11434/api/chat -d '{
  "model": "llama3.2",
  "messages": [
    {
      "role": "user",
      "content": "why is the sky blue?"
    }
  ]
}'""",
    "chat, with history": """curl http://localhost:11434/api/chat -d '{
  "model": "llama3.2",
  "messages": [
    {
      "role": "user",
      "content": "why is the sky blue?"
    },
    {
      "role": "assistant",
      "content": "due to rayleigh scattering."
    },
    {
      "role": "user",
      "content": "how is that different than mie scattering?"
    }
  ]
}'""",
    "chat about a picture": f"""curl http://localhost:11434/api/chat -d '{{
  "model": "llava",
  "messages": [
    {{
      "role": "user",
      "content": "what is in this image?",
      "images": ["{PICTURE}"]
    }}
  ]
}}'""",
    "OpenAI's chat": """curl http://localhost:11434/v1/chat/completions \\
    -H "Content-Type: application/json" \\
    -d '{
        "model": "llama2",
        "messages": [
            {
                "role": "system",
                "content": "You are a helpful assistant."
            },
            {
                "role": "user",
                "content": "Hello!"
            }
        ]
    }'""",
    "Anthropic's messages": """curl -X POST http://localhost:11434/v1/messages \\
-H "Content-Type: application/json" \\
-H "anthropic-version: 2023-06-01" \\
-d '{
  "model": "llama3.2",
  "max_tokens": 1024,
  "messages": [{ "role": "user", "content": "Hello, how are you?" }]
}'""",
}
JSON_MODE = """curl http://localhost:11434/api/generate -d '{
  "model": "llama3.2",
  "prompt": "What color is the sky at different times of the day? Respond using JSON",
  "format": "json",
  "stream": false
}'"""
SCHEMA = """curl -X POST http://localhost:11434/api/generate -H "Content-Type: application/json" -d '{
  "model": "llama3.1:8b",
  "prompt": "Ollama is 22 years old and is busy saving the world. Respond using JSON",
  "stream": false,
  "format": {
    "type": "object",
    "properties": {
      "age": {
        "type": "integer"
      },
      "available": {
        "type": "boolean"
      }
    },
    "required": [
      "age",
      "available"
    ]
  }
}'"""  # noqa: E501
TOOLS = """curl http://localhost:11434/api/chat -d '{
  "model": "llama3.2",
  "messages": [
    {
      "role": "user",
      "content": "What is the weather today in Paris?"
    }
  ],
  "stream": false,
  "tools": [
    {
      "type": "function",
      "function": {
        "name": "get_current_weather",
        "description": "Get the current weather for a location",
        "parameters": {
          "type": "object",
          "properties": {
            "location": {
              "type": "string",
              "description": "The location to get the weather for, e.g. San Francisco, CA"
            },
            "format": {
              "type": "string",
              "description": "The format to return the weather in",
              "enum": ["celsius", "fahrenheit"]
            }
          },
          "required": ["location", "format"]
        }
      }
    }
  ]
}'"""
LOADS = {
    "load": ("""curl http://localhost:11434/api/generate -d '{
  "model": "llama3.2"
}'""", "load"),
    "unload": ("""curl http://localhost:11434/api/generate -d '{
  "model": "llama3.2",
  "keep_alive": 0
}'""", "unload"),
    "load for a chat": ("""curl http://localhost:11434/api/chat -d '{
  "model": "llama3.2",
  "messages": []
}'""", "load"),
}  # fmt: skip
TELLS = {
    "tags": ("curl http://localhost:11434/api/tags", "models"),
    "ps": ("curl http://localhost:11434/api/ps", "models"),
    "version": ("curl http://localhost:11434/api/version", "version"),
    "OpenAI's models": ("curl http://localhost:11434/v1/models", "data"),
    "show": ("""curl http://localhost:11434/api/show -d '{
  "model": "llava"
}'""", "model_info"),
    "embed": ("""curl http://localhost:11434/api/embed -d '{
  "model": "all-minilm",
  "input": "Why is the sky blue?"
}'""", "embeddings"),
    "embed several": ("""curl http://localhost:11434/api/embed -d '{
  "model": "all-minilm",
  "input": ["Why is the sky blue?", "Why is the grass green?"]
}'""", "embeddings"),
    "embeddings": ("""curl http://localhost:11434/api/embeddings -d '{
  "model": "all-minilm",
  "prompt": "Here is an article about llamas..."
}'""", "embedding"),
}  # fmt: skip
MANAGES = {
    "pull": """curl http://localhost:11434/api/pull -d '{
  "model": "llama3.2"
}'""",
    "push": """curl http://localhost:11434/api/push -d '{
  "model": "mattw/pygmalion:latest"
}'""",
    "create": """curl http://localhost:11434/api/create -d '{
  "model": "mario",
  "from": "llama3.2",
  "system": "You are Mario from Super Mario Bros."
}'""",
    "copy": """curl http://localhost:11434/api/copy -d '{
  "source": "llama3.2",
  "destination": "llama3-backup"
}'""",
    "delete": """curl -X DELETE http://localhost:11434/api/delete -d '{
  "model": "llama3:13b"
}'""",
    "send a blob": f"curl -T model.gguf -X POST http://localhost:11434/api/blobs/{EMPTY}",
    "ask for a blob": f"curl -I http://localhost:11434/api/blobs/{EMPTY}",
}


@pytest.fixture(scope="module")
def operator(shared_gateway: Gateway) -> Someone:
    return shared_gateway.someone(role=Role.OPERATOR)


@pytest.fixture
def home(upstream: StandIn, operator: Someone, tmp_path: Path) -> Path:
    """Where `curl` is called."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    upstream.models[:] = ["llama3.2", "llama3.1:8b", "llama3:13b", "llava", "all-minilm", "llama2"]
    upstream.models += ["mistral", "codellama:code"]
    host, port = operator.gateway.address
    (tmp_path / ".curlrc").write_text(
        f'header = "Authorization: Bearer {operator.token}"\n'
        f'connect-to = "localhost:11434:{host}:{port}"\n'
        'noproxy = "*"\nsilent\nshow-error\nmax-time = 30\nwrite-out = "\\n%{http_code}"\n'
    )
    (tmp_path / "model.gguf").touch()
    return tmp_path


def call(line: str, home: Path) -> tuple[int, str]:
    """The status, and all that was printed before it."""
    environ = {**os.environ, "CURL_HOME": str(home), "HOME": str(home)}
    done = subprocess.run(
        ["bash", "-c", line], cwd=home, env=environ, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    text, _, status = done.stdout.decode().rpartition("\n")
    return int(status), text


def answer(line: str, home: Path) -> Any:
    status, text = call(line, home)
    assert status == 200, text
    return json.loads(text)


def said(part: dict[str, Any]) -> str:
    """The text in an answer, or a part of one, in any of the APIs."""
    if "choices" in part:
        part = part["choices"][0]
    if "content" in part:
        return str(part["content"][0]["text"])
    return str(part["response"] if "response" in part else part["message"]["content"])


@pytest.mark.parametrize("line", GENERATES.values(), ids=GENERATES)
def test_text(line: str, home: Path, upstream: StandIn) -> None:
    status, text = call(line, home)
    assert status == 200
    whole = text.startswith("{\n") or "\n" not in text.strip()
    parts = [json.loads(text)] if whole else [json.loads(row) for row in text.splitlines()]
    assert "".join(map(said, parts)) == WORDS
    assert upstream.last().images == line.count(PICTURE)
    streams = '"stream": false' not in line and "/api/" in line
    assert len(parts) == (8 if streams else 1)


@pytest.mark.parametrize("line", [JSON_MODE, SCHEMA], ids=["any", "of a schema"])
def test_json(line: str, home: Path) -> None:
    assert json.loads(answer(line, home)["response"]) == {"words": WORDS}


def test_tools(home: Path) -> None:
    (called,) = answer(TOOLS, home)["message"]["tool_calls"]
    assert called["function"]["name"] == "get_current_weather"
    assert called["function"]["arguments"] == {"location": "w0", "format": "celsius"}


@pytest.mark.parametrize(("line", "reason"), LOADS.values(), ids=LOADS)
def test_loading(line: str, reason: str, home: Path) -> None:
    assert answer(line, home)["done_reason"] == reason


@pytest.mark.parametrize(("line", "member"), TELLS.values(), ids=TELLS)
def test_telling(line: str, member: str, home: Path) -> None:
    assert answer(line, home)[member]


@pytest.mark.parametrize("name", MANAGES)
def test_managing(name: str, home: Path, upstream: StandIn) -> None:
    if name == "ask for a blob":
        upstream.blobs.add(EMPTY)
    status, text = call(MANAGES[name], home)
    assert status == (201 if name == "send a blob" else 200)
    if name in ("pull", "push", "create"):
        assert json.loads(text.splitlines()[-1]) == {"status": "success"}
    if name == "delete":
        assert "llama3:13b" not in upstream.models


def test_an_error(home: Path) -> None:
    status, text = call(GENERATES["chat"].replace("llama3.2", "unheard-of"), home)
    assert (status, json.loads(text)) == (404, {"error": "model 'unheard-of' not found"})


def test_ending_the_command_ends_the_work(home: Path, upstream: StandIn) -> None:
    behaviour = {"tokens": 1000, "hold_at": 3}
    line = GENERATES["chat"].replace(
        "curl", f"exec curl -N -H 'x-standin: {json.dumps(behaviour)}'"
    )
    environ = {**os.environ, "CURL_HOME": str(home)}
    with subprocess.Popen(["bash", "-c", line], env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert [said(json.loads(process.stdout.readline())) for _ in "01"] == ["w0 ", "w1 "]
        process.terminate()
    seen = upstream.wait(lambda seen: seen.client_gone, timeout=1)
    assert seen.emitted < 4
