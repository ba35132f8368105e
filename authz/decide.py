"""May this request go on? (pure)"""

import ipaddress
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from authz import jws
from authz.watched import watch_word
from parallama import identity, mappings
from parallama.db.accounts import Credential, TokenRecord
from parallama.dialects import OLLAMA
from parallama.endpoints import (
    ADMIN,
    ADMIN_API,
    DISCOVERY,
    DISCOVERY_PAGE,
    Action,
    Endpoint,
    find_endpoint,
    knows_path,
    model_allowed,
)
from parallama.roles import GATEWAYS, permits, within


@dataclass(frozen=True, slots=True)
class Signature:
    """A header `authorization` of the form in which the `ollama` command signs requests."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Asked:
    """The first question: who is this? `path` is the upstream's own, without its query."""

    method: str
    path: str
    query: str
    gateway: str
    dialect: str
    address: str
    credentials: tuple[str | Signature, ...]
    """Every credential that was sent, by whatever header; a header of another form is ''."""
    request_id: str = ""
    """The same where Envoy asks again, another for every other request."""
    told_id: str = ""
    """`x-request-id`, which a refusal may name."""


@dataclass(frozen=True, slots=True)
class ModelAsked:
    """The second question: may the key's owner use this model, or the name that means it?"""

    dialect: str
    models: tuple[str, ...]
    model: str | None
    told_id: str = ""
    requested: str | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who it is: what the services after us, and the usage row, need to know."""

    user: str
    username: str
    key: str
    """Empty where it is none: a token."""
    role: str
    gateway: str
    dialect: str
    endpoint: str
    known_at: float = 0.0
    """When the database was asked about the credential; seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Allow:
    """
    `models`: all that the key may use, or None where it may use every one. `signed`: the request
    carries a signature, whose time stamp is no concern of the upstream. `headers` tell the admin
    API who calls.
    """

    caller: Caller
    endpoint: Endpoint
    models: tuple[str, ...] | None
    signed: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    watch: str = field(default="", compare=False)
    """
    What is asked as long as the answer runs: see `authz.watched`. Not compared, for of two tokens
    of one user it is all that differs (`wire.render_allow`).
    """


@dataclass(frozen=True, slots=True)
class Deny:
    """
    `caller` is known where the key was good, so that the refusal becomes a usage row; `rule` is
    what stood in the way then, in a word.
    """

    status: int
    code: str
    message: str
    caller: Caller | None = None
    rule: str = ""


HOW_TO = "send your key as 'Authorization: Bearer plm_...'"
UNKNOWN_KEY = Deny(401, "invalid_api_key", f"Unknown API key: {HOW_TO}.")

# One answer for whatever is wrong with a token: who guesses learns nothing.
INVALID_TOKEN = Deny(
    401, "invalid_token", "This access token is not accepted, or not any more: get a new one."
)
STRANGER = Deny(
    403, "unknown_user", "You are not a user of this gateway: ask your administrator to add you."
)

_MISSING = Deny(401, "invalid_api_key", f"Missing API key: {HOW_TO}.")
_CONFLICT = Deny(
    401, "invalid_api_key", "Two different API keys were sent: send one, in one header."
)
_IN_QUERY = Deny(
    401,
    "invalid_api_key",
    f"An API key does not belong in the address, where it gets logged: {HOW_TO}; revoke this one.",
)
_TOKEN_IN_QUERY = Deny(
    401,
    "invalid_token",
    "An access token does not belong in the address, where it gets logged: send it as "
    "'Authorization: Bearer ...', and log out to revoke this one.",
)
_REVOKED = Deny(401, "invalid_api_key", "This API key was revoked: ask your administrator for one.")
_EXPIRED = Deny(401, "invalid_api_key", "This API key has expired: ask your administrator for one.")


def credential(asked: Asked) -> str | Signature | Deny:
    """The one credential that was sent."""
    if "plm_" in asked.query or "plm_" in asked.path:
        return _IN_QUERY
    if jws.holds_one(asked.query):
        return _TOKEN_IN_QUERY
    distinct = set(asked.credentials)
    if not distinct:
        return _MISSING
    if len(distinct) > 1:
        return _CONFLICT
    return distinct.pop()


def identify(
    asked: Asked, key: Credential, *, gateways: Container[str], now: float
) -> Allow | Deny:
    """
    Judge a key or token whose secret or signature was verified.

    `gateways` are those that are served; what is asked of others does not exist.
    """
    is_token = key.kind == "token"
    if key.revoked:
        return _REVOKED
    if key.expires_at is not None and key.expires_at <= now:
        return INVALID_TOKEN if is_token else _EXPIRED
    account = key.account
    served = asked.gateway in gateways
    endpoint = _endpoint(asked) if served else None
    caller = Caller(
        user=account.id,
        username=account.username,
        key="" if is_token else key.id,
        role=account.role,
        gateway=asked.gateway,
        dialect=asked.dialect,
        endpoint=endpoint.path if endpoint else "unknown",
        known_at=account.read_at,
    )
    if account.disabled:
        return _forbidden("This user is disabled: ask your administrator.", caller, "disabled")
    if key.networks is not None and not _within(asked.address, key.networks):
        return _forbidden(
            "This API key may not be used from your network address.", caller, "network"
        )
    if key.gateways is not None and asked.gateway not in (*key.gateways, DISCOVERY):
        return _forbidden("This API key may not be used for this gateway.", caller, "gateway")
    if endpoint is None:
        return _unknown_endpoint(asked, caller, served=served)
    if endpoint is ADMIN_API:
        return Allow(caller, endpoint, None, headers=_told(key))
    if endpoint is DISCOVERY_PAGE:
        seen = [each for each in GATEWAYS if _may_see(key, each)]
        return Allow(caller, endpoint, None, headers=_view(key, asked, seen))
    needed = ("models", endpoint.action, asked.gateway)
    if not permits(account.permissions, *needed):
        return _forbidden(
            f"The role {account.role} may not do this (models:{endpoint.action}).", caller, "role"
        )
    if key.scopes is not None and not permits(key.scopes, *needed):
        what = "access token" if is_token else "API key"
        return _forbidden(
            f"This {what} is not for this (models:{endpoint.action}).", caller, "scope"
        )
    if key.models is not None and endpoint.action is Action.MANAGE:
        return _forbidden(
            "An API key restricted to some models may not manage models.", caller, "models"
        )
    # What answers at once need not be watched.
    watch = "" if endpoint.action is Action.READ else watch_word(key, asked.dialect)
    headers = _view(key, asked, [asked.gateway]) if endpoint.catalogued else ()
    return Allow(caller, endpoint, key.models, headers=headers, watch=watch)


def _endpoint(asked: Asked) -> Endpoint | None:
    if asked.gateway == ADMIN:
        return ADMIN_API
    if asked.gateway == DISCOVERY:
        return DISCOVERY_PAGE
    return find_endpoint(asked.method, asked.path)


def _may_see(key: Credential, gateway: str) -> bool:
    """Whether this is a gateway whose models the caller may read of."""
    needed = ("models", Action.READ, gateway)
    return (
        (key.gateways is None or gateway in key.gateways)
        and permits(key.account.permissions, *needed)
        and (key.scopes is None or permits(key.scopes, *needed))
    )


def _view(key: Credential, asked: Asked, gateways: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """What may be shown to the caller, for the service that does so."""
    told = identity.viewer_headers(
        endpoint=asked.path, gateways=gateways, dialect=asked.dialect, models=key.models
    )
    return tuple(told.items())


def _told(key: Credential) -> tuple[tuple[str, str], ...]:
    account = key.account
    permitted = account.permissions
    if key.scopes is not None:
        permitted = within(permitted, key.scopes)
    told = identity.headers(
        user=account.id,
        username=account.username,
        permissions=permitted,
        kind=_kind(key),
        id=key.id,
    )
    return tuple(told.items())


def _kind(key: Credential) -> str:
    if isinstance(key, TokenRecord):
        return identity.OUTSIDE if key.outside else identity.TOKEN
    return identity.KEY


def judge_model(asked: ModelAsked) -> Deny | None:
    """None where the model may be used. A hidden model and an unknown one look alike."""
    if asked.model is None:
        return Deny(400, "model_required", "The request names no model: set 'model'.", rule="model")
    if model_allowed(asked.models, asked.model):
        return None
    if asked.requested is not None and _may_say(asked.models, asked.requested):
        return None
    named = asked.requested or asked.model
    message = f"The model '{named}' does not exist or you do not have access to it."
    if asked.dialect == OLLAMA:
        message = f'model "{named}" not found, try pulling it first'
    return Deny(404, "model_not_found", message, rule="model")


def _may_say(models: tuple[str, ...], name: str) -> bool:
    """Names that are mapped are ours: all spellings that find the mapping are the same one."""
    return model_allowed(tuple(map(mappings.plain, models)), mappings.plain(name))


def _forbidden(message: str, caller: Caller, rule: str) -> Deny:
    return Deny(403, "permission_denied", message, caller, rule)


def _unknown_endpoint(asked: Asked, caller: Caller, *, served: bool) -> Deny:
    if served and knows_path(asked.path):
        message = f"{asked.method} is not allowed here."
        return Deny(405, "method_not_allowed", message, caller, "method")
    return Deny(404, "unknown_endpoint", "This gateway offers no such endpoint.", caller, "path")


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
