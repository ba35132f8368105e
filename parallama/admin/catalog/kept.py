"""What one question was answered last, and when: shown while a newer answer is awaited."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from parallama.admin.catalog.asking import Answer, Unanswered, Unasked
from parallama.clock import Clock

log = logging.getLogger(__name__)

NEW_SECONDS = 0.25
"""What is so old needs no second question: nobody sees more than that behind the server."""

SOON_SECONDS = 1.5
"""So long somebody waits for a newer answer who can be shown an older one."""

TROUBLED_SECONDS = 0.25
"""The same where it went wrong the last time: just enough for a server that is back."""

FIRST_SECONDS = 5.0
"""So long somebody waits who can be shown nothing, because there is nothing yet."""

_AGAIN_SECONDS = 1.0
"""After a question that went wrong the next one is not asked sooner, however many want to know."""


class Said(Exception):
    """
    An answer that is passed on and not kept, such as an error.

    Where it is `final`, what was kept is not so any more.
    """

    def __init__(self, answer: Answer, *, final: bool) -> None:
        super().__init__(answer.status)
        self.answer, self.final = answer, final


@dataclass(frozen=True, slots=True)
class Look:
    """
    What is shown. It is fresh where the server was just asked and answered; otherwise it did not
    answer in time, and this is what it said `age` seconds ago.
    """

    answer: Answer
    age: float
    fresh: bool


@dataclass(frozen=True, slots=True)
class State:
    """What is known without asking. `age` is None where nothing is; `trouble` of the last try."""

    answer: Answer | None
    age: float | None
    trouble: str | None


class Kept:
    """
    The last good answer to one question. `ask` gives it, or raises Unanswered or Said.

    However many want to know at a time, one question is asked. Somebody who can be shown nothing
    waits for `patience` seconds.
    """

    def __init__(
        self,
        name: str,
        ask: Callable[[], Awaitable[Answer]],
        *,
        clock: Clock,
        patience: float = FIRST_SECONDS,
    ) -> None:
        self._patience_at_first = patience
        self._name = name
        self._ask = ask
        self._clock = clock
        self._answer: Answer | None = None
        self._at = 0.0
        self._said: Answer | None = None
        self._trouble: str | None = None
        self._running: asyncio.Task[None] | None = None
        self._began = float("-inf")
        self._failed = float("-inf")

    def state(self) -> State:
        age = None if self._answer is None else self._clock() - self._at
        return State(self._answer, age, self._trouble)

    @property
    def empty(self) -> bool:
        """Nothing is kept, and nobody waits for it."""
        return self._answer is None and self._running is None

    async def look(self) -> Look:
        """Raises Unanswered where there is nothing to show."""
        now = self._clock()
        if self._answer is not None and now - self._at <= NEW_SECONDS:
            return Look(self._answer, now - self._at, True)
        running = self.refresh()
        if running is not None and (patience := self._patience(now)) > 0:
            await asyncio.wait((running,), timeout=patience)
        if self._answer is not None:
            age = self._clock() - self._at
            return Look(self._answer, age, self._at >= now)
        if self._said is not None:
            return Look(self._said, 0.0, True)
        raise Unanswered(self._trouble or "no answer yet")

    def refresh(self) -> "asyncio.Task[None] | None":
        """The question that is being asked; None where it went wrong a moment ago."""
        if self._running is None and self._clock() - self._failed >= _AGAIN_SECONDS:
            self._began = self._clock()
            self._running = asyncio.create_task(self._try(), name=f"ask {self._name}")
        return self._running

    def _patience(self, now: float) -> float:
        if self._answer is None:
            return self._patience_at_first
        # Together with those who came before: nobody begins to wait anew.
        soon = TROUBLED_SECONDS if self._trouble else SOON_SECONDS
        return soon - (now - self._began)

    async def _try(self) -> None:
        failed, trouble, self._said = self._clock(), None, None
        try:
            self._answer = await self._ask()
            self._at = self._clock()
        except Said as error:
            self._said, trouble = error.answer, f"it answers {error.answer.status}"
            if error.final:
                self._answer = None
        except Unasked as error:
            failed, trouble = float("-inf"), str(error)  # that says nothing about the servers
        except Unanswered as error:
            trouble = str(error)
        except Exception:
            log.exception("list not read", extra={"list": self._name})
            trouble = "its answer could not be read"
        finally:
            self._running = None
            self._failed = failed if trouble else float("-inf")
        if (trouble is None) != (self._trouble is None):
            log.info("list read" if trouble is None else "list not read", extra=self._told(trouble))
        self._trouble = trouble

    def _told(self, trouble: str | None) -> dict[str, str]:
        return {"list": self._name, **({"cause": trouble} if trouble else {})}
