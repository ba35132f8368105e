"""What the trail, the rows and what was kept aside say of each other, and how that is mended."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

from parallama import trail as reading
from parallama.db.ledger import Added
from parallama.trail import Letter, Trail, Unreadable
from parallama.usage import UsageRecord

# What ended so recently may still be on its way into the database.
_UNDER_WAY = timedelta(seconds=10)
_ROWS_AT_ONCE = 500


@dataclass
class Found:
    """Counts. What `differs` adds up is left to be mended."""

    lines: int = 0
    """Of the trail that are requests of known users."""
    under_way: int = 0
    """Of those: ended a moment ago, without a row yet."""
    without_row: int = 0
    """Of those: without a row, or with one that is marked unknown."""
    unreadable: int = 0
    """Of the trail that are no lines, and not kept aside yet."""
    kept_aside: int = 0
    """Lines and rows that could not be stored, and still have no row."""
    rows_unknown: int = 0
    """Rows of requests whose end nobody told."""
    mended: int = 0
    """Rows that `repair` stored."""
    late_reservations: int | None = None
    """Open beyond their lease; None where nobody can be asked."""

    @property
    def differs(self) -> int:
        open_ = self.late_reservations or 0
        return self.without_row + self.unreadable + self.kept_aside + open_


class Reconciliation:
    """
    `known` tells which of some requests have a row that is not marked unknown, and `add` stores
    rows. What is older than `oldest` may have been removed on purpose. Safe beside a running
    usage_sink: rows are unique by their request.
    """

    def __init__(
        self,
        trail: Trail,
        known: Callable[[Sequence[str]], Awaitable[set[str]]],
        add: Callable[[Sequence[UsageRecord]], Awaitable[Added]],
        *,
        now: datetime,
        oldest: datetime | None = None,
        repair: bool = False,
    ) -> None:
        self._trail = trail
        self._known = known
        self._add = add
        self._now = now
        self._oldest = oldest
        self._repair = repair

    async def run(self) -> Found:
        found = Found()
        aside = {_text_of(text) for text in self._trail.letters()}
        for lines, name in self._blocks():
            finished, letters = reading.understood(lines, name)
            found.unreadable += sum(at.line not in aside for at in letters)
            records = [at.record for at in finished if self._is_kept(at.record)]
            found.lines += len(records)
            for begin in range(0, len(records), _ROWS_AT_ONCE):
                await self._compare(records[begin : begin + _ROWS_AT_ONCE], found)
        await self._letters(found)
        return found

    def _blocks(self) -> Iterator[tuple[list[reading.Line], str]]:
        for path in self._trail.files():
            with suppress(FileNotFoundError), path.open("rb") as file:
                _, size = reading.look(file)
                at, end = -1, 0
                while at != end:
                    at = end
                    lines, end = reading.read(file, at, size)
                    yield lines, path.name

    def _is_kept(self, record: UsageRecord) -> bool:
        return self._oldest is None or record.timestamp >= self._oldest

    async def _compare(self, records: Sequence[UsageRecord], found: Found) -> None:
        there = await self._known([record.request_id for record in records])
        absent = [record for record in records if record.request_id not in there]
        late = [record for record in absent if self._is_over(record)]
        found.under_way += len(absent) - len(late)
        if late and self._repair:
            added = await self._add(late)
            found.mended += added.stored
            late = [record for record, _ in added.refused]
        found.without_row += len(late)

    def _is_over(self, record: UsageRecord) -> bool:
        ended = record.timestamp + timedelta(seconds=record.request_duration)
        return abs(self._now - ended) > _UNDER_WAY  # a clock that was set back hides nothing

    async def _letters(self, found: Found) -> None:
        texts = self._trail.take_letters() if self._repair else self._trail.letters()
        unsettled = await self._unsettled([_opened(text) for text in texts])
        found.kept_aside = len(unsettled)
        if not self._repair:
            return
        left = []
        for letter, record in unsettled:
            if record is None:
                left.append(letter)
                continue
            added = await self._add([record])
            found.mended += added.stored
            left += [Letter(reason, row=row) for row, reason in added.refused]
        self._trail.drop_letters(left)
        found.kept_aside = len(left)

    async def _unsettled(
        self, letters: Sequence[tuple[Letter, UsageRecord | None]]
    ) -> list[tuple[Letter, UsageRecord | None]]:
        """Those without a row; of several about one request, one."""
        by_id: dict[str | bytes | None, tuple[Letter, UsageRecord | None]] = {}
        for letter, record in letters:
            by_id[letter.line if record is None else record.request_id] = letter, record
        ids = [record.request_id for _, record in by_id.values() if record is not None]
        there: set[str] = set()
        for begin in range(0, len(ids), _ROWS_AT_ONCE):
            there |= await self._known(ids[begin : begin + _ROWS_AT_ONCE])
        return [at for id, at in by_id.items() if id not in there]


def _opened(text: bytes) -> tuple[Letter, UsageRecord | None]:
    """A letter, and its row if one can be had from it by now."""
    try:
        letter = Letter.load(text)
    except ValueError:
        return Letter("not a letter", line=text), None
    if letter.row is not None or letter.line is None:
        return letter, letter.row
    try:
        finished = reading.parse(letter.line)
    except Unreadable:
        return letter, None
    return letter, None if finished is None else finished.record


def _text_of(text: bytes) -> bytes | None:
    return _opened(text)[0].line
