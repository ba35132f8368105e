"""The `llm` library, with its plugin for Ollama and as a client of OpenAI's API."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llm
from told import QUESTION, Asked, drive, said

FOLDER = Path(os.environ["LLM_USER_PATH"])


def name(asked: Asked) -> str:
    """What `llm` calls the model, once it is told of the server: by the environment or a file."""
    os.environ["OLLAMA_HOST"], os.environ["OLLAMA_API_KEY"] = asked.url, asked.key
    if asked.ollama:
        return f"ollama/{asked.model}"
    entry = {"model_id": "mine", "model_name": asked.model, "api_base": f"{asked.url}/v1"}
    entry |= {"api_key_name": "parallama", "supports_tools": True, "supports_schema": True}
    (FOLDER / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    (FOLDER / "keys.json").write_text(json.dumps({"parallama": asked.key}))
    return "mine"


def model(asked: Asked) -> Any:
    return llm.get_model(name(asked))


def whole(asked: Asked) -> Any:
    answer = model(asked).prompt(asked.messages[0]["content"], stream=False)
    text = answer.text()
    return said(text, answer.usage().input, answer.usage().output)


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sun in {city}"


def tool(asked: Asked) -> Any:
    (call,) = model(asked).prompt(QUESTION, tools=[weather], stream=False).tool_calls()
    return [call.name, call.arguments]


def an_object(asked: Asked) -> Any:
    schema = {"type": "object", "properties": {"words": {"type": "string"}}}
    return json.loads(model(asked).prompt(QUESTION, schema=schema, stream=False).text())


def cancel(asked: Asked) -> Any:
    """As of somebody who ends the command."""
    command = [sys.executable, "-m", "llm", "--model", name(asked), QUESTION]
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=nothing) as process:
        assert process.stdout is not None
        text = process.stdout.read(6).decode()
        process.terminate()
    return [text[:3], text[3:]]


drive(
    {
        "chat": whole,
        "stream": lambda asked: list(model(asked).prompt(QUESTION)),
        "tool": tool,
        "json": an_object,
        "cancel": cancel,
    }
)
