"""Usage rows in memory: what ratelimit asks of the ledger, answered from a dictionary."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

from parallama.db.ledger import Span, Spending, Used
from parallama.usage import Spent, UsageRecord
from tests.parallama.db_on_disk import a_record

PART = Decimal("0.000000001")
"""What one token costs here: one part of money."""


def a_row(id: str, at: float, used: int, compute: int, grants: str = "") -> UsageRecord:
    return a_record(
        id,
        timestamp=datetime.fromtimestamp(at, UTC),
        user_id="u1",
        gateway="openai",
        endpoint="/v1/chat/completions",
        model_name="smollm2",
        tokens_used=used,
        compute_ms=float(compute),
        cost=used * PART,
        grants=grants or None,
    )


class Books:
    """`meanwhile` is done once, after rows were read and before who asked has the answer."""

    def __init__(self) -> None:
        self.rows: dict[str, UsageRecord] = {}
        self.meanwhile: Callable[[], object] | None = None

    def store(self, row: UsageRecord) -> None:
        """A real row takes the place of a lost one, and no other's."""
        if self.rows.get(row.request_id, row).token_source in ("unknown", row.token_source):
            self.rows[row.request_id] = row

    async def spending(self, user: str, spans: Sequence[Span], recent: Span) -> Spending:
        rows = list(self.rows.values())
        found = Spending(
            tuple(
                tuple(_used(row) for row in rows if start <= row.timestamp < end)
                for start, end in spans
            ),
            tuple(row.request_id for row in rows if recent[0] <= row.timestamp < recent[1]),
        )
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return found

    async def add_lost(self, records: Sequence[UsageRecord]) -> int:
        new = [row for row in records if row.request_id not in self.rows]
        self.rows |= {row.request_id: row for row in new}
        return len(new)

    async def spent_by(self, ids: Sequence[str], since: datetime) -> dict[str, Spent]:
        found = [self.rows[id] for id in ids if id in self.rows]
        return {row.request_id: row.spent for row in found if row.token_source != "unknown"}

    async def name_of(self, user: str) -> str:
        return user

    def lost(self, id: str) -> None:
        """As if nobody had ever told how it ended."""
        self.rows[id] = replace(self.rows[id], token_source="unknown")


def _used(row: UsageRecord) -> Used:
    return Used(
        row.gateway,
        row.model_name,
        row.key_id,
        row.grants,
        1,
        row.tokens_used,
        row.compute_ms or 0.0,
        row.cost or Decimal(0),
    )
