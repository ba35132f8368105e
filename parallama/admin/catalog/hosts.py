"""What Envoy's active checks say of the servers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallama.admin.catalog.asking import Unanswered, ask

_PATH = "/clusters?format=json"
_SECONDS = 1.0
_LARGEST = 8 << 20
_FAILED = ("failed_active_health_check", "failed_outlier_check", "pending_active_hc")


@dataclass(frozen=True, slots=True)
class Host:
    """One server, as its address is written."""

    address: str
    well: bool


Clusters = Mapping[str, tuple[Host, ...]]


async def look(socket: str) -> Clusters | None:
    """The servers of each of Envoy's clusters; None where it cannot be asked."""
    try:
        said = await ask(socket, "GET", _PATH, seconds=_SECONDS, largest=_LARGEST)
    except Unanswered:
        return None
    return read(said.body) if said.status == 200 else None


def read(body: bytes) -> Clusters | None:
    """None where it is not what Envoy 1.40 says."""
    try:
        told = json.loads(body)
        return {
            cluster["name"]: tuple(map(_host, cluster.get("host_statuses", [])))
            for cluster in told.get("cluster_statuses", [])
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _host(status: Any) -> Host:
    # What is 0 or false is left out.
    health = status.get("health_status", {})
    well = health.get("eds_health_status", "HEALTHY") in ("HEALTHY", "DEGRADED", "UNKNOWN")
    return Host(_address(status["address"]), well and not any(map(health.get, _FAILED)))


def _address(address: Any) -> str:
    if "pipe" in address:
        return str(address["pipe"]["path"])
    at = address["socket_address"]
    host = at["address"]
    return f"[{host}]:{at['port_value']}" if ":" in host else f"{host}:{at['port_value']}"
