"""What an operator changes by the command line holds within a second, in every process."""

import asyncio
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from parallama import keys
from parallama.db.manage import credentials
from parallama.db.manage.schema import managed
from parallama.roles import Role
from tests.e2e.gateway import CHAT, Gateway, Someone, until
from tests.parallama.db_on_disk import a_desk

BOUND = 1.0


def effective(check: Callable[[], bool]) -> None:
    """The change was made just now: it must show within the bound."""
    started = time.monotonic()
    until(check, BOUND)
    assert time.monotonic() - started < BOUND


def status(someone: Someone, path: str = "/api/chat") -> int:
    return someone.post(path, CHAT).status_code


def known(gateway: Gateway, **limits: int) -> Someone:
    """Somebody whom every process remembers by now."""
    someone = gateway.someone(**limits)
    assert status(someone) == 200
    return someone


def test_a_revoked_key_stops_working(gateway: Gateway) -> None:
    someone = known(gateway)
    other = gateway.cli("keys", "create", someone.name)
    gateway.tokens.append(other["key"])
    gateway.cli("keys", "revoke", someone.key_id)
    effective(lambda: status(someone) == 401)
    before = len(gateway.upstream.requests)
    assert "revoked" in someone.post("/api/chat", CHAT).json()["error"]
    assert len(gateway.upstream.requests) == before
    answer = gateway.http.post("/api/chat", json=CHAT, headers={"x-api-key": other["key"]})
    assert answer.status_code == 200


def test_a_disabled_user_is_refused_and_an_enabled_one_let_in(gateway: Gateway) -> None:
    someone = known(gateway)
    gateway.cli("users", "disable", someone.name)
    effective(lambda: status(someone) == 403)
    assert "disabled" in someone.post("/api/chat", CHAT).json()["error"]
    gateway.cli("users", "enable", someone.name)
    effective(lambda: status(someone) == 200)


def test_another_role_brings_its_rights(gateway: Gateway) -> None:
    someone = known(gateway)
    gateway.cli("users", "update", someone.name, "--role", Role.READONLY)
    effective(lambda: status(someone) == 403)
    assert someone.get("/api/tags").status_code == 200


def test_limits_are_set_changed_and_unset(gateway: Gateway) -> None:
    someone = known(gateway)
    per_day = ("limits", "set", someone.name, "--gateway", "*", "--requests-per-day")
    gateway.cli(*per_day, "0")
    effective(lambda: status(someone) == 429)
    gateway.cli(*per_day, "100")
    effective(lambda: status(someone) == 200)
    gateway.cli(*per_day, "0")
    effective(lambda: status(someone) == 429)
    gateway.cli("limits", "unset", someone.name)
    effective(lambda: status(someone) == 200)


def test_the_keys_of_a_deleted_user_stop_working_and_the_usage_stays(gateway: Gateway) -> None:
    someone = known(gateway)
    answer = someone.post("/api/chat", CHAT)
    gateway.row(answer)
    gateway.cli("users", "delete", someone.name)
    effective(lambda: status(someone) == 401)
    rows = gateway.cli("usage", "list", "--user", someone.name)
    assert answer.headers["x-request-id"] in [row["request_id"] for row in rows]


def test_a_key_that_was_unknown_works_once_it_exists(gateway: Gateway) -> None:
    someone = gateway.someone()
    minted = keys.mint(os.urandom, rounds=4)
    ask = partial(gateway.http.get, "/api/tags", headers={"x-api-key": minted.token})
    assert ask().status_code == 401

    async def create() -> None:
        async with managed(gateway.config.database) as engine:
            await credentials.create_key(a_desk(engine, datetime.now(UTC)), someone.user_id, minted)

    asyncio.run(create())
    effective(lambda: ask().status_code == 200)
