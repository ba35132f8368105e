"""The `openai` library."""

import json
import os
from functools import cache
from typing import Any

import openai
from told import MESSAGES, PICTURE_URL, QUESTION, TEXTS, TOOL, WEATHER, Asked, drive, first, said


@cache
def client(asked: Asked) -> openai.OpenAI:
    os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"] = f"{asked.url}/v1", asked.key
    return openai.OpenAI(timeout=30, max_retries=0)


def chat(asked: Asked, **more: Any) -> Any:
    given = {"messages": asked.messages, **more}
    return client(asked).chat.completions.create(model=asked.model, **given)


def whole(asked: Asked) -> Any:
    answer = chat(asked)
    usage = answer.usage
    return said(answer.choices[0].message.content, usage.prompt_tokens, usage.completion_tokens)


def generate(asked: Asked) -> Any:
    answer = client(asked).completions.create(model=asked.model, prompt=QUESTION)
    usage = answer.usage
    return said(answer.choices[0].text, usage.prompt_tokens, usage.completion_tokens)


def respond(asked: Asked) -> Any:
    answer = client(asked).responses.create(model=asked.model, input=QUESTION)
    return said(answer.output_text, answer.usage.input_tokens, answer.usage.output_tokens)


def respond_in_parts(asked: Asked) -> Any:
    with client(asked).responses.stream(model=asked.model, input=QUESTION) as events:
        parts = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert events.get_final_response().output_text == "".join(parts)
    return parts


def tool(asked: Asked) -> Any:
    (call,) = chat(asked, tools=[TOOL]).choices[0].message.tool_calls
    return [call.function.name, json.loads(call.function.arguments)]


def tool_of_responses(asked: Asked) -> Any:
    tools = [{"type": "function", **WEATHER}]
    answer = client(asked).responses.create(model=asked.model, input=QUESTION, tools=tools)
    (call,) = answer.output
    return [call.name, json.loads(call.arguments)]


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
    answer = client(asked).embeddings.create(model=asked.model, input=TEXTS)
    return [item.embedding for item in answer.data]


def cancel(asked: Asked) -> Any:
    with chat(asked, stream=True) as parts:
        return [part.choices[0].delta.content for part in first(parts, 2)]


drive(
    {
        "list": lambda asked: [model.id for model in client(asked).models.list()],
        "show": lambda asked: client(asked).models.retrieve(asked.model).id,
        "chat": whole,
        "stream": lambda asked: [c.choices[0].delta.content for c in chat(asked, stream=True)],
        "generate": generate,
        "respond": respond,
        "respond_in_parts": respond_in_parts,
        "tool": tool,
        "tool_of_responses": tool_of_responses,
        "picture": picture,
        "json": an_object,
        "embed": embed,
        "cancel": cancel,
    }
)
