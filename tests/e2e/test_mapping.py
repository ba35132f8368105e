"""Names of the operator's choosing: requests follow them, and nobody gets round a limit by one."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import delete, insert

from parallama.changes import Change, publish
from parallama.db.manage.engine import writing
from parallama.db.manage.schema import managed
from parallama.db.manage.tables import model_mappings
from parallama.limits import Unit, Window
from parallama.mappings import MOST
from parallama.roles import Role
from parallama.stores import connect_redis
from tests.e2e.gateway import (
    PROMPT,
    Gateway,
    Json,
    Someone,
    free_port,
    running,
    until,
)
from tests.parallama.db_on_disk import NOW
from tests.standin import StandIn
from tests.valkey import Valkey

BOUND = 1.0
MODELS = ("smollm2", "secret", "größe:q4", "hf.co/org/model:q8")
MESSAGES = [{"role": "user", "content": PROMPT}]
TO_CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Gateway]]:
    """Two gateways on one database and one Valkey, so two authz."""
    folder = tmp_path_factory.mktemp("mapped")
    password = folder / "password"
    password.write_text("a made-up password")
    password.chmod(0o600)
    valkey, port = Valkey(folder), free_port()
    valkey.start("--bind", "127.0.0.1", "--port", str(port), "--requirepass", password.read_text())
    shared = {
        "PARALLAMA_DATABASE__PATH": str(folder / "a" / "parallama.db"),
        "PARALLAMA_REDIS__HOST": "127.0.0.1",
        "PARALLAMA_REDIS__PORT": str(port),
        "PARALLAMA_REDIS__PASSWORD_FILE": str(password),
        "PARALLAMA_AUTHENTICATION__SIGNING_KEYS_DIR": str(folder / "signing"),
        "PARALLAMA_API_GATEWAYS__OPENAI__MODEL_MAPPINGS": "{gpt-4: smollm2, hidden: secret}",
        "PARALLAMA_API_GATEWAYS__OLLAMA__MODEL_MAPPINGS": "{gpt-4: secret}",
        "PARALLAMA_API_GATEWAYS__OLLAMA__DEFAULT_MODEL": "smollm2",
    }
    try:
        with (
            StandIn(models=MODELS) as upstream,
            running(folder / "a", upstream, environ=shared) as first,
            running(folder / "b", upstream, environ=shared) as second,
        ):
            yield first, second
    finally:
        valkey.stop()


@pytest.fixture
def gateway(pair: tuple[Gateway, Gateway]) -> Gateway:
    pair[0].upstream.reset()
    return pair[0]


def chat(someone: Someone, model: str, path: str = TO_CHAT, **more: Any) -> httpx.Response:
    return someone.post(path, {"model": model, "messages": MESSAGES, **more})


def sent(gateway: Gateway, answer: httpx.Response) -> Json:
    """The body that the upstream saw."""
    body: Json = json.loads(gateway.seen(answer).body)
    return body


@contextmanager
def mapped(gateway: Gateway, said: str, means: str) -> Iterator[None]:
    """On the gateway for Ollama's dialect, for a while, by the admin API."""
    headers = gateway.someone(role=Role.ADMIN).headers
    told = {"gateway": "ollama", "external_model": said, "internal_model": means}
    at = "/admin/v1/model-mappings"
    made = gateway.http.post(at, json=told, headers=headers)
    assert made.status_code == 200, made.text
    yield
    gone = gateway.http.delete(f"{at}/{made.json()['id']}", headers=headers)
    assert gone.status_code == 204


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [TO_CHAT, "/openai/v1/chat/completions"])
def test_the_model_that_a_name_means_is_asked_and_the_row_has_both(
    gateway: Gateway, path: str, stream: bool
) -> None:
    answer = chat(gateway.someone(), "gpt-4", path, stream=stream)
    assert answer.status_code == 200, answer.text
    assert sent(gateway, answer)["model"] == "smollm2"
    row = gateway.row(answer)
    assert (row["model_name"], row["requested_model"], row["served_model"]) == (
        "smollm2", "gpt-4", "smollm2",
    )  # fmt: skip


@pytest.mark.parametrize("said", ["GPT-4", "gpt-4:latest", "Gpt-4:Latest"])
def test_case_and_the_usual_tag_are_no_other_name(gateway: Gateway, said: str) -> None:
    answer = chat(gateway.someone(), said)
    assert sent(gateway, answer)["model"] == "smollm2"
    assert gateway.row(answer)["requested_model"] == said


def test_each_gateway_has_names_of_its_own(gateway: Gateway) -> None:
    someone = gateway.someone()
    for path in ("/api/chat", "/ollama/api/chat", "/ollama/v1/chat/completions"):
        answer = chat(someone, "gpt-4", path, stream=False)
        assert sent(gateway, answer)["model"] == "secret"
    plain = chat(someone, "smollm2", "/api/chat", stream=False)
    assert gateway.row(plain)["requested_model"] is None


def test_a_call_that_names_no_model_gets_the_default(gateway: Gateway) -> None:
    someone = gateway.someone()
    answer = someone.post("/api/chat", {"messages": MESSAGES, "stream": False})
    assert answer.status_code == 200, answer.text
    assert sent(gateway, answer) == {"model": "smollm2", "messages": MESSAGES, "stream": False}
    row = gateway.row(answer)
    assert (row["model_name"], row["requested_model"]) == ("smollm2", None)
    nameless = someone.post(TO_CHAT, {"messages": MESSAGES})
    assert nameless.status_code == 400


def test_a_mapping_holds_in_every_process_within_a_second(pair: tuple[Gateway, Gateway]) -> None:
    first, second = pair
    someone = first.someone()
    clients = [(first, someone), (second, Someone(second, "", "", "", someone.token))]
    second.tokens.append(someone.token)

    def asks(model: str) -> list[str]:
        return [
            sent(each, chat(who, "fresh/name:v1", "/api/chat", stream=False))["model"]
            for each, who in clients
            if model
        ]

    def within_a_second(change: Callable[[], object], model: str) -> None:
        change()
        started = time.monotonic()
        until(lambda: asks(model) == [model] * 2)
        assert time.monotonic() - started < BOUND

    assert asks("x") == ["fresh/name:v1"] * 2  # both remember that nothing is mapped so
    on = ("--gateway", "ollama")
    within_a_second(lambda: first.cli("models", "map", "Fresh/Name:v1", "smollm2", *on), "smollm2")
    within_a_second(lambda: first.cli("models", "unmap", "fresh/NAME:v1", *on), "fresh/name:v1")
    (last, *_) = first.cli("audit", "list", "--action", "mappings")
    assert (last["action"], last["subject"]) == ("mappings.unset", "Fresh/Name:v1")


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("org/model:tag", "hf.co/org/model:q8"),
        ("größer", "größe:q4"),
        ("模型", "smollm2"),
        ('a "quoted" \\ name', "smollm2"),
        ("x" * 256, "smollm2"),
    ],
)
def test_names_of_all_kinds(gateway: Gateway, said: str, means: str) -> None:
    someone = gateway.someone()
    with mapped(gateway, said, means):
        until(
            lambda: sent(gateway, chat(someone, said, "/api/chat", stream=False))["model"] == means
        )


def test_a_name_of_10_kilobytes_is_refused(gateway: Gateway) -> None:
    answer = chat(gateway.someone(), "n" * 10_000)
    assert answer.status_code == 400
    assert gateway.upstream.requests == []


def test_a_circle_is_refused_and_nothing_is_made(gateway: Gateway) -> None:
    headers = gateway.someone(role=Role.ADMIN).headers
    for said, means, complaint in (
        ("gpt-4", "GPT-4:latest", "means itself"),
        ("secret", "gpt-4", "goes in a circle"),
        ("other", "gpt-4", "means a name that is itself mapped"),
        ("secret", "smollm2", "'gpt-4' means 'secret', and a mapping is one step"),
        ("smollm2", "secret", "is what default_model means"),
        ("n" * 10_000, "smollm2", "at most"),
    ):
        told = {"gateway": "ollama", "external_model": said, "internal_model": means}
        answer = gateway.http.post("/admin/v1/model-mappings", json=told, headers=headers)
        assert answer.status_code in (400, 422)
        assert complaint in answer.text
    listed = gateway.cli("models", "list")
    assert {(row["gateway"], row["name"], row["target"], row["source"]) for row in listed} == {
        ("ollama", "", "smollm2", "configuration"), ("ollama", "gpt-4", "secret", "configuration"),
        ("openai", "gpt-4", "smollm2", "configuration"),
        ("openai", "hidden", "secret", "configuration"),
    }  # fmt: skip


def test_a_target_that_is_gone_is_the_upstreams_own_404(gateway: Gateway) -> None:
    someone = gateway.someone()
    with mapped(gateway, "ghost", "long-gone"):
        answers: list[httpx.Response] = []

        def asked() -> bool:
            answers.append(chat(someone, "ghost", "/api/chat"))
            return sent(gateway, answers[-1])["model"] == "long-gone"

        until(asked)
    assert answers[-1].status_code == 404
    assert "not found" in answers[-1].json()["error"]
    row = gateway.row(answers[-1])
    assert (row["model_name"], row["requested_model"]) == ("long-gone", "ghost")


def test_a_limit_of_the_model_cannot_be_passed_by_another_name(gateway: Gateway) -> None:
    someone = gateway.someone()
    gateway.limit(someone.name, {(Unit.REQUESTS, Window.DAY): 2}, model="smollm2")
    assert chat(someone, "gpt-4").status_code == 200
    assert chat(someone, "smollm2").status_code == 200
    for said in ("gpt-4", "GPT-4:latest", "smollm2", "SmolLM2"):
        assert chat(someone, said).status_code == 429
    assert chat(someone, "hidden").status_code == 200
    assert len(gateway.upstream.requests) == 3


def test_a_bound_key_reaches_nothing_by_another_name(gateway: Gateway) -> None:
    """It may say a name if it may use that, or what the name means."""
    by_target = gateway.someone(models=["smollm2"])
    by_name = gateway.someone(models=["gpt-4"])
    neither = gateway.someone(models=["größe*"])
    assert chat(by_target, "gpt-4").status_code == 200
    assert chat(by_target, "smollm2").status_code == 200
    for said in ("gpt-4", "GPT-4", "gpt-4:latest"):
        assert chat(by_name, said).status_code == 200
    before = len(gateway.upstream.requests)
    for who, said in (
        (by_target, "hidden"), (by_target, "secret"), (by_name, "smollm2"), (by_name, "hidden"),
        (neither, "gpt-4"), (neither, "hidden"), (neither, "smollm2"),
    ):  # fmt: skip
        answer = chat(who, said)
        assert answer.status_code == 404
        message = answer.json()["error"]["message"]
        assert f"'{said}'" in message
        assert said in ("smollm2", "secret") or not {"smollm2", "secret"} & set(message.split("'"))
    in_ollama = chat(neither, "gpt-4", "/api/chat")
    assert in_ollama.json() == {"error": 'model "gpt-4" not found, try pulling it first'}
    assert len(gateway.upstream.requests) == before


def test_what_manages_models_means_them_by_their_own_names(gateway: Gateway) -> None:
    operator = gateway.someone(role=Role.OPERATOR)
    for path, body in (
        ("/api/pull", {"model": "gpt-4", "stream": False}),
        ("/api/copy", {"source": "smollm2", "destination": "gpt-4"}),
    ):
        answer = operator.post(path, body)
        assert sent(gateway, answer) == body
    answer = operator.ask("DELETE", "/api/delete", content=b'{"model":"gpt-4"}')
    assert sent(gateway, answer) == {"model": "gpt-4"}


def test_the_table_goes_nowhere_but_to_envoy(gateway: Gateway) -> None:
    """Each line of the trail would have all of it otherwise."""
    answer = chat(gateway.someone(), "gpt-4")
    mine = answer.headers["x-request-id"]
    (line,) = until(
        lambda: [
            line
            for file in (gateway.config.state_dir / "trail").glob("usage*.jsonl")
            for line in file.read_text("utf-8").splitlines()
            if mine in line
        ]
    )
    told = json.loads(line)
    assert told["who"]["aliases"] == ""
    assert "hidden" not in line
    assert told["lua"]["requested_model"] == "gpt-4"


def test_as_many_as_there_may_be(gateway: Gateway) -> None:
    """The longest names and models: a hundred kilobytes go along with each request."""
    someone = gateway.someone()
    table = {f"{n:03}" + "n" * 253: f"{n:03}" + "t" * 253 for n in range(MOST - 1)}
    rows = [
        {
            "id": str(uuid4()), "gateway_type": "ollama", "external_model": name,
            "internal_model": target, "created_at": NOW, "updated_at": NOW,
        }
        for name, target in table.items()
    ]  # fmt: skip

    async def fill(*work: Any) -> None:
        config = gateway.config
        async with managed(config.database) as engine, writing(engine) as connection:
            await connection.execute(*work)
        async with connect_redis(config) as redis:
            await publish(redis, Change("mappings"))

    asyncio.run(fill(insert(model_mappings), rows))
    said = f"{MOST - 2:03}" + "N" * 253
    until(lambda: sent(gateway, chat(someone, said, "/api/chat"))["model"] == table[said.lower()])
    headers = gateway.someone(role=Role.ADMIN).headers
    told = {"gateway": "ollama", "external_model": "a", "internal_model": "b"}
    full = gateway.http.post("/admin/v1/model-mappings", json=told, headers=headers)
    assert f"at most {MOST} mappings" in full.text  # one is in the configuration
    asyncio.run(fill(delete(model_mappings)))


def test_what_shows_a_model_follows_the_name_for_bound_keys_too(gateway: Gateway) -> None:
    for someone, status in (
        (gateway.someone(), 200),
        (gateway.someone(models=["gpt-4"]), 200),
        (gateway.someone(models=["secret"]), 200),
        (gateway.someone(models=["smollm2"]), 404),
    ):
        for body in ({"model": "gpt-4"}, {"name": "GPT-4:latest"}):
            answer = someone.post("/api/show", body)
            assert answer.status_code == status, answer.text
