"""What is refused before an endpoint is asked, and what goes wrong inside of one."""

import asyncio
import json
import logging
from typing import Any

import pytest

from parallama.admin.edge import LARGEST_BODY, Edge
from parallama.db.manage import people
from parallama.errors import SchemaError, Unavailable
from tests.admin.house import House

USERS = "/admin/v1/users"
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "code"),
    [
        ("GET", "/admin/v1/nothing", {}, 404, "not_found"),
        ("GET", f"{USERS}/", {}, 404, "not_found"),
        ("GET", "/docs", {}, 404, "not_found"),
        ("PUT", USERS, {}, 405, "method_not_allowed"),
        ("POST", USERS, {"content": b"{", "headers": JSON}, 400, "invalid_request"),
        ("POST", USERS, {"content": b"\xff", "headers": JSON}, 400, "bad_request"),
        ("POST", USERS, {"content": b"[" * 100_000, "headers": JSON}, 400, "bad_request"),
        ("POST", USERS, {"content": b"[]", "headers": JSON}, 400, "invalid_request"),
        ("POST", USERS, {"content": b"username=x"}, 415, "unsupported_media_type"),
        ("POST", USERS, {"data": {"username": "x"}}, 415, "unsupported_media_type"),
        ("POST", USERS, {"content": b" " * (LARGEST_BODY + 1)}, 413, "request_too_large"),
    ],
)
def test_every_refusal_is_a_problem(
    method: str, path: str, more: Any, status: int, code: str, on_one: Any
) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        refused = await admin.ask(method, path, **more)
        assert refused.headers["content-type"] == "application/problem+json"
        told = refused.json()
        assert (refused.status_code, told["status"], told["code"]) == (status, status, code)
        assert told["type"] == "about:blank"
        assert told["title"]
        assert told["detail"]
        if status == 405:
            assert refused.headers["allow"] == "GET, POST"

    on_one(story)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Unavailable("the database /secret/place is busy"), 503, "service_unavailable"),
        (SchemaError("/secret/place lacks something"), 503, "service_unavailable"),
        (RuntimeError("/secret/place"), 500, "internal_error"),
    ],
)
def test_what_is_not_the_callers_concern_is_not_told(
    error: Exception, status: int, code: str, on_one: Any, monkeypatch: Any, caplog: Any
) -> None:
    async def fails(*_: Any, **__: Any) -> None:
        raise error

    async def story(house: House) -> None:
        admin = await house.admin()
        monkeypatch.setattr(people, "list_users", fails)
        refused = await admin.get(USERS)
        assert (refused.status_code, refused.json()["code"]) == (status, code)
        assert "secret" not in refused.text

    on_one(story)
    assert "secret" in caplog.text or any("secret" in str(r.__dict__) for r in caplog.records)


def test_a_call_has_its_time(monkeypatch: Any) -> None:
    asked = asyncio.Event()

    async def waits(*_: Any) -> None:
        asked.set()
        await asyncio.Event().wait()

    status, body = asyncio.run(call(Edge(waits, seconds=0.02, tell=False)))
    assert asked.is_set()
    assert (status, json.loads(body)["code"]) == (504, "timeout")


def test_a_body_that_ends_early_is_refused() -> None:
    async def never(*_: Any) -> None:
        raise AssertionError("it was asked")

    edge = Edge(never, seconds=5, tell=False)
    part = {"type": "http.request", "body": b"{", "more_body": True}
    status, body = asyncio.run(call(edge, part, {"type": "http.disconnect"}))
    assert (status, json.loads(body)["code"]) == (400, "incomplete_request")


def test_each_call_is_a_line_without_what_clients_wrote(on_one: Any, caplog: Any) -> None:
    async def story(house: House) -> None:
        admin = await house.admin()
        await admin.get(f"{USERS}/a-name", params={"colour": "a-colour"})
        await admin.get("/a-path")

    with caplog.at_level(logging.INFO, "parallama.admin.edge"):
        on_one(story)
    lines = [r.__dict__ for r in caplog.records if r.message == "call"]
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/admin/v1/users/{user}", 400),
        ("none", 404),
    ]
    assert lines[0]["user"] == "u1"
    assert not any(word in str(lines) for word in ("a-name", "a-colour", "a-path"))


async def call(app: Any, *messages: Any) -> tuple[int, bytes]:
    sent: list[Any] = []
    given = iter(messages or [{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Any:
        return next(given)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])
