"""Whoever is let in is answered: by every service, and also where the admin API is off."""

from pathlib import Path

import httpx

from parallama.roles import Role
from tests.e2e.gateway import until
from tests.standin import StandIn
from tests.supervisor.supervised import up


def test_what_is_let_in_first_is_answered_by_every_service(tmp_path: Path) -> None:
    with (
        StandIn() as upstream,
        up(tmp_path, upstream, until_event=("starting", {"child": "envoy"})) as gateway,
    ):
        someone = gateway.someone(role=Role.ADMIN)

        def healthy() -> bool:
            try:
                return gateway.http.get("/healthz").status_code == 200
            except httpx.TransportError:
                return False

        until(healthy)
        for path in ("/v1/models", "/gateway/discovery", "/auth/me", "/admin/v1/users"):
            assert someone.get(path).status_code == 200


def test_without_the_admin_api_there_are_lists_all_the_same(tmp_path: Path) -> None:
    with StandIn() as upstream, up(tmp_path, upstream, "admin: {enabled: false}\n") as gateway:
        someone = gateway.someone(role=Role.ADMIN)
        for path in ("/auth/login", "/auth/.well-known/jwks.json", "/admin/openapi.json"):
            answer = gateway.http.get(path)
            assert answer.headers["content-type"] == "application/problem+json"
            assert (answer.status_code, answer.json()["status"]) == (404, 404)
        for path in ("/auth/me", "/admin/v1/users", "/me/quota"):
            answer = someone.get(path)
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.status_code == 404
        assert someone.get("/v1/models").status_code == 200
        assert gateway.cli("status")["ok"] is True
