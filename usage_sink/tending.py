"""Keeps the trail's files small and their sum bounded, and says so where it cannot."""

import logging
import re
from collections.abc import Awaitable, Callable

from parallama.trail import Trail

log = logging.getLogger(__name__)

_REOPEN = "/reopen_logs"
_WRITE = "/runtime_modify?trail.write={}"  # percent, as envoy.yaml asks for it
_FAILED = "/stats?filter=^filesystem.write_failed$"

_FILES = 4  # of the whole; a single one could neither be read to its end nor removed
_ROOM_AGAIN = 0.9
_EVERY = 10  # looks: how often Envoy is asked whether it can write, and a full trail told again
_DAY_SECONDS = 86400.0  # what is older is not kept because so little came


class Tender:
    """
    Looks at the trail once in a while. `ask` is a question to Envoy's admin interface.

    When all files together are larger than `max_size`, Envoy is told to write no lines until there
    is room: then requests are as safe as Envoy's stream alone makes them. Nothing is removed.
    """

    def __init__(
        self,
        trail: Trail,
        ask: Callable[[str, str], Awaitable[str]],
        *,
        file_size: int,
        max_size: int,
        monotonic: Callable[[], float],
    ) -> None:
        self._trail = trail
        self._ask = ask
        self._file_size = min(file_size, max_size // _FILES)
        self._max_size = max_size
        self._monotonic = monotonic
        self._begun = monotonic()
        self._looks = 0
        self._full = False
        self._told: bool | None = None  # whether Envoy writes; who died may have stopped it
        self._unwritten = 0

    async def run(self, pause: Callable[[], Awaitable[None]]) -> None:
        """For ever."""
        while True:
            await self.look()
            await pause()

    async def look(self) -> None:
        try:
            self._rotate()
            self._judge(self._trail.size())
        except OSError as error:
            log.error("the trail's files cannot be tended", extra={"cause": str(error)})
        try:
            await self._tell_envoy()
        except OSError as error:  # it starts, or stops: both open a new file
            log.debug("envoy not told", extra={"cause": str(error) or type(error).__name__})
        self._looks += 1

    def _rotate(self) -> None:
        current = self._trail.current
        size = current.stat().st_size if current.exists() else 0
        old = self._monotonic() - self._begun >= _DAY_SECONDS
        if size and (old or size >= self._file_size):
            self._trail.rename()
            self._begun = self._monotonic()

    def _judge(self, total: int) -> None:
        was = self._full
        self._full = total > (self._max_size * _ROOM_AGAIN if was else self._max_size)
        if self._full and (not was or self._looks % _EVERY == 0):
            log.error(
                "the trail is full: finished requests are kept in memory alone",
                extra={"bytes": total, "most": self._max_size},
            )
        if was and not self._full:
            log.warning("the trail has room again", extra={"bytes": total})

    async def _tell_envoy(self) -> None:
        if not self._trail.current.exists() and self._trail.files():
            await self._ask("POST", _REOPEN)
        # Again and again while it is full: an Envoy that started anew knows nothing of it.
        if self._full or not self._told:
            await self._ask("POST", _WRITE.format(0 if self._full else 100))
            self._told = not self._full
        if self._looks % _EVERY == 0:
            await self._count_unwritten()

    async def _count_unwritten(self) -> None:
        found = re.search(r"write_failed: (\d+)", await self._ask("GET", _FAILED))
        count = int(found[1]) if found else 0
        if count > self._unwritten:
            log.error(
                "envoy could not write to the trail: is its disk full?",
                extra={"failed_writes": count - self._unwritten},
            )
        self._unwritten = count
