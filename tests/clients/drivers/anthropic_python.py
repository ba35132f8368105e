"""The `anthropic` library."""

import os
from functools import cache
from typing import Any

import anthropic
from told import CITY, MESSAGES, PICTURE, QUESTION, Asked, drive, first, said


@cache
def client(asked: Asked) -> anthropic.Anthropic:
    os.environ["ANTHROPIC_BASE_URL"], os.environ["ANTHROPIC_API_KEY"] = asked.url, asked.key
    return anthropic.Anthropic(timeout=30, max_retries=0)


def told(asked: Asked, **more: Any) -> Any:
    return {"model": asked.model, "max_tokens": 50, "messages": asked.messages, **more}


def ask(asked: Asked, **more: Any) -> Any:
    return client(asked).messages.create(**told(asked, **more))


def whole(asked: Asked) -> Any:
    answer = ask(asked)
    return said(answer.content[0].text, answer.usage.input_tokens, answer.usage.output_tokens)


def stream(asked: Asked) -> Any:
    with client(asked).messages.stream(**told(asked)) as events:
        parts = list(events.text_stream)
        assert events.get_final_message().usage.output_tokens == len(parts)
    return parts


def tool(asked: Asked) -> Any:
    (call,) = ask(asked, tools=[{"name": "weather", "input_schema": CITY}]).content
    return [call.name, call.input]


def picture(asked: Asked) -> Any:
    source = {"type": "base64", "media_type": "image/png", "data": PICTURE}
    parts = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    return ask(asked, messages=[{**MESSAGES[0], "content": parts}]).content[0].text


def cancel(asked: Asked) -> Any:
    with client(asked).messages.stream(**told(asked)) as events:
        return first(events.text_stream, 2)


drive(
    {
        "list": lambda asked: [model.id for model in client(asked).models.list()],
        "chat": whole,
        "stream": stream,
        "tool": tool,
        "picture": picture,
        "cancel": cancel,
    }
)
