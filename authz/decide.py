"""May this request go on? (pure)"""

import ipaddress
from collections.abc import Container
from dataclasses import dataclass
from functools import lru_cache

from parallama.db.accounts import KeyRecord
from parallama.dialects import OLLAMA
from parallama.roles import (
    ONE_MODEL,
    Action,
    Endpoint,
    find_endpoint,
    knows_path,
    may,
    model_allowed,
)


@dataclass(frozen=True, slots=True)
class Asked:
    """The first question: who is this? `path` is the upstream's own, without its query."""

    method: str
    path: str
    query: str
    gateway: str
    dialect: str
    address: str
    credentials: tuple[str, ...]
    """Every API key that was sent, by whatever header; a header of another form is ''."""


@dataclass(frozen=True, slots=True)
class ModelAsked:
    """The second question: may the key's owner use this model?"""

    dialect: str
    models: tuple[str, ...]
    model: str | None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who it is: what the services after us, and the usage row, need to know."""

    user: str
    username: str
    key: str
    role: str
    gateway: str
    dialect: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class Allow:
    """`models`: all that the key may use, or None where it may use every one."""

    caller: Caller
    endpoint: Endpoint
    models: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Deny:
    """`caller` is known where the key was good, so that the refusal becomes a usage row."""

    status: int
    code: str
    message: str
    caller: Caller | None = None


HOW_TO = "send your key as 'Authorization: Bearer plm_...'"
UNKNOWN_KEY = Deny(401, "invalid_api_key", f"Unknown API key: {HOW_TO}.")

_MISSING = Deny(401, "invalid_api_key", f"Missing API key: {HOW_TO}.")
_CONFLICT = Deny(
    401, "invalid_api_key", "Two different API keys were sent: send one, in one header."
)
_IN_QUERY = Deny(
    401,
    "invalid_api_key",
    f"An API key does not belong in the address, where it gets logged: {HOW_TO}; revoke this one.",
)
_REVOKED = Deny(401, "invalid_api_key", "This API key was revoked: ask your administrator for one.")
_EXPIRED = Deny(401, "invalid_api_key", "This API key has expired: ask your administrator for one.")


def credential(asked: Asked) -> str | Deny:
    """The one API key that was sent."""
    if "plm_" in asked.query or "plm_" in asked.path:
        return _IN_QUERY
    distinct = set(asked.credentials)
    if not distinct:
        return _MISSING
    if len(distinct) > 1:
        return _CONFLICT
    return distinct.pop()


def identify(
    asked: Asked, key: KeyRecord | None, *, gateways: Container[str], now: float
) -> Allow | Deny:
    """
    Judge a key whose secret was verified, or None for one that is not known.

    `gateways` are those that are served; what is asked of others does not exist.
    """
    if key is None:
        return UNKNOWN_KEY
    if key.revoked:
        return _REVOKED
    if key.expires_at is not None and key.expires_at <= now:
        return _EXPIRED
    served = asked.gateway in gateways
    endpoint = find_endpoint(asked.method, asked.path) if served else None
    caller = Caller(
        user=key.user_id,
        username=key.username,
        key=key.id,
        role=key.role,
        gateway=asked.gateway,
        dialect=asked.dialect,
        endpoint=endpoint.path if endpoint else "unknown",
    )
    if key.user_disabled:
        return _forbidden("This user is disabled: ask your administrator.", caller)
    if key.networks is not None and not _within(asked.address, key.networks):
        return _forbidden("This API key may not be used from your network address.", caller)
    if endpoint is None:
        return _unknown_endpoint(asked, caller, served=served)
    if not may(key.role, endpoint.action):
        return _forbidden(f"The role {key.role} may not do this ({endpoint.action}).", caller)
    if key.models is not None and endpoint.action is Action.MANAGE:
        return _forbidden("An API key restricted to some models may not manage models.", caller)
    if key.models is not None and endpoint.path == ONE_MODEL:
        named = asked.path.removeprefix("/v1/models/")
        hidden = judge_model(ModelAsked(asked.dialect, key.models, named))
        if hidden is not None:
            return Deny(hidden.status, hidden.code, hidden.message, caller)
    return Allow(caller, endpoint, key.models)


def judge_model(asked: ModelAsked) -> Deny | None:
    """None where the model may be used. A hidden model and an unknown one look alike."""
    if asked.model is None:
        return Deny(400, "model_required", "The request names no model: set 'model'.")
    if model_allowed(asked.models, asked.model):
        return None
    if asked.dialect == OLLAMA:
        return Deny(
            404, "model_not_found", f'model "{asked.model}" not found, try pulling it first'
        )
    return Deny(
        404,
        "model_not_found",
        f"The model '{asked.model}' does not exist or you do not have access to it.",
    )


def _forbidden(message: str, caller: Caller) -> Deny:
    return Deny(403, "permission_denied", message, caller)


def _unknown_endpoint(asked: Asked, caller: Caller, *, served: bool) -> Deny:
    if served and knows_path(asked.path):
        return Deny(405, "method_not_allowed", f"{asked.method} is not allowed here.", caller)
    return Deny(404, "unknown_endpoint", "This gateway offers no such endpoint.", caller)


def _within(address: str, networks: tuple[str, ...]) -> bool:
    try:
        at = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(at, "ipv4_mapped", None)
    return any((mapped or at) in _network(network) for network in networks)


@lru_cache(maxsize=4096)
def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text, strict=False)
