"""What `up` fills into the operator's Envoy files from config.yaml."""

import ipaddress
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from parallama.config import Config, Cors

_HCM = "envoy.filters.network.http_connection_manager"
_TYPES = "type.googleapis.com/envoy"
_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_UPSTREAM = "upstream"

_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_REQUEST_HEADERS = (
    *("authorization", "x-api-key", "api-key", "content-type", "accept", "user-agent"),
    *("x-requested-with", "if-match", "if-none-match", "idempotency-key"),
    *("openai-organization", "openai-project", "openai-beta"),
    *("anthropic-version", "anthropic-beta", "anthropic-dangerous-direct-browser-access"),
    *(
        f"x-stainless-{name}"
        for name in (
            *("arch", "async", "custom-poll-interval", "helper", "helper-method", "lang", "os"),
            *("package-version", "poll-helper", "retry-count", "runtime", "runtime-version"),
            "timeout",
        )
    ),
)
_ANSWER_HEADERS = (
    *("x-request-id", "request-id", "retry-after", "x-should-retry"),
    *(
        f"x-ratelimit-{what}-{unit}"
        for what in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
    *("x-parallama-changed", "x-parallama-cache", "age", "etag", "link", "location"),
    "www-authenticate",
)

Upstream = tuple[str, str, int]
"""Scheme, host and port."""


def fill(
    bootstrap: Any, clusters: Any, routes: Any, *, config: Config, upstreams: Sequence[Upstream]
) -> None:
    """
    Change these trees. All else stays as the operator wrote it.

    Raises LookupError, TypeError or AttributeError where they lack what is filled in.
    """
    listener, manager = gateway(bootstrap)
    listener["address"] = socket(config.server.host, config.server.port)
    manager["xff_num_trusted_hops"] = config.server.trusted_hops
    if config.rate_limiting.enforcement == "hard":
        named("cap", manager["http_filters"]).pop("disabled", None)

    cluster = named(_UPSTREAM, clusters["resources"])
    hosts = _send_to(cluster, upstreams)
    cluster.setdefault("circuit_breakers", {}).setdefault("thresholds", [{}])[0]["max_requests"] = (
        config.api_gateways.ollama.max_parallel
    )

    silence = config.api_gateways.ollama.silence_seconds
    for route in _routes_to_upstream(routes):
        if silence is not None:
            route["idle_timeout"] = f"{silence}s"
        if len(hosts) == 1 and _is_one(hosts[0]):
            route.pop("retry_policy", None)  # it would be asked again itself
    if config.server.cors.origins:
        for virtual_host in _virtual_hosts(routes):
            at = virtual_host.setdefault("typed_per_filter_config", {})
            at["cors"] = _cors(config.server.cors)  # which enables the filter


def gateway(bootstrap: Any) -> tuple[Any, Any]:
    """The listener of that name, and its HTTP connection manager."""
    listener = named("gateway", bootstrap["static_resources"]["listeners"])
    return listener, named(_HCM, listener["filter_chains"][0]["filters"])["typed_config"]


def named(name: str, things: Any) -> Any:
    found = [thing for thing in things if thing["name"] == name]
    if not found:
        raise LookupError(f"nothing is named {name}")
    return found[0]


def typed(kind: str, **fields: Any) -> dict[str, Any]:
    return {"name": kind, "typed_config": {"@type": f"{_TYPES}.{kind}", **fields}}


def socket(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _send_to(cluster: Any, upstreams: Sequence[Upstream]) -> list[str]:
    """
    The hosts that it has then. One upstream takes the place of the first endpoint, several that of
    all of them.
    """
    groups = cluster["load_assignment"]["endpoints"]
    if len(upstreams) == 1:
        groups[0]["lb_endpoints"][0]["endpoint"]["address"] = socket(*upstreams[0][1:])
    else:
        groups[:] = [
            {"lb_endpoints": [{"endpoint": {"address": socket(*at[1:])}} for at in upstreams]}
        ]
    hosts = [
        each["endpoint"]["address"]["socket_address"]["address"]
        for group in groups
        for each in group["lb_endpoints"]
    ]
    if upstreams[0][0] == "https":
        cluster["transport_socket"] = _tls(hosts)
    return hosts


def _tls(hosts: Sequence[str]) -> dict[str, Any]:
    """A verified TLS connection to one of them. SSL_CERT_FILE means what it means to OpenSSL."""
    trusted = {"filename": os.environ.get("SSL_CERT_FILE", _CA_BUNDLE)}
    expected = [
        {"san_type": "IP_ADDRESS" if _is_address(host) else "DNS", "matcher": {"exact": host}}
        for host in hosts
    ]
    validation = {"trusted_ca": trusted, "match_typed_subject_alt_names": expected}
    names = [host for host in hosts if not _is_address(host)]
    return typed(
        "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        common_tls_context={"validation_context": validation},
        **({"auto_host_sni": True} if names else {}),
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_one(host: str) -> bool:
    """Whether it is one server for sure: another name may have many addresses."""
    return host == "localhost" or _is_address(host)


def _virtual_hosts(routes: Any) -> Iterator[Any]:
    for resource in routes["resources"]:
        yield from resource["virtual_hosts"]


def _routes_to_upstream(routes: Any) -> Iterator[Any]:
    for virtual_host in _virtual_hosts(routes):
        for route in virtual_host["routes"]:
            action = route.get("route", {})
            if action.get("cluster") == _UPSTREAM:
                yield action


def _cors(cors: Cors) -> dict[str, Any]:
    """
    Envoy answers a preflight of these origins itself; that of another goes on, and is refused as
    any call without a credential. Pages may send cookies along, none of which is read, unless
    every page there is may call.
    """
    return {
        "@type": f"{_TYPES}.extensions.filters.http.cors.v3.CorsPolicy",
        "allow_origin_string_match": [_origin(each) for each in cors.origins],
        "allow_methods": _METHODS,
        "allow_headers": ", ".join((*_REQUEST_HEADERS, *cors.headers)),
        "expose_headers": ", ".join(_ANSWER_HEADERS),
        "max_age": str(cors.max_age),
        "allow_credentials": "*" not in cors.origins,
    }


def _origin(origin: str) -> dict[str, Any]:
    if origin == "*":
        return {"safe_regex": {"regex": ".*"}}
    if "*" not in origin:
        return {"exact": origin}
    host, any_port = origin.removesuffix(":*"), origin.endswith(":*")
    pattern = "[a-z0-9.-]*".join(map(re.escape, host.split("*")))
    return {"safe_regex": {"regex": pattern + ":[0-9]+" * any_port}}
