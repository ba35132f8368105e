"""`langchain-ollama` and `langchain-openai`."""

import json
from functools import cache
from typing import Any

from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from told import CITY, MESSAGES, PICTURE_URL, QUESTION, TEXTS, Asked, drive, first, said


def _given(asked: Asked) -> dict[str, Any]:
    given: dict[str, Any] = {"model": asked.model}
    if asked.ollama:
        headers = {"authorization": f"Bearer {asked.key}"}
        return {**given, "base_url": asked.url, "client_kwargs": {"headers": headers}}
    return {**given, "base_url": f"{asked.url}/v1", "api_key": asked.key, "max_retries": 0}


@cache
def chat(asked: Asked, form: str | None = None) -> Any:
    if asked.ollama:
        return ChatOllama(**_given(asked), format=form)
    return ChatOpenAI(**_given(asked))


def embeddings(asked: Asked) -> Any:
    if asked.ollama:
        return OllamaEmbeddings(**_given(asked))
    # Ollama takes texts, and this library would send their tokens.
    return OpenAIEmbeddings(**_given(asked), check_embedding_ctx_length=False)


def whole(asked: Asked) -> Any:
    answer = chat(asked).invoke(asked.messages)
    told = answer.usage_metadata
    return said(answer.content, told["input_tokens"], told["output_tokens"])


def generate(asked: Asked) -> Any:
    model = OllamaLLM(**_given(asked)) if asked.ollama else OpenAI(**_given(asked))
    return said(model.invoke(QUESTION), 11, 7)


def tool(asked: Asked) -> Any:
    schema = {"title": "weather", "description": "The weather in a city", **CITY}
    (call,) = chat(asked).bind_tools([schema]).invoke(MESSAGES).tool_calls
    return [call["name"], call["args"]]


def picture(asked: Asked) -> Any:
    parts = [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": PICTURE_URL}},
    ]
    return chat(asked).invoke([{**MESSAGES[0], "content": parts}]).content


def an_object(asked: Asked) -> Any:
    model = (
        chat(asked, "json")
        if asked.ollama
        else chat(asked).bind(response_format={"type": "json_object"})
    )
    return json.loads(model.invoke(MESSAGES).content)


def cancel(asked: Asked) -> Any:
    parts = chat(asked).stream(MESSAGES)
    taken = first(parts, 3)
    parts.close()
    return [part.content for part in taken if part.content][:2]


drive(
    {
        "chat": whole,
        "stream": lambda asked: [part.content for part in chat(asked).stream(asked.messages)],
        "generate": generate,
        "tool": tool,
        "picture": picture,
        "json": an_object,
        "embed": lambda asked: embeddings(asked).embed_documents(TEXTS),
        "cancel": cancel,
    }
)
