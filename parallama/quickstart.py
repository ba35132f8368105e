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

_OLLAMA = ("127.0.0.1", 11434)
_LISTEN = "127.0.0.1:8000"
_USER = "demo"
_CONFLICT = 4

_WELCOME = """
Parallama serves on {url}, with {model} behind it. User: {user}. Stop with Ctrl-C.

  curl {url}/v1/chat/completions -N -H 'Authorization: Bearer {key}' \\
    -d '{{"model":"{model}","stream":true,"messages":[{{"role":"user","content":"Say hello."}}]}}'

Python, with the openai package:

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="{key}")
  answer = client.chat.completions.create(
      model="{model}", messages=[{{"role": "user", "content": "Say hello."}}])
  print(answer.choices[0].message.content)

Python, with the ollama package{ollama_note}:

  from ollama import Client
  client = Client(host="{url}", headers={{"Authorization": "Bearer {key}"}})
  print(client.chat("{model}", [{{"role": "user", "content": "Say hello."}}]).message.content)

Users, keys, limits, usage (in another terminal):

  export PARALLAMA_CONFIG={config}
  {parallama} limits set {user} --gateway '*' --tokens-per-hour 20000
  {parallama} usage list

Each finished request is shown below.

"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m parallama.quickstart")
    parser.add_argument("--dir", type=Path, required=True, help="keeps configuration and state")
    folder: Path = parser.parse_args().dir.resolve()
    config = folder / "config.yaml"
    if not config.exists():
        upstream = "http://{}:{}".format(*_OLLAMA)
        _run("init", "--dir", str(folder), "--listen", _LISTEN, "--upstream", upstream)
    os.environ["PARALLAMA_CONFIG"] = str(config)
    _run("db", "upgrade")

    models = _ollama_models()
    if models is None:
        print(f"no Ollama on {_OLLAMA[0]}:{_OLLAMA[1]}: using the bundled model", flush=True)
        os.environ["PARALLAMA_MODEL__BUNDLED"] = "true"
    model = BUNDLED_MODEL if models is None else next(iter(models), "llama3.2")
    welcome = folder / "welcome.txt"
    _write_private(
        welcome,
        _WELCOME.format(
            url=_url(config),
            model=model,
            user=_USER,
            key=_key(folder),
            config=config,
            parallama=Path(sys.executable).parent / "parallama",
            ollama_note=" (needs an Ollama: the bundled server has no /api/)"
            if models is None
            else "",
        ),
    )
    supervisor = [sys.executable, "-m", "parallama.supervisor", str(config)]
    os.execv(sys.executable, [*supervisor, "--welcome", str(welcome)])  # noqa: S606


def _url(config: Path) -> str:
    from parallama.config import load

    server = load(config, os.environ).server
    return f"http://{server.host}:{server.port}"


def _ollama_models() -> list[str] | None:
    """Names of the models of a local Ollama; None where none answers."""
    connection = http.client.HTTPConnection(*_OLLAMA, timeout=2)
    try:
        connection.request("GET", "/api/tags")
        answer = json.load(connection.getresponse())
        return [model["name"] for model in answer["models"]]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    finally:
        connection.close()


def _key(folder: Path) -> str:
    """The demo user's key: made once, then kept for the next `make run` in a private file."""
    kept = folder / "secrets" / "demo_key"
    if not kept.exists():
        _run("users", "create", _USER, "--role", "user", accept=(0, _CONFLICT))
        made: Any = json.loads(_run("keys", "create", _USER, "--name", "demo", "-o", "json"))
        _write_private(kept, made["key"])
    return kept.read_text(encoding="utf-8")


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def _run(*arguments: str, accept: tuple[int, ...] = (0,)) -> str:
    command = [sys.executable, "-m", "parallama", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode not in accept:
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
