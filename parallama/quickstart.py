"""`make run`: a first try with a real model, up to a key and lines that work as they are."""

import argparse
import http.client
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from parallama.bundled_model import NAME as BUNDLED_MODEL
from parallama.config import Config, load
from parallama.errors import ParallamaError

_LISTEN = "127.0.0.1:8000"
_OLLAMA = "http://127.0.0.1:11434"
_USER = "demo"
_TOKENS_PER_HOUR = "100000"
_CONFLICT = 4

_WELCOME = """
Parallama serves on {url}, with {model} behind it. User: {user}. Stop with Ctrl-C.

  curl {url}/v1/chat/completions -N -H 'Authorization: Bearer {key}' \\
    -d '{{"model":"{model}","stream":true,"max_tokens":100,
         "messages":[{{"role":"user","content":"Say hello."}}]}}'

Python, with the openai package:

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="{key}")
  answer = client.chat.completions.create(
      model="{model}", max_tokens=100, messages=[{{"role": "user", "content": "Say hello."}}])
  print(answer.choices[0].message.content)

Python, with the ollama package{ollama_note}:

  from ollama import Client
  client = Client(host="{url}", headers={{"Authorization": "Bearer {key}"}})
  answer = client.chat("{model}", [{{"role": "user", "content": "Say hello."}}])
  print(answer.message.content)

Users, keys, limits, usage (in another terminal):

  export PARALLAMA_CONFIG={config}
  {parallama} limits list
  {parallama} usage list

Each finished request is shown below.

"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m parallama.quickstart")
    parser.add_argument("--dir", type=Path, required=True, help="keeps configuration and state")
    folder: Path = parser.parse_args().dir.resolve()
    path = folder / "config.yaml"
    os.environ["PARALLAMA_CONFIG"] = str(path)
    os.environ.setdefault("PARALLAMA_LOGGING__FORMAT", "text")
    if not path.exists():
        _say(f"making {folder}")
        _run("init", "--dir", str(folder), "--listen", _LISTEN, "--upstream", _OLLAMA)
    try:
        config = load(path, os.environ)
    except ParallamaError as error:
        sys.exit(str(error))
    _run("db", "upgrade")
    model = choose_model(config)
    bundled = model is None
    os.environ["PARALLAMA_MODEL__BUNDLED"] = str(bundled).lower()
    host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    welcome = _WELCOME.format(
        url=f"http://{host}:{config.server.port}",
        model=model or BUNDLED_MODEL,
        user=_USER,
        key=_key(folder),
        config=path,
        parallama=Path(sys.executable).parent / "parallama",
        ollama_note=" (needs an Ollama: the bundled server has no /api/)" if bundled else "",
    )
    _write_private(folder / "welcome.txt", welcome)
    supervisor = [sys.executable, "-P", "-m", "parallama.supervisor", str(path)]
    os.execv(sys.executable, [*supervisor, "--welcome", str(folder / "welcome.txt")])  # noqa: S606


def choose_model(config: Config) -> str | None:
    """A model of the configured Ollama, or None: then the bundled one has to do."""
    url = config.api_gateways.ollama.url
    names = _ollama_models(*config.api_gateways.ollama.upstream())
    if names:
        _say(f"using the Ollama on {url}")
        return names[0]
    said = "does not answer" if names is None else "has no model to chat with yet"
    _say(f"an Ollama on {url} {said}: using the small bundled model")
    return None


def _ollama_models(scheme: str, host: str, port: int) -> list[str] | None:
    """Names of its models that write text, the latest first; None where no Ollama answers."""
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    connection = kind(host, port, timeout=2)
    try:
        connection.request("GET", "/api/tags")
        models = json.load(connection.getresponse())["models"]
        # Models for embeddings are of BERT's family.
        return [model["name"] for model in models if "bert" not in str(model.get("details"))]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
        return None
    finally:
        connection.close()


def _key(folder: Path) -> str:
    """The demo user's key: made once, then kept for the next `make run` in a private file."""
    kept = folder / "secrets" / "demo_key"
    if _run("users", "create", _USER, "--role", "user", accept=(0, _CONFLICT)):
        _run("limits", "set", _USER, "--gateway", "*", "--tokens-per-hour", _TOKENS_PER_HOUR)
    elif kept.exists():
        key = kept.read_text(encoding="utf-8")
        known = json.loads(_run("keys", "list", "--user", _USER, "-o", "json"))
        if any(key.startswith(at["key_prefix"]) and at["state"] == "active" for at in known):
            return key
    _say(f"making a key for the user {_USER}")
    made: Any = json.loads(_run("keys", "create", _USER, "--name", "demo", "-o", "json"))
    _write_private(kept, made["key"])
    return kept.read_text(encoding="utf-8")


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(*arguments: str, accept: tuple[int, ...] = (0,)) -> str:
    """What a command of ours wrote; nothing where it failed in a way that is accepted."""
    command = [sys.executable, "-P", "-m", "parallama", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode not in accept:
        sys.stderr.write(done.stderr)
        sys.exit(done.returncode)
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    main()
