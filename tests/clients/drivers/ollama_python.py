"""The `ollama` library."""

import json
import os
from functools import cache
from typing import Any

import ollama
from told import MESSAGES, PICTURE, QUESTION, TEXTS, TOOL, Asked, drive, first, said


@cache
def client(asked: Asked) -> ollama.Client:
    os.environ["OLLAMA_HOST"], os.environ["OLLAMA_API_KEY"] = asked.url, asked.key
    return ollama.Client(timeout=30)


def chat(asked: Asked, **more: Any) -> Any:
    return client(asked).chat(asked.model, asked.messages, **more)


def whole(asked: Asked) -> Any:
    answer = chat(asked)
    return said(answer.message.content, answer.prompt_eval_count, answer.eval_count)


def generate(asked: Asked) -> Any:
    answer = client(asked).generate(asked.model, QUESTION)
    return said(answer.response, answer.prompt_eval_count, answer.eval_count)


def tool(asked: Asked) -> Any:
    (call,) = chat(asked, tools=[TOOL]).message.tool_calls
    return [call.function.name, dict(call.function.arguments)]


def picture(asked: Asked) -> Any:
    messages = [{**MESSAGES[0], "images": [PICTURE]}]
    return client(asked).chat(asked.model, messages).message.content


def cancel(asked: Asked) -> Any:
    parts = chat(asked, stream=True)
    taken = first(parts, 2)
    parts.close()
    return [part.message.content for part in taken]


def manage(asked: Asked) -> Any:
    c = client(asked)
    states = [part.status for part in c.pull("new", stream=True)]
    c.copy("new", "copied")
    c.create("made", from_="copied")
    digest = c.create_blob(__file__)
    for name in ("new", "copied", "made"):
        c.delete(name)
    return [states[0], states[-1], digest[:7]]


drive(
    {
        "list": lambda asked: [m.model for m in client(asked).list().models],
        "running": lambda asked: [m.model for m in client(asked).ps().models],
        "show": lambda asked: client(asked).show(asked.model).capabilities,
        "chat": whole,
        "stream": lambda asked: [p.message.content for p in chat(asked, stream=True)],
        "generate": generate,
        "tool": tool,
        "picture": picture,
        "json": lambda asked: json.loads(chat(asked, format="json").message.content),
        "embed": lambda asked: client(asked).embed(asked.model, TEXTS).embeddings,
        "cancel": cancel,
        "manage": manage,
    }
)
