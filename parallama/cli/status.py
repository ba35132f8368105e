"""`parallama status`."""

import asyncio
import http.client
import json
from typing import TYPE_CHECKING, Any

import typer

from parallama.cli import running
from parallama.cli.desk import load_config
from parallama.cli.options import ConfigPath, Output, OutputFormat
from parallama.cli.show import show
from parallama.errors import ParallamaError

if TYPE_CHECKING:
    from parallama.config import Config

_HEALTH_SECONDS = 3
_GATEWAY_SECONDS = 5
_LARGEST_PAGE = 8 << 20


def status(config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """
    Show whether it runs, answers, and finds its stores and the model servers, and what it offers.

    Exit code 1 unless all of that is so.
    """
    loaded = load_config(config)
    found = asyncio.run(_look(loaded))
    gateways = found["gateways"]
    if output is Output.TABLE and isinstance(gateways, list):
        found["gateways"] = [_in_words(each) for each in gateways]
    show(found, output)
    if not found["ok"]:
        raise typer.Exit(1)


async def _look(config: "Config") -> dict[str, Any]:
    pid = running.pid_of_up(config.state_dir)
    health = await asyncio.to_thread(_health, config)
    database, counts = await _database(config)
    redis = await _redis(config) if pid or not config.redis.embedded else "not running"
    children = running.children(config.run_dir) if pid is not None else {}
    well = [pid is not None, health == "ok", database == "ok", redis == "ok"]
    well += [child["state"] == "serving" for child in children.values()]
    gateways = await _gateways(config)
    well += [isinstance(gateways, list) and all(map(_is_well, gateways))]
    trail, has_room = _trail(config)
    well.append(has_room)
    return {
        "ok": all(well),
        "config": str(config.source),
        "up": "not running" if pid is None else f"process {pid}",
        "listen": _url(config),
        "health": health,
        "database": database,
        "redis": redis,
        **counts,
        "trail": trail,
        "children": [_told(name, child) for name, child in children.items()],
        "gateways": gateways,
    }


def _url(config: "Config") -> str:
    host, port = config.server.host, config.server.port
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _health(config: "Config") -> str:
    """What GET /healthz says on the listen address, or why it says nothing."""
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
    host = anywhere.get(config.server.host, config.server.host)
    connection = http.client.HTTPConnection(host, config.server.port, timeout=_HEALTH_SECONDS)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        return "ok" if answer.status == 200 else f"answers {answer.status}"
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {error or type(error).__name__}"
    finally:
        connection.close()


async def _gateways(config: "Config") -> list[dict[str, Any]] | str:
    """What /gateway/discovery says, for operators; or why nobody says it."""
    from parallama.admin.catalog.asking import Unanswered, ask
    from parallama.admin.catalog.discovery import STATUS
    from parallama.stores import socket_path

    try:
        at = socket_path(config.run_dir / "admin.sock")
        told = await ask(at, "GET", STATUS, seconds=_GATEWAY_SECONDS, largest=_LARGEST_PAGE)
        return list(json.loads(told.body)["gateways"])
    except (Unanswered, ParallamaError, ValueError, LookupError, TypeError) as error:
        return f"not known: {error}"


def _in_words(gateway: dict[str, Any]) -> str:
    health, cache = gateway["health"], gateway["cache"]
    facts = [f"{len(gateway['models'])} models"]
    if cache["age"] is not None:
        facts.append(f"asked {cache['age']} s ago")
    if health["trouble"]:
        facts.append(health["trouble"])
    facts += [f"{host} away" for host in health["away"]]
    return f"{gateway['name']} {health['status']} ({', '.join(facts)})"


def _is_well(gateway: dict[str, Any]) -> bool:
    return bool(gateway["health"]["status"] == "well")


async def _database(config: "Config") -> tuple[str, dict[str, Any]]:
    from parallama.db.manage import people, usage
    from parallama.db.manage.schema import managed

    try:
        async with managed(config.database) as engine:
            users, active_keys = await people.count(engine)
            rows = await usage.count(engine)
    except ParallamaError as error:
        return str(error), {}
    return "ok", {"users": users, "active_keys": active_keys, "usage_rows": rows}


async def _redis(config: "Config") -> str:
    from parallama.resp import RedisError
    from parallama.stores import connect_redis

    try:
        async with connect_redis(config) as redis:
            await redis.ping()
    except (RedisError, OSError, ParallamaError) as error:
        return f"no answer: {error or type(error).__name__}"
    return "ok"


def _trail(config: "Config") -> tuple[str, bool]:
    """What waits there for the database, and whether there is room for more."""
    from parallama.trail import Trail

    trail = Trail(config.state_dir / "trail")
    try:
        size, waiting, letters = trail.size(), trail.waiting(), len(trail.letters())
    except OSError as error:
        return f"cannot be read: {error.strerror}", False
    has_room = size <= config.usage.trail_max_size
    facts = [f"{size} bytes", f"{waiting} not stored yet"]
    facts += [f"{letters} kept aside: see `usage reconcile`"] * bool(letters)
    return ", ".join(facts + ["full"] * (not has_room)), has_room


def _told(name: str, child: dict[str, Any]) -> str:
    facts = []
    if child.get("pid") is not None:
        facts.append(f"process {child['pid']}")
    if child.get("restarts"):
        facts += [f"restarts {child['restarts']}", f"last exit {child.get('last_exit')}"]
    return f"{name} {child['state']}" + (f" ({', '.join(facts)})" if facts else "")
