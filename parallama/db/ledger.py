"""A row for each request, written once. What usage_sink does."""

import math
import os
import time
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from parallama.db.store import Store, to_sqlite
from parallama.usage import UsageRecord

_FIELDS = tuple(UsageRecord.__slots__)
COLUMNS = tuple("gateway_type" if field == "gateway" else field for field in _FIELDS)
"""The columns of gateway_usage_logs that hold a record, in the order of its fields."""

_values_of = attrgetter(*_FIELDS)
_TIMESTAMP, _KEY = _FIELDS.index("timestamp"), _FIELDS.index("key_id")
_LARGEST = 2**63 - 1
_VARIANT = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))

_ADD = f"""
INSERT INTO gateway_usage_logs (id, {", ".join(COLUMNS)})
VALUES (?{", ?" * len(COLUMNS)})
ON CONFLICT (request_id) DO NOTHING
"""  # noqa: S608 - our own column names
_USED = """
UPDATE api_keys SET last_used_at = ?
WHERE id = ? AND (last_used_at IS NULL OR last_used_at < ?)
"""


async def add(store: Store, records: Sequence[UsageRecord]) -> int:
    """
    Store what is not stored yet, all or nothing, and return how many rows that were.

    One unstorable value must not hold back its batch for ever, so it is made storable: a number
    too large becomes the largest, text that is not Unicode gets replacement characters.
    """
    if not records:
        return 0
    rows = [list(_values_of(record)) for record in records]
    try:
        return await _add(store, rows)
    except (OverflowError, UnicodeEncodeError):
        return await _add(store, [list(map(_storable, row)) for row in rows])


async def _add(store: Store, rows: list[list[Any]]) -> int:
    newest: dict[str, str] = {}
    stored = []
    for id, row in zip(_ids(len(rows)), rows, strict=True):
        at, key = to_sqlite(row[_TIMESTAMP]), row[_KEY]
        stored.append((id, *row[:_TIMESTAMP], at, *row[_TIMESTAMP + 1 :]))
        if key is not None and newest.get(key, "") < at:
            newest[key] = at
    used = [(at, key, at) for key, at in newest.items()]
    added, _ = await store.write((_ADD, stored), (_USED, used))
    return added


def _ids(count: int) -> list[str]:
    """
    UUIDs of version 7, which begin with the time: neighbours in time are neighbours in the index.

    Random ones made each row dirty a page of its own, and a batch cost a third more.
    """
    at = f"{time.time_ns() // 1_000_000:012x}"
    at = f"{at[:8]}-{at[8:]}"
    noise = os.urandom(10 * count).hex()
    return [
        f"{at}-7{n[:3]}-{_VARIANT[n[3]]}{n[4:7]}-{n[7:19]}"
        for n in (noise[i : i + 20] for i in range(0, 20 * count, 20))
    ]


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="replace").decode().replace("\0", "\ufffd")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return max(-_LARGEST, min(value, _LARGEST))
    return value
