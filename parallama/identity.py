"""
What authz tells the admin service of a caller: headers that Envoy sets, whatever a client sends.

Envoy adds ADDRESS itself, also where nobody has to say who they are. A test holds envoy.yaml to
these names.
"""

from urllib.parse import quote, unquote

from parallama.roles import Permissions

PREFIX = "x-parallama-"
USER = "x-parallama-user"  # users.id
USERNAME = "x-parallama-username"  # percent-encoded
PERMISSIONS = "x-parallama-permissions"  # what account and credential both permit, spaces between
CREDENTIAL = "x-parallama-credential"  # kind and id: `key:<api_keys.id>`, `token:<jti>`
ADDRESS = "x-parallama-address"  # the client's


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
