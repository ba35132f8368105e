"""Which key is this? What authz asks."""

from dataclasses import dataclass, field
from datetime import datetime

from parallama.db.store import Store
from parallama.roles import Role

_FIND_KEY = """
SELECT k.id, k.public_id, k.key_hash, k.name, k.user_id, u.username, u.role,
       u.disabled_at, k.revoked_at, k.expires_at, k.models, k.networks
FROM api_keys AS k JOIN users AS u ON u.id = k.user_id
WHERE k.public_id = ?
"""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """All that decides about a request that carries this key."""

    id: str
    public_id: str
    secret_hash: str = field(repr=False)
    name: str | None
    user_id: str
    username: str
    role: Role
    user_disabled: bool
    revoked: bool
    expires_at: float | None
    """Seconds since the epoch."""
    models: tuple[str, ...] | None
    networks: tuple[str, ...] | None


async def find_key(store: Store, public_id: str) -> KeyRecord | None:
    """The key with its user, also where it is revoked, expired or disabled."""
    rows = await store.read(_FIND_KEY, (public_id,))
    return _record(*rows[0]) if rows else None


def _record(
    id: str,
    public_id: str,
    secret_hash: str,
    name: str | None,
    user_id: str,
    username: str,
    role: str,
    disabled_at: datetime | None,
    revoked_at: datetime | None,
    expires_at: datetime | None,
    models: list[str] | None,
    networks: list[str] | None,
) -> KeyRecord:
    """The columns of _FIND_KEY, in its order."""
    return KeyRecord(
        id=id,
        public_id=public_id,
        secret_hash=secret_hash,
        name=name,
        user_id=user_id,
        username=username,
        role=Role(role),
        user_disabled=disabled_at is not None,
        revoked=revoked_at is not None,
        expires_at=None if expires_at is None else expires_at.timestamp(),
        models=None if models is None else tuple(models),
        networks=None if networks is None else tuple(networks),
    )


async def name_of(store: Store, user_id: str) -> str | None:
    """A user's name by id; None where the user is gone."""
    rows = await store.read("SELECT username FROM users WHERE id = ?", (user_id,))
    return str(rows[0][0]) if rows else None
