"""Tokens whose time is over: nothing has to be known of them any more."""

from datetime import datetime

from parallama.db.store import Store


async def remove_expired(store: Store, now: datetime) -> int:
    """Refresh tokens, and the list of revoked access tokens. Returns how many."""
    removed = await store.write(
        ("DELETE FROM refresh_tokens WHERE expires_at <= ?", [(now,)]),
        ("DELETE FROM revoked_tokens WHERE expires_at <= ?", [(now,)]),
    )
    return sum(removed)
