"""
Permissions are `resource:action`, or `resource:action:scope` for a part of it; roles are sets of
them (pure).

The scope of a permission for models is a gateway. Every other scope is `own`: what belongs to the
user who asks.
"""

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType

from parallama.errors import UsageError

RESOURCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "models": ("read", "infer", "manage"),
        "users": ("read", "create", "update", "delete"),
        "keys": ("read", "create", "update", "rotate", "revoke"),
        "tokens": ("revoke",),
        "roles": ("read", "write"),
        "limits": ("read", "write"),
        "prices": ("read", "write"),
        "mappings": ("read", "write"),
        "usage": ("read",),
        "audit": ("read",),
    }
)
"""All there is to be permitted."""

OWN = "own"
EVERY = "*"
GATEWAYS = ("ollama", "openai")

_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,49}")

Permissions = frozenset[str]
"""In full: without `*`."""


class Role(StrEnum):
    """The roles that are always there."""

    ADMIN = "admin"
    OPERATOR = "operator"
    USER = "user"
    READONLY = "readonly"


def check_name(name: str) -> str:
    """Of a role. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            "a role is named by up to 50 of a-z, 0-9, '_', '.' and '-', and begins with a letter: "
            f"{name!r}"
        )
    return name


def permissions(given: Iterable[str]) -> Permissions:
    """
    What is meant by permissions as people write them, where `*` stands for every resource or
    action. Raises UsageError for one that there is not.
    """
    return frozenset(each for text in given for each in _expanded(text))


def permits(granted: Permissions, resource: str, action: str, scope: str | None = None) -> bool:
    """Whether this is granted, in this scope or without one."""
    needed = f"{resource}:{action}"
    return needed in granted or (scope is not None and f"{needed}:{scope}" in granted)


def covers(granted: Permissions, wanted: Permissions) -> bool:
    """Whether nothing is wanted beyond what is granted: nobody gives away what they have not."""
    return all(permits(granted, *_parts(each)) for each in wanted)


def within(granted: Permissions, bounds: Permissions) -> Permissions:
    """What is granted by both."""
    return frozenset(
        [each for each in granted if permits(bounds, *_parts(each))]
        + [each for each in bounds if permits(granted, *_parts(each))]
    )


@lru_cache(maxsize=1024)
def _expanded(text: str) -> tuple[str, ...]:
    resource, _, rest = text.partition(":")
    action, _, scope = rest.partition(":")
    found = [
        f"{known}:{can}" + (f":{scope}" if scope else "")
        for known, actions in RESOURCES.items()
        for can in actions
        if resource in (known, EVERY) and action in (can, EVERY)
    ]
    if not found:
        raise UsageError(f"there is no permission {text!r}: {_known(resource)}")
    if scope or rest.endswith(":"):
        allowed = {EVERY: ("",), "models": GATEWAYS}.get(resource, (OWN,))
        if scope not in allowed:
            raise UsageError(
                f"there is no permission {text!r}: the scope of {resource} is "
                + (" or ".join(allowed) or "none")
            )
    return tuple(found)


def _known(resource: str) -> str:
    if resource in RESOURCES:
        return f"{resource} has {', '.join(RESOURCES[resource])}"
    return f"it is resource:action[:scope], and the resources are {', '.join(RESOURCES)}"


@lru_cache(maxsize=1024)
def _parts(permission: str) -> tuple[str, str, str | None]:
    resource, action, *scope = permission.split(":")
    return resource, action, scope[0] if scope else None


_OWN = (
    *("users:read:own", "keys:read:own", "usage:read:own", "limits:read:own"),
    "tokens:revoke:own",
)
_USER = (*_OWN, "keys:rotate:own", "keys:revoke:own", "models:read", "models:infer")
_OPERATOR = (
    *_USER,
    *("models:*", "mappings:*", "prices:read", "limits:read", "usage:read"),
    *("users:read", "keys:read", "roles:read"),
)

BUILT_IN: Mapping[str, Permissions] = MappingProxyType(
    {
        Role.ADMIN: permissions(["*:*"]),
        Role.OPERATOR: permissions(_OPERATOR),
        Role.USER: permissions(_USER),
        Role.READONLY: permissions((*_OWN, "models:read")),
    }
)
