"""What each gateway offers, to whom, and whether it is well."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import parallama
from parallama import identity
from parallama.admin.catalog import merging
from parallama.admin.catalog.aliases import Aliases
from parallama.admin.catalog.asking import Answer
from parallama.admin.catalog.catalog import MODELS, TAGS, Catalog
from parallama.admin.catalog.hosts import Clusters, Host
from parallama.admin.catalog.kept import State
from parallama.admin.catalog.lists import OWN_WORDS, Receive, Scope, Send, headers_of, respond
from parallama.admin.catalog.merging import View
from parallama.admin.catalog.metrics import WINDOW_SECONDS, Use
from parallama.config import Config

PATH = "/gateway/discovery"

STATUS = "/gateway/status"
"""The same for who reads it at our socket, which is `parallama status`: there is no route to it."""

_PATIENCE_SECONDS = 2.0
_LATE_SECONDS = 2.5
_ONLY = "upstream"  # the cluster that there is, unless somebody adds others

# A test holds these to envoy/routes.yaml.
APIS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "ollama": (("ollama", "/api"), ("ollama", "/ollama/api"), ("openai", "/ollama/v1")),
    "openai": (("openai", "/v1"), ("openai", "/openai/v1")),
}

Page = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads it: the gateways whose models they may see, and which these are, as patterns."""

    gateways: tuple[str, ...]
    models: tuple[str, ...]


class Discovery:
    """`hosts` asks Envoy, `used` the database; neither raises."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        aliases: Aliases,
        *,
        hosts: Callable[[], Awaitable[Clusters | None]],
        used: Callable[[], Awaitable[Mapping[str, Use] | None]],
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._aliases = aliases
        self._hosts = hosts
        self._used = used

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == STATUS:
            every = Reader(self._config.api_gateways.enabled, merging.ALL)
            page = await self.page(every, for_operators=True)
        else:
            viewer = identity.viewer(headers_of(scope))
            if viewer is None:
                raise RuntimeError("nobody said who asks for this page")
            page = await self.page(Reader(viewer.gateways, viewer.models))
        await respond(send, _json(page), OWN_WORDS)

    async def page(self, reader: Reader, *, for_operators: bool = False) -> Page:
        """Within two seconds, with what is known by then."""
        shown = [name for name in self._config.api_gateways.enabled if name in reader.gateways]
        metrics = self._config.api_gateways.discovery.include_metrics
        looks = asyncio.gather(*(self._newest(name) for name in shown))
        hosts, used, _ = await asyncio.gather(
            self._hosts(), self._used() if metrics else _nothing(), looks
        )
        return {
            "version": parallama.__version__,
            "gateways": [
                await self._gateway(name, reader, hosts, used, for_operators) for name in shown
            ],
        }

    async def _newest(self, gateway: str) -> None:
        looks = [
            asyncio.create_task(kept.look())
            for path, kept in self._catalog.sources(gateway).items()
            if path in (TAGS, MODELS)
        ]
        await asyncio.wait(looks, timeout=_PATIENCE_SECONDS)
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)

    async def _gateway(
        self,
        name: str,
        reader: Reader,
        hosts: Clusters | None,
        used: Mapping[str, Use] | None,
        for_operators: bool,
    ) -> Page:
        sources = self._catalog.sources(name)
        states = {path: kept.state() for path, kept in sources.items()}
        aliases = await self._aliases.of(name)
        told = _judged(_best(states))
        listed = (
            merging.models(told.answer.body, View(reader.models, aliases)) if told.answer else ()
        )
        page: Page = {
            "name": name,
            "base_path": self._settings(name).base_path,
            "apis": [{"dialect": dialect, "base_path": path} for dialect, path in APIS[name]],
            "features": list(self._features(name, states, mapped=bool(aliases))),
            "models": [{"name": each.name, "mapped": each.mapped} for each in listed],
            "health": health(told, hosts, for_operators=for_operators),
            "cache": {
                "state": _freshness(told),
                "age": None if told.age is None else int(told.age),
            },
        }
        if used is not None:
            use = used.get(name, Use(0, None))
            page["metrics"] = {
                "window_seconds": WINDOW_SECONDS,
                "requests": use.requests,
                "time_to_first_token_p50": use.first_token,
            }
        if for_operators:
            page["lists"] = [
                {
                    "path": path,
                    "age": None if state.age is None else int(state.age),
                    "trouble": state.trouble,
                }
                for path, state in states.items()
            ]
        return page

    def _settings(self, gateway: str) -> Any:
        return getattr(self._config.api_gateways, gateway)

    def _features(self, name: str, states: Mapping[str, State], *, mapped: bool) -> Iterator[str]:
        yield "streaming"
        if mapped:
            yield "model_mapping"
        tags = states.get(TAGS)
        if tags is not None and tags.answer is not None and tags.answer.status == 200:
            yield "ollama_api"
        if self._config.rate_limiting.enforcement == "hard":
            yield "hard_limits"
        if name in self._config.api_gateways.text_counted:
            yield "text_counting"


def health(told: State, hosts: Clusters | None, *, for_operators: bool = False) -> Page:
    """
    `well`: Envoy holds one of the servers for well, where it can be asked, and the last question
    was answered. `unknown`: nobody knows yet. Else `away`.
    """
    found = _of(told, hosts)
    page: Page = {"status": "unknown", "checked_by": "catalog" if found is None else "envoy"}
    if told.trouble or (found is not None and not any(host.well for host in found)):
        page["status"] = "away"
    elif told.answer is not None:
        page["status"] = "well"
    if found is not None:
        page["servers"] = len(found)
        page["servers_well"] = sum(host.well for host in found)
    if for_operators:
        page["trouble"] = told.trouble
        page["away"] = [host.address for host in found or () if not host.well]
    return page


def _of(told: State, hosts: Clusters | None) -> tuple[Host, ...] | None:
    cluster = told.answer.cluster if told.answer is not None else ""
    return None if hosts is None else hosts.get(cluster or _ONLY)


def _best(states: Mapping[str, State]) -> State:
    """Of the lists of models: Ollama's own, where the server has it."""
    of = [states[path] for path in (TAGS, MODELS) if path in states]
    with_models = [state for state in of if state.answer and state.answer.status == 200]
    return (with_models or of)[0]


def _judged(told: State) -> State:
    """It was asked just now: what is older is what it does not say any more."""
    if told.trouble is None and told.age is not None and told.age > _LATE_SECONDS:
        return replace(told, trouble="it does not answer right now")
    return told


def _freshness(told: State) -> str:
    if told.answer is None:
        return "empty"
    return "stale" if told.trouble else "fresh"


def _json(page: Page) -> Answer:
    return Answer(200, "application/json", merging.text(page))


async def _nothing() -> None:
    return None
