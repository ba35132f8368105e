"""`count_tokens: tiktoken`: what no upstream reports is counted from text, which nobody keeps."""

import gzip
import json
import os
import signal
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import pytest

from tests.e2e.gateway import CHAT, EMBED, GENERATE, PROMPT, Gateway, Json, running, says, until
from tests.standin import Behaviour, StandIn
from usage_sink.counting import o200k_base

LIMIT = 1_000_000
SETTINGS = {
    f"PARALLAMA_API_GATEWAYS__{gateway}__COUNT_TOKENS": "tiktoken"
    for gateway in ("OLLAMA", "OPENAI")
}
SSE = {**CHAT, "stream": True}
NOTHING = {"omit": ["eval_count", "prompt_eval_count"]}
BARE = {"flavour": "bare"}

ANSWER = "an answer that somebody else may not read either"
ODD = {
    "special tokens": "before <|endoftext|> and <|im_start|> after that",
    "half a surrogate": "a lone \ud800 one, and some words more",
    "controls": "a nul \0, a line\n, a \t tab and \x7f a delete",
    "other scripts": "漢字 かな ไทย العربية 🦙 e\u0301 for all of them",
}

vocabulary = cache(o200k_base)  # loaded by the process that counts, not by all that collect


def count(text: str) -> int:
    return vocabulary()(text)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """In the end no file that it made holds what these stories said, or were told."""
    folder = tmp_path_factory.mktemp("text")
    with (
        StandIn() as upstream,
        running(folder, upstream, environ=SETTINGS, complaints=True) as gateway,
    ):
        yield gateway
        words = said(upstream)
    assert len(words) > 3
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"parallama.db", "up.log", "usage.jsonl"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not [word for word in words if word in content], path


def said(upstream: StandIn) -> set[bytes]:
    """Prompts and answers, as they are and as Lua passes them on."""
    words = {PROMPT, ANSWER, *ODD.values()}
    plain = {word.encode("utf-8", "replace") for word in words}
    return plain | {json.dumps(word)[1:-1].encode() for word in words} | set(map(b64encode, plain))


def text_of(body: bytes) -> str:
    """All text of an answer, of whatever form."""
    found = []

    def look(at: Any) -> None:
        if isinstance(at, list):
            for each in at:
                look(each)
        elif isinstance(at, dict):
            for key, value in at.items():
                if key in ("content", "text", "response", "thinking") and isinstance(value, str):
                    found.append(value)
                look(value)

    try:
        look(json.loads(body))
    except ValueError:
        for line in body.decode().splitlines():
            line = line.removeprefix("data:").strip()
            if line.startswith("{"):
                look(json.loads(line))
    return "".join(found)


FORMS = [
    pytest.param("/v1/chat/completions", CHAT, BARE, id="JSON, chat"),
    pytest.param("/v1/completions", GENERATE, BARE, id="JSON, completions"),
    pytest.param("/v1/chat/completions", SSE, BARE, id="SSE, chat"),
    pytest.param("/v1/completions", {**GENERATE, "stream": True}, BARE, id="SSE, completions"),
    pytest.param("/api/chat", CHAT, NOTHING, id="NDJSON, chat"),
    pytest.param("/api/generate", GENERATE, NOTHING, id="NDJSON, generate"),
    pytest.param("/api/chat", {**CHAT, "stream": False}, NOTHING, id="JSON, Ollama's chat"),
]


@pytest.mark.parametrize(("path", "body", "behaviour"), FORMS)
def test_a_row_has_the_tokens_of_the_text_and_the_quota_too(
    gateway: Gateway, path: str, body: Json, behaviour: Json
) -> None:
    someone = gateway.someone(tokens=LIMIT)
    answer = someone.post(path, body, headers=says(tokens=40, **behaviour))
    row = gateway.row(answer)
    assert row["token_source"] == "estimated"
    assert row["prompt_tokens"] == count(PROMPT)
    assert row["completion_tokens"] == count(text_of(answer.content)) > 10
    assert row["tokens_used"] == row["prompt_tokens"] + row["completion_tokens"]
    someone.expect_spent(row["tokens_used"], limit=LIMIT)


@pytest.mark.parametrize(
    ("path", "body", "behaviour"),
    [
        pytest.param("/v1/chat/completions", SSE, BARE, id="SSE"),
        pytest.param("/api/chat", CHAT, {}, id="NDJSON"),
    ],
)
def test_a_stream_that_the_client_leaves_has_the_tokens_of_what_was_delivered(
    gateway: Gateway, path: str, body: Json, behaviour: Json
) -> None:
    someone = gateway.someone(tokens=LIMIT)
    told = says(tokens=100, hold_at=40, **behaviour)
    with someone.stream(path, body, headers=told) as answer:
        lines = (line for line in answer.iter_lines() if line)
        read = "\n".join(next(lines) for _ in range(40))
    row = gateway.row(answer)
    assert (row["token_source"], row["aborted"]) == ("estimated", 1)
    assert row["prompt_tokens"] == count(PROMPT)
    assert row["completion_tokens"] == count(text_of(read.encode())) > 10
    someone.expect_spent(row["tokens_used"], limit=LIMIT)


@pytest.mark.parametrize(
    ("path", "body", "behaviour"),
    [
        pytest.param("/v1/chat/completions", SSE, {"flavour": "openai"}, id="SSE"),
        pytest.param("/v1/chat/completions", SSE, {"flavour": "cumulative"}, id="SSE, all along"),
        pytest.param("/v1/chat/completions", CHAT, {}, id="JSON"),
        pytest.param("/api/chat", CHAT, {}, id="NDJSON"),
        pytest.param("/v1/embeddings", EMBED, {}, id="vectors"),
    ],
)
def test_what_the_upstream_reports_is_the_last_word(
    gateway: Gateway, path: str, body: Json, behaviour: Json
) -> None:
    answer = gateway.someone().post(path, body, headers=says(tokens=40, **behaviour))
    row, seen = gateway.row(answer), gateway.seen(answer)
    assert row["token_source"] == "reported"
    assert (row["prompt_tokens"], row["completion_tokens"]) == (seen.prompt_tokens, seen.emitted)


def test_vectors_cost_their_prompt(gateway: Gateway) -> None:
    body = {**EMBED, "input": [PROMPT, PROMPT]}
    row = gateway.row(gateway.someone().post("/v1/embeddings", body, headers=says(**BARE)))
    assert (row["prompt_tokens"], row["completion_tokens"]) == (2 * count(PROMPT), 0)


@pytest.mark.parametrize("status", [400, 404, 500])
def test_errors_cost_nothing(gateway: Gateway, status: int) -> None:
    told = says(status=status, **BARE)
    row = gateway.row(gateway.someone().post("/v1/chat/completions", CHAT, headers=told))
    assert (row["tokens_used"], row["token_source"]) == (0, "counted")


def test_a_refusal_costs_nothing(gateway: Gateway) -> None:
    row = gateway.row(gateway.someone(tokens=0).post("/v1/chat/completions", CHAT))
    assert (row["status_code"], row["tokens_used"]) == (429, 0)


# Odd text.


@pytest.mark.parametrize("name", ODD)
def test_odd_text_is_counted_both_ways(gateway: Gateway, name: str) -> None:
    text = ODD[name]
    meant = text.encode(errors="replace").decode()
    asked = {"model": "smollm2", "prompt": text, "stream": False}
    told = json.dumps({"model": "smollm2", "response": text, "done": True})
    answer = gateway.someone().post("/api/generate", asked, headers=says(raw=told))
    assert answer.content == told.encode()
    row = gateway.row(answer)
    assert row["token_source"] == "estimated"
    wanted = count(meant.replace("?", "\ufffd") if name == "half a surrogate" else meant)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (wanted, wanted)


BROKEN = {
    "cut JSON": f'{{"model":"m","response":"{ANSWER}',
    "cut escape": f'{{"model":"m","done":true,"response":"{ANSWER}\\ud83d"}}',
    "no JSON": f"{ANSWER} {ANSWER}",
    "empty": "{}",
    "many": json.dumps({"done": True, "message": [{"content": ANSWER}] * 20_000}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_a_row_and_costs_no_other(gateway: Gateway, name: str) -> None:
    someone = gateway.someone(tokens=LIMIT)
    body = {**GENERATE, "stream": False}
    gateway.upstream.next(Behaviour(raw=BROKEN[name]))
    answers = [
        someone.post("/api/generate", body),
        someone.post("/api/generate", body, headers=says(**NOTHING)),
    ]
    rows = [gateway.row(answer) for answer in answers]
    assert {row["token_source"] for row in rows} == {"estimated"}
    assert all(row["prompt_tokens"] == count(PROMPT) for row in rows)
    assert rows[0]["completion_tokens"] > 0
    someone.expect_spent(sum(row["tokens_used"] for row in rows), limit=LIMIT)


def test_bytes_that_are_no_text_cost_no_row(gateway: Gateway) -> None:
    """Neither broken UTF-8 nor an encoding that nobody asked for can break Envoy's log."""
    someone = gateway.someone()
    broken = (
        json.dumps({**GENERATE, "stream": False}).encode().replace(b"prompt that", b"\xff\xc3 ")
    )
    packed = gzip.compress(ANSWER.encode()).decode("latin-1")
    for headers in (says(**NOTHING), says(raw=packed), says(raw=packed, gzip=True)):
        row = gateway.row(someone.post("/api/generate", broken, headers=headers))
        assert row["token_source"] == "estimated"
        assert row["prompt_tokens"] > 5


def test_of_a_long_text_the_rest_is_estimated_by_its_beginning(gateway: Gateway) -> None:
    text = " ".join([PROMPT, ANSWER] * 5_000)
    told = json.dumps({"model": "smollm2", "response": text, "done": True})
    gateway.upstream.next(Behaviour(raw=told))
    answer = gateway.someone().post("/api/generate", {**GENERATE, "prompt": text, "stream": False})
    row = gateway.row(answer)
    assert row["prompt_tokens"] == row["completion_tokens"] == pytest.approx(count(text), rel=0.02)


def test_long_texts_of_calls_that_end_together_are_all_counted(gateway: Gateway) -> None:
    """More than usage_sink takes at a time waits for it in Envoy."""
    someone, text = gateway.someone(), " ".join([PROMPT] * 1700)
    with ThreadPoolExecutor(40) as threads:
        post = partial(someone.post, "/v1/completions", headers=says(tokens=2, **BARE))
        answers = list(threads.map(post, [{**GENERATE, "prompt": text}] * 150))
    rows = [gateway.row(answer) for answer in answers]
    assert 50_000 < len(text) < 65_536
    assert {row["prompt_tokens"] for row in rows} == {count(text)}


def test_a_picture_of_thirty_megabytes_is_no_text(gateway: Gateway) -> None:
    picture = "iVBORw0K" * (30 << 17)
    message = {"role": "user", "content": PROMPT, "images": [picture]}
    body = {"model": "smollm2", "messages": [message], "stream": False}
    row = gateway.row(gateway.someone().post("/api/chat", body, headers=says(**NOTHING)))
    assert row["prompt_tokens"] == count(PROMPT)


# Who else tells of it.


def test_what_the_trail_alone_tells_is_as_without_text_and_the_books_agree(
    gateway: Gateway,
) -> None:
    someone = gateway.someone(tokens=LIMIT)
    sink = gateway.child("usage_sink")
    os.kill(sink, signal.SIGSTOP)
    try:
        answer = someone.post("/v1/chat/completions", SSE, headers=says(tokens=40, **BARE))
        until(lambda: answer.headers["x-request-id"] in trail_of(gateway))
    finally:
        os.kill(sink, signal.SIGKILL)
    row = gateway.row(answer)
    assert (row["token_source"], row["completion_tokens"]) == ("counted", 40)
    someone.expect_spent(row["tokens_used"], limit=LIMIT)


def trail_of(gateway: Gateway) -> str:
    return (gateway.config.state_dir / "trail" / "usage.jsonl").read_text("utf-8")
