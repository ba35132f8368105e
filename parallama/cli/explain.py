"""`parallama explain`."""

import ipaddress
import time
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama.cli.desk import Desk, run
from parallama.cli.options import ConfigPath, Output, OutputFormat
from parallama.cli.show import show, show_rows
from parallama.errors import NotFound, UsageError

# The services' own rules, and all that they need: this command alone has use for them.
if TYPE_CHECKING:
    from authz.decide import Allow, Asked, Deny
    from parallama.config import Config
    from parallama.counters import Counters
    from parallama.db import Store
    from parallama.db.accounts import KeyRecord
    from parallama.explain import Route
    from ratelimit import rules
    from ratelimit.service import Decided, RateLimit

_COLUMNS = ("limit", "used", "held", "needed", "amount", "left", "resets_at", "room")
_METHODS = ("POST", "GET", "DELETE", "HEAD")


@dataclass(frozen=True)
class _Call:
    path: str
    method: str | None
    gateway: str | None
    address: str
    model: str | None
    max_tokens: int | None
    body_bytes: int
    requested: str | None = None
    """What `model` was called, where that name is mapped."""


def explain(
    request: Annotated[
        str | None, typer.Option(metavar="ID", help="A request that ended, by its x-request-id.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Id, public part or name of a key.")
    ] = None,
    path: Annotated[
        str | None, typer.Option(help="What would be called, such as /v1/chat/completions.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model in the body.")] = None,
    method: Annotated[
        str | None, typer.Option(help="Else the one that the endpoint takes.", show_default=False)
    ] = None,
    gateway: Annotated[
        str | None, typer.Option(help="Else the one that the path belongs to.", show_default=False)
    ] = None,
    address: Annotated[str, typer.Option(help="Where the call comes from.")] = "127.0.0.1",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens that it asks for.")
    ] = None,
    body_bytes: Annotated[int, typer.Option(min=0, help="The size of its body.")] = 0,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Say which rule decided about a request, or would decide about one now.

    With --request: by its usage row, with the counters and the age of what was remembered then, in
    seconds. With --key and --path: by the services' own rules, the database and the counters as
    they are now; nothing is taken. How much a call would need is an estimate: `ratelimit` learns
    better ones from the calls that it sees.
    """
    if request is not None and key is None and path is None:
        show(run(config, partial(_of_request, id=request)), output)
        return
    if request is not None or key is None or path is None:
        raise UsageError("name either --request, or --key and --path")
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise UsageError(f"not an address: {address!r}") from None
    call = _Call(path, method, gateway, address, model, max_tokens, body_bytes)
    told, limits = run(config, partial(_of_call, which=key, call=call))
    if output is Output.TABLE:
        show(told, output)
        if limits:
            print()
            show_rows(limits, output, _COLUMNS)
    else:
        show(told | {"limits": limits}, output)


async def _of_request(desk: Desk, *, id: str) -> dict[str, Any]:
    from parallama.db.manage import usage
    from parallama.explain import explain

    row = await usage.find_row(desk.engine, id)
    if row is None:
        raise NotFound(
            f"there is no row of the request {id!r}: it came without a good key (401 is no row, "
            "see the log of authz), or it has not ended, or its row was pruned"
        )
    return explain(row)


async def _of_call(
    desk: Desk, *, which: str, call: _Call
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from parallama.db import database
    from parallama.db.accounts import find_key
    from parallama.db.manage import credentials

    route = _route(desk, call)
    found = await credentials.get_key(desk.engine, which)
    async with database(desk.config.database) as store:
        key = await find_key(store, found.public_id, roles=desk.roles)
        if key is None:
            raise NotFound(f"there is no key {which!r} any more")
        call = await _as_meant(desk, store, call, route)
        return await _decided(desk, store, key, call, route)


async def _as_meant(desk: Desk, store: "Store", call: _Call, route: "Route") -> _Call:
    """With the model that its name means, as Envoy passes it on."""
    from parallama import mappings
    from parallama.db.mappings import mappings_of
    from parallama.endpoints import Action, find_endpoint

    asked = _asked(call, route)
    endpoint = find_endpoint(asked.method, asked.path)
    if endpoint is None or not endpoint.follows_mappings:
        return call
    told = desk.config.api_gateways
    if call.model is None:
        default = told.default_models.get(asked.gateway)
        return replace(call, model=default) if endpoint.action is Action.INFER else call
    stored = (await mappings_of(store)).get(asked.gateway, {})
    table = mappings.merged(told.model_mappings.get(asked.gateway, {}), stored)
    target = mappings.target_of(table, call.model)
    return call if target is None else replace(call, model=target, requested=call.model)


async def _decided(
    desk: Desk, store: "Store", key: "KeyRecord", call: _Call, route: "Route"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from authz.decide import Deny
    from parallama.endpoints import Action

    asked = _asked(call, route)
    decision = _judge(desk, asked, key, call)
    told = _identity(desk, asked, key) | {"model": call.model, "requested_model": call.requested}
    if isinstance(decision, Deny):
        return told | _refusal(
            decision.status, decision.rule or decision.code, decision.message
        ), []
    told["endpoint"] = decision.endpoint.path
    if decision.endpoint.action is not Action.INFER:
        return told | {"verdict": "allowed", "why": "it spends nothing: no limit is asked"}, []
    if call.model is None:
        raise UsageError(
            "name --model: a call of this endpoint has one, and limits may depend on it"
        )
    ask = _ask(key, asked, decision, call)
    return await _limited(desk, store, ask, told)


def _judge(desk: Desk, asked: "Asked", key: "KeyRecord", call: _Call) -> "Allow | Deny":
    """Both questions that Envoy asks authz."""
    from authz.decide import Allow, ModelAsked, identify, judge_model
    from authz.signed import told

    decision = identify(
        asked, key, gateways=desk.config.api_gateways.enabled, now=desk.now.timestamp()
    )
    if key.kind == "ssh":
        decision = told(decision)
    if isinstance(decision, Allow) and decision.models and decision.endpoint.names_model:
        of_model = ModelAsked(asked.dialect, decision.models, call.model, requested=call.requested)
        return judge_model(of_model) or decision
    return decision


def _route(desk: Desk, call: _Call) -> "Route":
    import yaml

    from parallama.explain import route_of
    from parallama.roles import GATEWAYS
    from parallama.supervisor.envoy_files import packaged

    file = (desk.config.envoy.dir or packaged()) / "routes.yaml"
    try:
        route = route_of(call.path, yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"the routes in {file} cannot be read: {error}") from None
    if call.gateway is not None:
        return replace(route, gateway=call.gateway, dialect=route.dialect or call.gateway)
    if route.gateway not in GATEWAYS:
        raise UsageError(
            f"{call.path} is no call to a model: it meets the route {route.name!r}, which is open, "
            "leads nowhere, or leads to the admin API"
        )
    return route


def _asked(call: _Call, route: "Route") -> "Asked":
    from authz.decide import Asked
    from parallama.endpoints import find_endpoint

    path, _, query = call.path.removeprefix(route.base).partition("?")
    methods = [method for method in _METHODS if find_endpoint(method, path)]
    method = call.method.upper() if call.method else next(iter(methods), "POST")
    return Asked(method, path, query, route.gateway or "", route.dialect, call.address, ())


def _identity(desk: Desk, asked: "Asked", key: "KeyRecord") -> dict[str, Any]:
    from parallama.endpoints import find_endpoint

    endpoint = find_endpoint(asked.method, asked.path)
    return {
        "user": key.account.username,
        "user_id": key.account.id,
        "role": key.account.role,
        "key_id": key.id,
        "key": key.name,
        "kind": key.kind,
        "method": asked.method,
        "gateway": asked.gateway,
        "dialect": asked.dialect,
        "endpoint": endpoint.path if endpoint else None,
        "needs": f"models:{endpoint.action}:{asked.gateway}" if endpoint else None,
        "models": "every one" if key.models is None else key.models,
    }


def _refusal(status: int, rule: str, message: str) -> dict[str, Any]:
    from parallama.explain import RULES

    return {
        "verdict": "refused",
        "status": status,
        "rule": rule,
        "why": RULES.get(rule, rule),
        "message": message,
    }


def _ask(key: "KeyRecord", asked: "Asked", decision: "Allow", call: _Call) -> "rules.Reserve":
    from ratelimit import rules

    return rules.Reserve(
        user=key.account.id,
        key=key.id,
        gateway=asked.gateway,
        dialect=asked.dialect,
        model=call.model or "",
        endpoint=decision.endpoint.path,
        max_tokens=call.max_tokens,
        body_bytes=call.body_bytes,
        request_id=f"explain-{time.time_ns()}",
    )


async def _limited(
    desk: Desk, store: "Store", ask: "rules.Reserve", told: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from parallama.counters import Counters
    from parallama.stores import connect_redis
    from ratelimit import rules

    settings = desk.config
    async with (
        connect_redis(settings) as redis,
        aclosing(
            Counters(
                redis,
                lease=settings.rate_limiting.reservation_seconds,
                timeout=settings.redis.timeout_seconds,
            )
        ) as counters,
    ):
        service = _service(settings, store, counters, desk.now.timestamp())
        decided = await service.decide(ask, take=False)
        await service.aclose()
    need = decided.need
    limits = [_limit(level, need.of(level.bucket.limit.unit)) for level in decided.levels if need]
    answer = decided.answer
    if answer is None:
        return told | _refusal(503, "unchecked", "Redis is away, and calls are denied then."), []
    if isinstance(answer, rules.Refused):
        refusal = _refusal(429, "limit", answer.message)
        return told | refusal | {"retry_after": answer.retry_after}, limits
    return told | {"verdict": "allowed", "why": _room(answer, decided)}, limits


def _service(config: "Config", store: "Store", counters: "Counters", now: float) -> "RateLimit":
    """As ratelimit's own process makes it."""
    from parallama.db import ledger
    from parallama.db.policies import policy_of
    from parallama.db.prices import prices_of
    from parallama.endpoints import METERED
    from parallama.prices import Prices
    from ratelimit.charging import Charging
    from ratelimit.estimate import Estimate
    from ratelimit.outage import Away, Outage
    from ratelimit.policies import Policies
    from ratelimit.rebuild import Rebuild
    from ratelimit.service import RateLimit

    told = config.rate_limiting
    away: dict[str, Away] = {
        gateway: told.when_redis_is_away_by_gateway.get(gateway, told.when_redis_is_away)
        for gateway in config.api_gateways.enabled
    }
    policies = Policies(partial(policy_of, store), size=1)
    rebuild = Rebuild(counters, partial(ledger.spending, store, endpoints=METERED))

    def clock() -> float:
        return now

    return RateLimit(
        counters,
        policies,
        clock=clock,
        zone=told.zone,
        estimate=Estimate(
            bytes_per_token=told.bytes_per_token, default_max_tokens=told.default_max_tokens
        ),
        prices=Prices(partial(prices_of, store)),
        rebuild=rebuild,
        charging=Charging(counters, policies, rebuild, clock=clock, zone=told.zone),
        outage=Outage(away, processes=told.processes, monotonic=time.monotonic),
        hard=told.enforcement == "hard",
    )


def _room(answer: "rules.Admitted", decided: "Decided") -> str:
    if decided.need is None:
        return "Redis is away, and rate_limiting.when_redis_is_away lets it pass"
    if any(level.refuses for level in decided.levels):
        return "a grant has room where the limits have none"
    if answer.would_refuse:
        return f"only limits in the shadow have no room: {', '.join(answer.would_refuse)}"
    return "every limit has room" if decided.levels else "no limit is set for it"


def _limit(level: "rules.Level", needed: int) -> dict[str, Any]:
    """In the limit's own unit."""
    from parallama.limits import Window
    from ratelimit.rules import describe

    limit = level.bucket.limit
    parts = limit.unit.parts

    def plain(amount: int) -> float | int:
        return amount if parts == 1 else round(amount / parts, 9)

    ends = None if limit.window is Window.MOMENT else level.bucket.end
    return {
        "limit": describe(limit) + (" (shadow)" if limit.shadow else ""),
        "used": plain(level.used),
        "held": plain(level.reserved),
        "needed": plain(needed),
        "amount": plain(limit.amount),
        "left": plain(level.left),
        "resets_at": None if ends is None else datetime.fromtimestamp(ends, UTC),
        "room": "no" if level.full else "yes",
    }
