"""Why a request was let in or refused, in words; and where Envoy would send one (pure)."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from parallama.usage import UsageRecord

RULES: Mapping[str, str] = {
    "disabled": "the user is disabled",
    "network": "the key may not be used from this address",
    "gateway": "the key may not be used for this gateway",
    "path": "the gateway offers no such endpoint",
    "method": "the endpoint does not take this method",
    "role": "no role of the user grants what the endpoint needs",
    "scope": "the user may do this, and the key's scopes do not include it",
    "models": "a key that is bound to some models may not manage models",
    "model": "the key may not use this model, or none was named",
    "limit": "a limit had no room for it",
    "unchecked": "limits could not be checked: ratelimit or Redis did not answer",
}
"""By what authz and ratelimit call what refused a request."""

_NO_ANSWER = {
    "UAEX": "authz, or a store that it needs, did not answer",
    "RLSE": RULES["unchecked"],
}


@dataclass(frozen=True, slots=True)
class Route:
    """What the route of a path tells authz; without a gateway it is open, or leads nowhere."""

    name: str
    gateway: str | None
    dialect: str
    base: str


def route_of(path: str, configuration: Any) -> Route:
    """
    The first route of envoy/routes.yaml that a path meets. Raises LookupError or TypeError where
    that file has another form.
    """
    for route in configuration["resources"][0]["virtual_hosts"][0]["routes"]:
        if _meets(path, route["match"]):
            filters = route.get("typed_per_filter_config", {})
            check = filters.get("identity", {}).get("check_settings", {})
            told = check.get("context_extensions", {})
            return Route(
                str(route.get("name", "")),
                told.get("gateway"),
                told.get("dialect", ""),
                told.get("base", ""),
            )
    return Route("none", None, "", "")


def _meets(path: str, match: Mapping[str, Any]) -> bool:
    if "headers" in match:  # of what only we send
        return False
    if "safe_regex" in match:
        return re.fullmatch(match["safe_regex"]["regex"], path) is not None
    if (whole := match.get("path_separated_prefix")) is not None:
        return path == whole or path.startswith(f"{whole}/")
    return path == match.get("path") or ("prefix" in match and path.startswith(match["prefix"]))


def explain(row: UsageRecord) -> dict[str, Any]:
    """
    What the usage row of a request tells about its decision: which rule, with the counters and the
    ages of what was remembered at that moment.
    """
    told = json.loads(row.decision) if row.decision else {}
    rule = told.get("rule")
    return {
        "request_id": row.request_id,
        "timestamp": row.timestamp,
        "user": row.username,
        "user_id": row.user_id,
        "key_id": row.key_id,
        "gateway": row.gateway,
        "endpoint": row.endpoint,
        "model": row.model_name,
        "requested_model": row.requested_model,
        "status": row.status_code,
        "verdict": _verdict(row, rule),
        "rule": rule,
        "why": _why(row, rule, told),
        "credential_age": _age(row, told.get("known_at")),
        "limits_age": _age(row, told.get("policy_at")),
        "limit": told.get("limit"),
        "used": told.get("used"),
        "held": told.get("held"),
        "needed": told.get("needs"),
        "resets_at": _time(told.get("ends")),
        "error": row.error_message,
        "flags": row.flags or None,
    }


def _verdict(row: UsageRecord, rule: str | None) -> str:
    if row.token_source == "unknown":  # noqa: S105 - not a password
        return "unknown"
    refused = rule is not None or (not row.upstream_host and row.status_code >= 400)
    return "refused" if refused else "allowed"


def _why(row: UsageRecord, rule: str | None, told: Mapping[str, Any]) -> str:
    if rule is not None:
        sentence = RULES.get(rule, rule)
        return f"{sentence}: {told['limit']}" if rule == "limit" and "limit" in told else sentence
    for flag, sentence in _NO_ANSWER.items():
        if flag in row.flags.split(","):
            return sentence
    if row.token_source == "unknown":  # noqa: S105 - not a password
        return "it was let in, and nobody told how it ended"
    if _verdict(row, rule) == "refused":
        return "Envoy refused it: its body, its size, or a server that cannot be reached"
    if "away" in told:
        return f"it was let in without limits being checked: {told['away']} was away"
    if "limit" in told:
        return f"every limit had room; the tightest was {told['limit']}"
    if "policy_at" in told:
        return "no limit is set for it"
    return "it spends nothing, so no limit was asked" if told else "the row does not say"


def _age(row: UsageRecord, since: float | None) -> float | None:
    """Of what was remembered, in seconds, when the request came."""
    return None if since is None else max(0.0, round(row.timestamp.timestamp() - since, 3))


def _time(at: float | None) -> datetime | None:
    return None if at is None else datetime.fromtimestamp(at, UTC)
