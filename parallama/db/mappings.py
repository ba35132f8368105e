"""Model mappings, as services read them."""

from collections.abc import Mapping

from parallama.db.store import Store

_MAPPINGS = """
SELECT gateway_type, external_model, internal_model FROM model_mappings
ORDER BY gateway_type, external_model
"""


async def mappings_of(store: Store) -> Mapping[str, dict[str, str]]:
    """By gateway: what the names mean that are mapped there. Raises Unavailable."""
    found: dict[str, dict[str, str]] = {}
    for gateway, name, target in await store.read(_MAPPINGS):
        found.setdefault(gateway, {})[name] = target
    return found
