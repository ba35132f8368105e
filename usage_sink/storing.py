"""Batches into the database: priced, tried again while it is away, what it refuses kept aside."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from parallama.db.ledger import Added
from parallama.errors import ParallamaError
from parallama.trail import Letter
from parallama.usage import UsageRecord

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.1
_LONGEST_RETRY_SECONDS = 2.0

Records = Sequence[UsageRecord]


async def _as_they_are(records: Records) -> Records:
    return records


def _nobody(records: Records) -> None:
    pass


class Storing:
    """
    What both ways that lead to the database have in common: one batch after the other.

    `set_aside` keeps letters on disk, or raises OSError. `price` gives records their cost. `stored`
    is told what the database has; it returns at once, and what goes wrong there is no concern here.
    Where some had been there before, perhaps with other numbers, `as_stored` looks these up.
    """

    def __init__(
        self,
        add: Callable[[Records], Awaitable[Added]],
        set_aside: Callable[[Iterable[Letter]], None],
        *,
        price: Callable[[Records], Awaitable[Records]] = _as_they_are,
        as_stored: Callable[[Records], Awaitable[Records]] = _as_they_are,
        stored: Callable[[Records], None] = _nobody,
    ) -> None:
        self._add = add
        self._set_aside = set_aside
        self._price = price
        self._as_stored = as_stored
        self._stored = stored
        self._turn = asyncio.Lock()
        self._away: str | None = None  # what was last said about it

    async def store(self, records: Records) -> tuple[int, set[str]]:
        """
        Returns when all are stored or kept aside: how many rows are new, and the ids of those that
        are nowhere, because the database refused them and the disk as well.
        """
        async with self._turn:
            priced, added = await self._patiently(records)
        refused = {record.request_id for record, _ in added.refused}
        there = [record for record in priced if record.request_id not in refused]
        if added.stored < len(there):
            there = await self._looked_up(there)
        self._tell(there)
        return added.stored, self._keep(added.refused)

    def well(self) -> bool:
        """Whether the database took the last rows."""
        return self._away is None

    async def _patiently(self, records: Records) -> tuple[Records, Added]:
        """The records with their cost, and what became of them."""
        pause = _FIRST_RETRY_SECONDS
        while True:
            try:
                priced = await self._price(records)
                added = await self._add(priced)
            except ParallamaError as error:
                self._is_away(len(records), str(error))
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_RETRY_SECONDS)
            except Exception as error:
                # Not the store's state but the rows, or a mistake of ours: trying again is no help,
                # and all others still wait.
                log.exception("rows cannot be stored", extra={"rows": len(records)})
                why = f"a mistake in Parallama: {type(error).__name__}"
                return records, Added(0, tuple((record, why) for record in records))
            else:
                self._is_back()
                return priced, added

    def _is_away(self, rows: int, cause: str) -> None:
        """Said once, and again where it is for another reason."""
        if cause != self._away:
            log.warning("rows not stored yet", extra={"rows": rows, "cause": cause})
        self._away = cause

    def _is_back(self) -> None:
        if self._away is not None:
            log.info("rows are stored again")
        self._away = None

    def _keep(self, refused: Sequence[tuple[UsageRecord, str]]) -> set[str]:
        if not refused:
            return set()
        ids = {record.request_id for record, _ in refused}
        facts = {"rows": len(refused), "reason": refused[0][1], "request_id": min(ids)}
        try:
            self._set_aside(Letter(reason, row=record) for record, reason in refused)
        except OSError as error:
            log.error(
                "rows refused by the database, and not kept aside",
                extra={**facts, "cause": error.strerror},
            )
            return ids
        log.error("rows refused by the database, and kept aside", extra=facts)
        return set()

    async def _looked_up(self, records: Sequence[UsageRecord]) -> list[UsageRecord]:
        try:
            return list(await self._as_stored(records))
        except ParallamaError as error:
            log.warning("stored rows not looked up", extra={"cause": str(error)})
            return list(records)

    def _tell(self, records: Records) -> None:
        try:
            self._stored(records)
        except Exception:
            log.exception("rows are stored, and somebody could not be told")
