"""Who is it, and what may they do? What authz asks."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import uuid4

from parallama.clock import system_clock
from parallama.db.store import Refused, Store, Values
from parallama.roles import BUILT_IN, Permissions, Role, permissions

# What stood in a key before its last rotation is found, too.
_FIND_KEY = """
SELECT k.user_id, k.id, k.kind, k.name, k.public_id, k.key_hash, k.previous_key_hash,
       k.previous_expires_at, k.revoked_at, k.expires_at, k.models, k.networks, k.gateways, k.scopes
FROM api_keys AS k WHERE k.public_id = ? OR k.previous_public_id = ?
"""

_FIND_USER = """
SELECT id, username, role, disabled_at, tokens_valid_from FROM users WHERE id = ?
"""

_ROLES_OF = """
SELECT named.role, r.permissions
FROM (
    SELECT role FROM users WHERE id = ? UNION SELECT role FROM user_roles WHERE user_id = ?
) AS named
LEFT JOIN roles AS r ON r.name = named.role
"""

# Few: they are removed once they have expired. Some were revoked before their user was known.
_REVOKED_OF = """
SELECT jti FROM revoked_tokens WHERE (user_id = ? OR user_id IS NULL) AND issuer = ?
"""

_FIND_IDENTITY = "SELECT user_id FROM identities WHERE issuer = ? AND subject = ?"

_ADD_USER = """
INSERT INTO users (id, username, role, is_admin, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?)
"""

_ADD_ROLE = "INSERT INTO user_roles (user_id, role) VALUES (?, ?)"

_ADD_IDENTITY = """
INSERT INTO identities (id, user_id, issuer, subject, created_at) VALUES (?, ?, ?, ?, ?)
"""

_ADD_RECORD = """
INSERT INTO audit_log (at, actor, via, action, subject_id, subject, "after")
VALUES (?, ?, ?, ?, ?, ?, ?)
"""


@dataclass(frozen=True, slots=True)
class Account:
    """A user. `role` is the one whose default limits count."""

    id: str
    username: str
    role: str
    permissions: Permissions
    disabled: bool = False
    tokens_valid_from: float | None = None
    """Seconds since the epoch, and so is `read_at`, when the database said this."""
    read_at: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """
    All that decides about a request that carries it.

    `id` is a key's, or that of a token. `kind` is `secret` or `ssh` for a key, or `token`. None
    allows all: every model, network and gateway; of `scopes` all that the user may.
    """

    id: str
    kind: str = "secret"
    account: Account
    revoked: bool = False
    expires_at: float | None = None
    """Seconds since the epoch."""
    models: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None
    gateways: tuple[str, ...] | None = None
    scopes: Permissions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord(Credential):
    """
    `secret_hash` belongs to the secret behind `public_id`. For the one before the last rotation
    that is the old one's, and `expires_at` is when its time is over.
    """

    public_id: str
    name: str | None = None
    secret_hash: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord(Credential):
    """A token whose signature was verified. `id` is its `jti`."""

    kind: str = "token"
    issuer: str
    issued_at: float = 0.0
    outside: bool = False
    """Whether another issuer than we signed it: then its session is not ours to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """
    Whose tokens of one issuer they are. `revoked` are those that are refused, by `jti`. `scopes`
    bound what they permit; None: all that the user may.
    """

    account: Account
    revoked: frozenset[str] = frozenset()
    scopes: Permissions | None = None


async def find_key(
    store: Store, public_id: str, *, roles: Mapping[str, Permissions] = BUILT_IN
) -> KeyRecord | None:
    """The key with its user, also where it is revoked, expired or disabled."""
    rows = await store.read(_FIND_KEY, (public_id, public_id))
    if not rows:
        return None
    user_id, *about = rows[0]
    account = await find_account(store, user_id, roles=roles)
    return None if account is None else _record(public_id, account, *about)


async def find_account(
    store: Store, user_id: str, *, roles: Mapping[str, Permissions] = BUILT_IN
) -> Account | None:
    """A user by id, with what all of the roles grant; a role that is gone grants nothing."""
    read_at = system_clock()
    rows = await store.read(_FIND_USER, (user_id,))
    if not rows:
        return None
    id, username, role, disabled_at, tokens_valid_from = rows[0]
    named = await store.read(_ROLES_OF, (user_id, user_id))
    if not named:  # everybody has a role: the user was deleted since
        return None
    return Account(
        id=id,
        username=username,
        role=role,
        permissions=_granted(((str(name), given) for name, given in named), roles),
        disabled=disabled_at is not None,
        tokens_valid_from=None if tokens_valid_from is None else tokens_valid_from.timestamp(),
        read_at=read_at,
    )


async def find_holder(
    store: Store, user_id: str, issuer: str, *, roles: Mapping[str, Permissions] = BUILT_IN
) -> Holder | None:
    account = await find_account(store, user_id, roles=roles)
    if account is None:
        return None
    revoked = await store.read(_REVOKED_OF, (account.id, issuer))
    return Holder(account=account, revoked=frozenset(str(jti) for (jti,) in revoked))


async def find_identity(store: Store, issuer: str, subject: str) -> str | None:
    """The id of the user that another issuer knows as `subject`."""
    rows = await store.read(_FIND_IDENTITY, (issuer, subject))
    return str(rows[0][0]) if rows else None


async def add_identity(
    store: Store, issuer: str, subject: str, username: str, given: Sequence[str], now: datetime
) -> bool:
    """
    Make a user with an identity, and note it. `given` are the roles, the main one first.

    False where there is such a user or such an identity by now: somebody else may have been faster.
    """
    id, role = str(uuid4()), given[0]
    after = {"username": username, "roles": list(given), "issuer": issuer, "subject": subject}
    record = (now, issuer, "gateway", "users.create", id, username, json.dumps(after))
    work: list[tuple[str, Sequence[Values]]] = [
        (_ADD_USER, [(id, username, role, role == Role.ADMIN, now, now)]),
        (_ADD_IDENTITY, [(str(uuid4()), id, issuer, subject, now)]),
        (_ADD_RECORD, [record]),
    ]
    more = [(id, each) for each in dict.fromkeys(given) if each != role]
    if more:
        work.append((_ADD_ROLE, more))
    try:
        await store.write(*work)
    except Refused:
        return False
    return True


async def granted_by(
    store: Store, named: Iterable[str], *, roles: Mapping[str, Permissions] = BUILT_IN
) -> Permissions:
    """What roles grant together; one that is gone grants nothing."""
    wanted = list(dict.fromkeys(named))
    asked = [name for name in wanted if name not in roles]
    rows: list[tuple[str, list[str] | None]] = [(name, None) for name in wanted]
    for name in asked:
        found = await store.read("SELECT permissions FROM roles WHERE name = ?", (name,))
        rows += [(name, given) for (given,) in found]
    return _granted(rows, roles)


def _record(
    public_id: str,
    account: Account,
    id: str,
    kind: str,
    name: str | None,
    current: str,
    key_hash: str,
    previous_hash: str,
    previous_expires_at: datetime | None,
    revoked_at: datetime | None,
    expires_at: datetime | None,
    models: list[str] | None,
    networks: list[str] | None,
    gateways: list[str] | None,
    scopes: list[str] | None,
) -> KeyRecord:
    """The columns of _FIND_KEY, in its order."""
    rotated = public_id != current
    ends = [expires_at, previous_expires_at] if rotated else [expires_at]
    return KeyRecord(
        id=id,
        public_id=public_id,
        kind=kind,
        secret_hash=previous_hash if rotated else key_hash,
        name=name,
        account=account,
        revoked=revoked_at is not None,
        expires_at=min((end.timestamp() for end in ends if end is not None), default=None),
        models=_tuple(models),
        networks=_tuple(networks),
        gateways=_tuple(gateways),
        scopes=None if scopes is None else permissions(scopes),
    )


async def name_of(store: Store, user_id: str) -> str | None:
    """A user's name by id; None where the user is gone."""
    rows = await store.read("SELECT username FROM users WHERE id = ?", (user_id,))
    return str(rows[0][0]) if rows else None


def _granted(
    named: Iterable[tuple[str, list[str] | None]], known: Mapping[str, Permissions]
) -> Permissions:
    return frozenset().union(
        *(known.get(name) or permissions(given or ()) for name, given in named)
    )


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)
