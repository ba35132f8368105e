"""
What authz tells the admin service of a caller: headers that Envoy sets, whatever a client sends.

Envoy adds ADDRESS itself, also where nobody has to say who they are. A test holds envoy.yaml to
these names.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, unquote

from parallama.roles import Permissions

PREFIX = "x-parallama-"
USER = "x-parallama-user"  # users.id
USERNAME = "x-parallama-username"  # percent-encoded
PERMISSIONS = "x-parallama-permissions"  # what account and credential both permit, spaces between
CREDENTIAL = "x-parallama-credential"  # kind and id: `key:<api_keys.id>`, `token:<jti>`
KEY, TOKEN, OUTSIDE = "key", "token", "outside"  # the last one is another issuer's token
ADDRESS = "x-parallama-address"  # the client's

# Where what the model servers offer is asked for (parallama/admin/catalog).
ENDPOINT = "x-parallama-endpoint"  # the path, as it would be on the server itself
GATEWAYS = "x-parallama-gateways"  # whose models the caller may see, commas between
DIALECT = "x-parallama-dialect"
MODELS = "x-parallama-models"  # names and prefixes*, percent-encoded, commas between; `*` is all


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks at what the servers offer. Of a list there is one gateway."""

    endpoint: str
    gateways: tuple[str, ...]
    dialect: str
    models: tuple[str, ...]
    """All that may be seen, as patterns."""


def headers(
    *, user: str, username: str, permissions: Permissions, kind: str, id: str
) -> dict[str, str]:
    """What to set on a request that is let in."""
    return {
        USER: user,
        USERNAME: quote(username, safe=""),
        PERMISSIONS: " ".join(sorted(permissions)),
        CREDENTIAL: f"{kind}:{id}",
    }


def username(value: str) -> str:
    return unquote(value)


def viewer_headers(
    *, endpoint: str, gateways: Iterable[str], dialect: str, models: Iterable[str] | None
) -> dict[str, str]:
    """The same for one that asks what there is. `models` is None where all may be seen."""
    named = ("*",) if models is None else models
    return {
        ENDPOINT: endpoint,
        GATEWAYS: ",".join(gateways),
        DIALECT: dialect,
        MODELS: ",".join(quote(each, safe="*/:") for each in named),
    }


def viewer(told: dict[str, str]) -> Viewer | None:
    """None where authz said nothing of the kind, or not all of it."""
    if not told.keys() >= {ENDPOINT, GATEWAYS, DIALECT, MODELS}:
        return None
    return Viewer(
        endpoint=told[ENDPOINT],
        gateways=tuple(filter(None, told[GATEWAYS].split(","))),
        dialect=told[DIALECT],
        models=tuple(unquote(each) for each in told[MODELS].split(",") if each),
    )
