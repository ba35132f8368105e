"""
What Envoy and the services answer by themselves: each such answer is one row, and free. Who is not
known (401) has none.
"""

import json
from collections.abc import Callable

import httpx
import pytest

from parallama.roles import Role
from tests.e2e.gateway import CHAT, Gateway, says, until

REPLIES: dict[int, Callable[[Gateway], httpx.Response]] = {
    400: lambda gateway: gateway.someone().post("/v1/chat/completions", b"{"),
    403: lambda gateway: gateway.someone(role=Role.READONLY).post("/api/chat", CHAT),
    404: lambda gateway: gateway.someone(models=["smollm2"]).post(
        "/v1/messages", {**CHAT, "model": "secret", "max_tokens": 9}
    ),
    405: lambda gateway: gateway.someone().get("/v1/chat/completions"),
    413: lambda gateway: gateway.someone().post("/api/chat", b" " * (33 << 20)),
    415: lambda gateway: gateway.someone().post(
        "/api/chat", b"\x1f\x8b", headers={"content-encoding": "gzip"}
    ),
    429: lambda gateway: gateway.someone(requests=0).post("/api/chat", CHAT),
}


@pytest.mark.parametrize("status", REPLIES)
def test_each_refusal_is_one_row_and_free(gateway: Gateway, status: int) -> None:
    answer = REPLIES[status](gateway)
    assert answer.status_code == status
    assert not gateway.upstream.requests
    row = gateway.row(answer)
    after = gateway.someone().post("/api/chat", {**CHAT, "stream": False}, headers=says(tokens=1))
    until(lambda: gateway.rows(after.headers["x-request-id"]))  # what came before has come
    assert gateway.rows(answer.headers["x-request-id"]) == [row]
    assert row["status_code"] == status
    assert (row["tokens_used"], row["completion_tokens"] or 0) == (0, 0)
    assert json.loads(answer.content)
