"""`litellm` as a client of either API."""

import json
from typing import Any

import litellm
from told import MESSAGES, PICTURE_URL, QUESTION, TEXTS, TOOL, Asked, drive, first, said


def given(asked: Asked) -> dict[str, Any]:
    told = {"api_key": asked.key, "timeout": 30, "max_retries": 0}
    if asked.ollama:
        return {**told, "model": f"ollama_chat/{asked.model}", "api_base": asked.url}
    return {**told, "model": f"openai/{asked.model}", "api_base": f"{asked.url}/v1"}


def chat(asked: Asked, **more: Any) -> Any:
    return litellm.completion(**given(asked), **{"messages": asked.messages, **more})


def text(part: Any) -> Any:
    return part.choices[0].delta.content


def whole(asked: Asked) -> Any:
    answer = chat(asked)
    usage = answer.usage
    return said(answer.choices[0].message.content, usage.prompt_tokens, usage.completion_tokens)


def tool(asked: Asked) -> Any:
    (call,) = chat(asked, tools=[TOOL]).choices[0].message.tool_calls
    return [call.function.name, json.loads(call.function.arguments)]


def picture(asked: Asked) -> Any:
    parts = [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": PICTURE_URL}},
    ]
    answer = chat(asked, messages=[{**MESSAGES[0], "content": parts}])
    return answer.choices[0].message.content


def an_object(asked: Asked) -> Any:
    answer = chat(asked, response_format={"type": "json_object"})
    return json.loads(answer.choices[0].message.content)


def embed(asked: Asked) -> Any:
    answer = litellm.embedding(**given(asked), input=TEXTS)
    return [item["embedding"] for item in answer.data]


def cancel(asked: Asked) -> Any:
    parts = chat(asked, stream=True)
    taken = [text(part) for part in first(parts, 2)]
    if not asked.ollama:  # there it is enough to let go of it
        parts.completion_stream.close()
    return taken


drive(
    {
        "chat": whole,
        "stream": lambda asked: [text(part) for part in chat(asked, stream=True)],
        "tool": tool,
        "picture": picture,
        "json": an_object,
        "embed": embed,
        "cancel": cancel,
    }
)
