"""Which requests have a row. What `usage reconcile` asks."""

from collections.abc import Sequence

from parallama.db.store import Store

_KNOWN = """
SELECT request_id FROM gateway_usage_logs
WHERE request_id IN ({}) AND token_source <> 'unknown'
"""
_UNKNOWN = "SELECT count(*) FROM gateway_usage_logs WHERE token_source = 'unknown'"


async def known(store: Store, ids: Sequence[str]) -> set[str]:
    """Those of a few hundred ids with a row that tells how the request ended."""
    if not ids:
        return set()
    query = _KNOWN.format(", ".join("?" * len(ids)))
    return {str(id) for (id,) in await store.read(query, tuple(ids))}


async def count_unknown(store: Store) -> int:
    """Rows of requests whose end nobody told."""
    return int((await store.read(_UNKNOWN))[0][0])
