"""Reads the trail a little behind Envoy, and stores what its stream did not bring."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from parallama import trail
from parallama.trail import Letter, Line, Trail
from parallama.usage import UsageRecord
from usage_sink.storing import Storing
from usage_sink.writer import Settled

log = logging.getLogger(__name__)

# A file that was renamed is not written any more: Envoy has opened the next one, and this long
# nothing came. What comes all the same is in Envoy's stream, too.
_LET_GO_SECONDS = 10.0


async def _nothing(_: Collection[str]) -> None:
    pass


class Follower:
    """
    Each line is read once Envoy's stream had time to bring the same row, so nearly all are known by
    then and cost next to nothing. It is done with when its row is stored or kept aside, and only
    then forgotten: an outage of the database stops it where it is, and the trail keeps the rest.

    `ahead` waits until none of some ids is about to be stored as Envoy's stream brought it: that
    may know more than the line does, such as tokens of text.
    """

    def __init__(
        self,
        trail: Trail,
        storing: Storing,
        settled: Settled,
        *,
        batch_rows: int,
        monotonic: Callable[[], float],
        ahead: Callable[[Collection[str]], Awaitable[None]] = _nothing,
    ) -> None:
        self._trail = trail
        self._storing = storing
        self._settled = settled
        self._batch_rows = batch_rows
        self._monotonic = monotonic
        self._ahead = ahead
        self._read = trail.load_read()
        self._seen: dict[str, int] = {}  # sizes when last looked at
        self._still: dict[Path, tuple[int, float]] = {}  # since when a file has that size
        self._quiet = False

    async def run(self, pause: Callable[[], Awaitable[None]]) -> None:
        """For ever: all that is there, then what comes, a pause later than it came."""
        self._read = self._trail.load_read()
        await self.catch_up()
        while True:
            await pause()
            await self.look()

    async def catch_up(self) -> None:
        """Read to the end, as far as that is now."""
        await self.look(everything=True)

    def missing(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids that no line has which is still to be read."""
        left = set(ids)
        with suppress(OSError):
            for path in self._trail.files():
                with path.open("rb") as file:
                    key, size = trail.look(file)
                    at = self._read.get(key, 0)
                    while left and at < size:
                        lines, end = trail.read(file, at, size)
                        left.difference_update(trail.request_id(line.text) or "" for line in lines)
                        if end == at:
                            break
                        at = end
        return left

    async def look(self, *, everything: bool = False) -> None:
        """Read what was there at the last look, or all of it."""
        seen = self._seen
        self._seen = {}
        try:
            for path in self._trail.files():
                with suppress(FileNotFoundError), path.open("rb") as file:
                    key, size = trail.look(file)
                    if key:
                        self._seen[key] = size
                        limit = size if everything else min(size, seen.get(key, 0))
                        await self._follow(path.name, file, key, limit)
                    if self._let_go(path, size):
                        await self._finish(path, file)
        except OSError as error:
            self._complain("the trail cannot be read or kept", error)
        else:
            self._quiet = False

    async def _follow(
        self, name: str, file: BinaryIO, key: str, limit: int, *, last: bool = False
    ) -> None:
        while (at := self._read.get(key, 0)) < limit:
            lines, end = trail.read(file, at, limit, last=last)
            if end == at:
                return
            await self._take(name, lines)
            self._read[key] = end
            self._save()
            await asyncio.sleep(0)

    def _let_go(self, path: Path, size: int) -> bool:
        if path == self._trail.current or not self._trail.current.exists():
            return False
        now = self._monotonic()
        before, since = self._still.get(path, (-1, now))
        if size != before:
            since = now
        self._still[path] = size, since
        return now - since >= _LET_GO_SECONDS

    async def _finish(self, path: Path, file: BinaryIO) -> None:
        """To the last byte, and away with it. Forgotten first: nobody takes another file for it."""
        key, size = trail.look(file)
        await self._follow(path.name, file, key, size, last=True)
        if os.fstat(file.fileno()).st_size == size:
            self._read.pop(key, None)
            self._trail.save_read(self._read)
            self._trail.remove(path)
            self._still.pop(path, None)

    async def _take(self, name: str, lines: list[Line]) -> None:
        new = self._unsettled(lines)
        if not new:
            return
        await self._ahead([trail.request_id(line.text) or "" for line in new])
        new = self._unsettled(new)
        found, letters = trail.understood(new, name)
        records = [one.record for one in found]
        count = 0
        for begin in range(0, len(records), self._batch_rows):
            count += await self._store(records[begin : begin + self._batch_rows])
        if count:
            log.info("rows found in the trail", extra={"rows": count, "file": name})
        if letters:
            self._keep(letters)

    def _unsettled(self, lines: Iterable[Line]) -> list[Line]:
        return [line for line in lines if not self._settled.take(trail.request_id(line.text))]

    async def _store(self, records: list[UsageRecord]) -> int:
        count, nowhere = await self._storing.store(records)
        if nowhere:
            raise OSError("rows that the database refuses cannot be kept aside")
        return count

    def _keep(self, letters: list[Letter]) -> None:
        self._trail.set_aside(letters)
        first = letters[0]
        log.error(
            "lines of the trail kept aside",
            extra={
                "lines": len(letters),
                "file": first.file,
                "offset": first.offset,
                "reason": first.reason,
            },
        )

    def _save(self) -> None:
        """Where the disk is full the last one stays: more is read again, which is safe."""
        try:
            self._trail.save_read(self._read)
        except OSError as error:
            self._complain("the trail's offset is not kept", error)

    def _complain(self, event: str, error: OSError) -> None:
        """Once, until all is well again."""
        if not self._quiet:
            log.error(event, extra={"cause": error.strerror or str(error)})
        self._quiet = True
