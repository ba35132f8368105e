"""Which of these keys and users are still good? What authz asks about answers that run."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from parallama.db.store import Store

_KEYS = """
SELECT k.id FROM api_keys AS k JOIN users AS u ON u.id = k.user_id
WHERE k.revoked_at IS NULL AND u.disabled_at IS NULL AND k.id IN ({})
"""

_USERS = "SELECT id, tokens_valid_from FROM users WHERE disabled_at IS NULL AND id IN ({})"

_TOKENS = "SELECT jti, issuer FROM revoked_tokens WHERE user_id IS NULL OR user_id IN ({})"

_AT_ONCE = 500  # ids in one query
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


async def standing_keys(store: Store, ids: Collection[str]) -> set[str]:
    """Those that are not revoked, of users who are not disabled. Raises Unavailable."""
    return {str(id) for some in _portions(ids) for (id,) in await _read(store, _KEYS, some)}


async def standing_users(store: Store, ids: Collection[str]) -> dict[str, float]:
    """Those who are not disabled, and from when on their tokens count. Raises Unavailable."""
    return {
        str(id): 0.0 if valid_from is None else valid_from.timestamp()
        for some in _portions(ids)
        for id, valid_from in await _read(store, _USERS, some)
    }


async def revoked_tokens(store: Store, users: Collection[str]) -> set[tuple[str, str]]:
    """By `jti` and issuer: of these users, and of nobody known. Raises Unavailable."""
    return {
        (str(jti), str(issuer))
        for some in _portions(users)
        for jti, issuer in await _read(store, _TOKENS, some)
    }


def _portions(ids: Collection[str]) -> Iterator[list[str]]:
    # What is no id PostgreSQL answers with nothing at all, also for those beside it.
    every = sorted(filter(_ID.fullmatch, ids))
    return (every[start : start + _AT_ONCE] for start in range(0, len(every), _AT_ONCE))


async def _read(store: Store, query: str, ids: list[str]) -> list[tuple[Any, ...]]:
    return await store.read(query.format(", ".join("?" * len(ids))), ids)
