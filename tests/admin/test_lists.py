"""Lists and the page of discovery, as they are answered to one caller."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from authz.decide import ModelAsked, judge_model
from parallama import identity
from parallama.admin.catalog.aliases import Aliases
from parallama.admin.catalog.catalog import MODELS, TAGS, Catalog, through
from parallama.admin.catalog.discovery import APIS, PATH, STATUS, Discovery
from parallama.admin.catalog.hosts import Clusters, Host, read
from parallama.admin.catalog.lists import Lists
from parallama.admin.catalog.metrics import Metrics, Use, used
from parallama.admin.front import Front, Later
from parallama.config import Config
from parallama.db.ledger import add
from parallama.errors import Unavailable
from tests.admin.servers import Behind, Raw, behind, hangs, http
from tests.parallama.db_on_disk import NOW, Opened, a_record, on

TAGGED = b'{"models":[{"name":"a:latest"},{"name":"b"}]}'
SAYS: dict[str, Raw] = {
    TAGS: http(TAGGED),
    "/api/version": http(b'{"version":"1"}'),
    MODELS: http(b'{"data":[{"id":"a"},{"id":"b"}]}'),
    f"/ollama{MODELS}": http(b'{"data":[{"id":"a"},{"id":"b"}]}'),
    "/api/show": http(b'{"license":"x"}'),
}
CONFIG = {
    "api_gateways": {
        "ollama": {"model_mappings": {"gpt-4": "b"}},
    }
}


class Here:
    """The service before a server. `now` is what its clock says."""

    def __init__(self, opened: Opened, server: Behind, config: Config) -> None:
        self.now = 100.0
        self.server = server
        self.hosts: Clusters | None = None
        self.made = 0
        aliases = Aliases(opened.store, config.api_gateways.model_mappings)
        self.catalog = Catalog(
            through(server.path),
            gateways=config.api_gateways.enabled,
            every=0,
            clock=lambda: self.now,
        )
        metrics = Metrics(opened.store, clock=lambda: self.now)
        page = Discovery(config, self.catalog, aliases, hosts=self._hosts, used=metrics.look)
        self.app = Front(
            lists=Lists(self.catalog, aliases),
            page=page,
            discovery=config.api_gateways.discovery.enabled,
            api=Later(self._api) if config.admin.enabled else None,
        )

    async def _hosts(self) -> Clusters | None:
        return self.hosts

    async def _api(self) -> Any:
        self.made += 1
        if self.made == 1:
            raise Unavailable("the database at /secret is away")

        async def api(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        return api

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, headers=headers, **more)

    async def get(self, endpoint: str, *, method: str = "GET", **told: Any) -> httpx.Response:
        """What `endpoint` of the server is, to a caller of whom authz said this."""
        more = told.pop("more", {})
        return await self.ask(method, endpoint, viewer(endpoint, **told), **more)


def viewer(endpoint: str, **told: Any) -> dict[str, str]:
    gateway = "ollama" if "/api/" in endpoint else "openai"
    dialect = {"ollama": "ollama", "openai": "openai"}[gateway]
    return identity.viewer_headers(
        **{
            "endpoint": endpoint,
            "gateways": [gateway],
            "dialect": dialect,
            "models": None,
            **told,
        }
    )


def tell(
    folder: Path,
    story: Callable[[Here], Awaitable[None]],
    says: Mapping[str, Raw] | None = None,
    **config: Any,
) -> None:
    async def all_of_it(opened: Opened) -> None:
        given = Config.model_validate({**CONFIG, "state_dir": str(folder), **config})
        async with behind(folder, **{**SAYS, **(says or {})}) as server:
            await story(Here(opened, server, given))

    on(folder, all_of_it)


def test_the_servers_own_bytes_pass_with_their_age(tmp_path: Path) -> None:
    async def story(here: Here) -> None:
        answer = await here.get(MODELS)
        assert http(answer.content) == SAYS[MODELS]
        told = {name: answer.headers[name] for name in ("age", "x-parallama-cache")}
        assert told == {"age": "0", "x-parallama-cache": "fresh"}
        assert answer.headers["content-type"] == "application/json"
        here.server.says[MODELS] = http(b"", 500)
        here.now += 61.9
        answer = await here.get(MODELS)
        assert http(answer.content) == SAYS[MODELS]
        assert (answer.headers["age"], answer.headers["x-parallama-cache"]) == ("61", "stale")

    tell(tmp_path, story)


def test_a_caller_sees_what_they_may_use_and_what_names_mean_on_their_gateway(
    tmp_path: Path,
) -> None:
    async def story(here: Here) -> None:
        tags = (await here.get(TAGS, models=["b"])).json()
        assert [entry["name"] for entry in tags["models"]] == ["b", "gpt-4"]
        data = (await here.get(MODELS, models=["b"])).json()["data"]
        assert data == [{"id": "b"}]
        data = (await here.get(MODELS, gateways=["ollama"], models=["gpt*"])).json()["data"]
        assert data == [{"id": "gpt-4"}]
        assert (await here.get(TAGS, models=["größe", "c:*"])).json()["models"] == []

    tell(tmp_path, story)


@pytest.mark.parametrize(
    ("id", "models", "found"),
    [
        ("a", None, {"id": "a"}),
        ("A:latest", None, {"id": "A:latest"}),
        ("%61", None, {"id": "a"}),
        ("a", ["b"], None),
        ("%61", ["b"], None),
        ("a/b", None, None),
    ],
)
def test_one_model_is_what_the_list_says_of_it(
    tmp_path: Path, id: str, models: list[str] | None, found: Any
) -> None:
    async def story(here: Here) -> None:
        answer = await here.get(f"{MODELS}/{id}", models=models)
        assert answer.status_code == (200 if found else 404)
        assert found is None or answer.json() == found

    tell(tmp_path, story)


@pytest.mark.parametrize("dialect", ["openai", "ollama"])
def test_a_model_that_is_not_there_is_refused_in_the_words_of_authz(
    tmp_path: Path, dialect: str
) -> None:
    refused = judge_model(ModelAsked(dialect, ("b",), "x"))
    assert refused is not None

    async def story(here: Here) -> None:
        answer = await here.get(f"{MODELS}/x", dialect=dialect)
        error = answer.json()["error"]
        assert refused.message == (error if dialect == "ollama" else error["message"])
        assert answer.status_code == refused.status

    tell(tmp_path, story)


def test_a_server_that_says_nothing_is_503_in_the_callers_dialect(tmp_path: Path) -> None:
    async def story(here: Here) -> None:
        answer = await here.get(TAGS)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert isinstance(answer.json()["error"], str)
        answer = await here.get(MODELS)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        told = {**viewer(MODELS, dialect="anthropic"), "x-request-id": "r1"}
        assert (await here.ask("GET", MODELS, told)).json()["request_id"] == "r1"

    tell(tmp_path, story, {TAGS: http(b"", 500), MODELS: http(b"<html>")})


def test_a_question_about_a_model_has_its_bounds(tmp_path: Path) -> None:
    async def story(here: Here) -> None:
        body = {"content": b'{"model":"a"}'}
        answer = await here.get("/api/show", method="POST", more=body)
        assert answer.json() == {"license": "x"}
        assert here.server.asked[-1][-1] == b'{"model":"a"}'
        large = await here.get("/api/show", method="POST", more={"content": b" " * 70_000})
        assert (large.status_code, type(large.json()["error"])) == (413, str)
        assert (await here.get("/api/show")).status_code == 405
        assert (await here.get("/api/nothing")).status_code == 404

    tell(tmp_path, story)


def test_who_is_not_known_sees_nothing(tmp_path: Path) -> None:
    async def story(here: Here) -> None:
        for path in (TAGS, PATH):
            for lacking in (identity.GATEWAYS, identity.MODELS, identity.DIALECT):
                told = {k: v for k, v in viewer(path).items() if k != lacking}
                assert (await here.ask("GET", path, told)).status_code == 500
        for path in (TAGS, MODELS, "/"):
            assert (await here.ask("GET", path)).status_code == 404
        assert here.made == 0

    tell(tmp_path, story)


# Which part answers


def test_the_admin_api_is_made_when_it_is_first_called_and_tried_again(tmp_path: Path) -> None:
    async def story(here: Here) -> None:
        away = await here.ask("GET", "/auth/me")
        assert (away.status_code, away.json()["code"]) == (503, "service_unavailable")
        assert "secret" not in away.text
        together = await asyncio.gather(*(here.ask("GET", "/admin/v1/users") for _ in range(5)))
        assert [answer.status_code for answer in together] == [204] * 5
        assert here.made == 2

    tell(tmp_path, story)


@pytest.mark.parametrize("path", ["/admin/v1/users", "/auth/login", "/me/quota"])
def test_an_admin_api_that_is_off_is_not_there_and_lists_are(tmp_path: Path, path: str) -> None:
    async def story(here: Here) -> None:
        answer = await here.ask("POST", path)
        assert answer.headers["content-type"] == "application/problem+json"
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert (await here.get(TAGS)).status_code == 200

    tell(tmp_path, story, admin={"enabled": False})


# Discovery


def test_the_apis_are_those_of_the_routes() -> None:
    file = Path(__file__).parents[2] / "envoy" / "routes.yaml"
    found: dict[str, set[tuple[str, str]]] = {}
    (virtual_host,) = yaml.safe_load(file.read_text())["resources"][0]["virtual_hosts"]
    for route in virtual_host["routes"]:
        prefix = route["match"].get("prefix", "")
        identity_of = route.get("typed_per_filter_config", {}).get("identity", {})
        told = identity_of.get("check_settings", {}).get("context_extensions", {})
        if prefix.endswith(("/api/", "/v1/")) and told:
            gateway = found.setdefault(told["gateway"], set())
            gateway.add((told["dialect"], prefix.rstrip("/")))
    assert found == {name: set(apis) for name, apis in APIS.items()}


def page(answer: httpx.Response, gateway: str) -> Any:
    assert answer.status_code == 200, answer.text
    (found,) = (each for each in answer.json()["gateways"] if each["name"] == gateway)
    return found


def test_the_page_says_what_a_caller_may_use(tmp_path: Path) -> None:
    async def story(here: Here) -> None:
        answer = await here.get(PATH, gateways=["ollama", "openai"], models=["b"])
        assert [each["name"] for each in answer.json()["gateways"]] == ["ollama", "openai"]
        ollama = page(answer, "ollama")
        assert ollama["models"] == [
            {"name": "b", "mapped": False},
            {"name": "gpt-4", "mapped": True},
        ]
        assert ollama["base_path"] == "/ollama/v1"
        assert ollama["features"] == ["streaming", "model_mapping", "ollama_api"]
        assert ollama["cache"] == {"state": "fresh", "age": 0}
        assert ollama["health"] == {"status": "well", "checked_by": "catalog"}
        assert ollama["metrics"]["requests"] == 0
        assert page(answer, "openai")["models"] == [{"name": "b", "mapped": False}]
        for gateways in (["openai"], []):
            answer = await here.get(PATH, gateways=gateways)
            assert [each["name"] for each in answer.json()["gateways"]] == gateways

    tell(tmp_path, story)


def test_what_is_switched_off_is_not_shown(tmp_path: Path) -> None:
    async def story(here: Here) -> None:
        answer = await here.get(PATH, gateways=["ollama", "openai"])
        assert "metrics" not in page(answer, "ollama")
        assert [each["name"] for each in answer.json()["gateways"]] == ["ollama"]

    gateways = {"enabled": ["ollama"], "discovery": {"include_metrics": False}}
    tell(tmp_path, story, api_gateways=gateways)

    async def nothing(here: Here) -> None:
        answer = await here.get(PATH, gateways=["ollama"])
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert (await here.ask("GET", STATUS)).status_code == 200

    tell(tmp_path, nothing, api_gateways={"discovery": {"enabled": False}})


WELL, AWAY = Host("10.0.0.1:1", True), Host("10.0.0.2:1", False)


@pytest.mark.parametrize(
    ("hosts", "says", "expected"),
    [
        (None, None, ("well", "catalog", None, None)),
        (None, http(b"", 500), ("away", "catalog", None, None)),
        ((WELL, AWAY), None, ("well", "envoy", 2, 1)),
        ((AWAY,), None, ("away", "envoy", 1, 0)),
        ((WELL,), hangs, ("away", "envoy", 1, 1)),
    ],
)
def test_it_is_well_where_envoy_says_so_and_it_answers(
    tmp_path: Path, hosts: tuple[Host, ...] | None, says: Raw | None, expected: Any
) -> None:
    async def story(here: Here) -> None:
        here.hosts = None if hosts is None else {"upstream": hosts, "authz": (AWAY,)}
        await here.get(TAGS)
        if says is not None:
            here.server.says[TAGS] = says
            here.now += 60
        health = page(await here.get(PATH, gateways=["ollama"]), "ollama")["health"]
        fields = ("status", "checked_by", "servers", "servers_well")
        assert tuple(health.get(field) for field in fields) == expected

    tell(tmp_path, story)


def test_what_operators_read_says_why_and_is_the_same_otherwise(tmp_path: Path) -> None:
    async def story(here: Here) -> None:
        here.hosts = {"upstream": (AWAY,)}
        told = page(await here.ask("GET", STATUS), "ollama")
        shown = page(await here.get(PATH, gateways=["ollama"]), "ollama")
        lists = told.pop("lists")
        assert {"path": TAGS, "age": None, "trouble": "it answers 500"} in lists
        assert told["health"].pop("trouble") is None  # of the list that it has
        assert told["health"].pop("away") == ["10.0.0.2:1"]
        assert told == shown

    tell(tmp_path, story, {TAGS: http(b"", 500)})


def test_what_envoy_says_of_its_servers() -> None:
    """As Envoy 1.40 says it: what is false or 0 is left out."""

    def status(host: str, **health: Any) -> dict[str, Any]:
        address = {"socket_address": {"address": host, "port_value": 80}}
        return {"address": address, "health_status": health}

    told = {
        "cluster_statuses": [
            {
                "name": "upstream",
                "host_statuses": [
                    status("10.0.0.1", eds_health_status="HEALTHY"),
                    status("::1", eds_health_status="HEALTHY", failed_active_health_check=True),
                    status("10.0.0.3", failed_outlier_check=True),
                    status("10.0.0.4", eds_health_status="DRAINING"),
                ],
            },
            {"name": "authz", "host_statuses": [{"address": {"pipe": {"path": "run/a.sock"}}}]},
            {"name": "empty"},
        ]
    }
    assert read(json.dumps(told).encode()) == {
        "upstream": (
            Host("10.0.0.1:80", True),
            Host("[::1]:80", False),
            Host("10.0.0.3:80", False),
            Host("10.0.0.4:80", False),
        ),
        "authz": (Host("run/a.sock", True),),
        "empty": (),
    }
    for raw in (b"", b"[]", b'{"cluster_statuses":[{}]}', b"no such page"):
        assert read(raw) is None


def test_metrics_are_of_calls_that_spend_tokens_in_the_last_minutes(tmp_path: Path) -> None:
    def record(number: int, seconds_ago: float, first: float | None, **more: Any) -> Any:
        at = NOW - timedelta(seconds=seconds_ago)
        given = {"endpoint": "/api/chat", "gateway": "ollama", **more}
        return a_record(f"r{number}", timestamp=at, time_to_first_token=first, **given)

    async def story(opened: Opened) -> None:
        assert await used(opened.store, NOW) == {}
        records = [
            record(1, 10, 1.0),
            record(2, 20, 3.0),
            record(3, 30, 2.0),
            record(4, 40, None),
            record(5, 301, 9.0),
            record(6, 10, 9.0, endpoint="/api/tags"),
            record(7, 10, None, gateway="openai"),
        ]
        await add(opened.store, records)
        assert await used(opened.store, NOW) == {"ollama": Use(4, 2.0), "openai": Use(1, None)}

    on(tmp_path, story)
