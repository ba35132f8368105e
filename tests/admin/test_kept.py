"""Who waits for a newer answer, for how long, and what they are shown meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from parallama.admin.catalog.asking import Answer, Unanswered, Unasked
from parallama.admin.catalog.kept import (
    FIRST_SECONDS,
    NEW_SECONDS,
    SOON_SECONDS,
    Kept,
    Look,
    Said,
)


def said(text: str, status: int = 200) -> Answer:
    return Answer(status, "application/json", text.encode())


@dataclass
class Server:
    """Answers what it was told to say, or when it is told to. `now` is what the clock says."""

    says: Answer | Exception = field(default_factory=lambda: said("first"))
    now: float = 100.0
    asked: int = 0
    gate: asyncio.Event | None = None
    kept: Kept = field(init=False)

    def __post_init__(self) -> None:
        self.kept = Kept("tags", self.ask, clock=lambda: self.now)

    async def ask(self) -> Answer:
        self.asked += 1
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    async def look(self) -> tuple[str, float, bool]:
        seen: Look = await self.kept.look()
        return seen.answer.body.decode(), seen.age, seen.fresh

    async def looks(self, count: int = 1) -> list[tuple[str, float, bool]]:
        return [await self.look() for _ in range(count)]


Story = Callable[[Server], Awaitable[None]]


def tell(story: Story) -> None:
    async def all_of_it() -> None:
        await story(Server())

    asyncio.run(all_of_it())


def waits(monkeypatch: pytest.MonkeyPatch, server: Server) -> list[float]:
    """How long those who look would wait; their time passes at once."""
    told: list[float] = []
    really = asyncio.wait

    async def wait(tasks: set[asyncio.Task[None]], timeout: float) -> None:  # noqa: ASYNC109
        told.append(round(timeout, 3))
        await really(tasks, timeout=0.01)
        if not all(task.done() for task in tasks):
            server.now += timeout

    monkeypatch.setattr("parallama.admin.catalog.kept.asyncio.wait", wait)
    return told


def test_the_server_is_asked_again_as_soon_as_somebody_could_see_a_difference() -> None:
    async def story(server: Server) -> None:
        assert await server.look() == ("first", 0.0, True)
        server.says = said("second")
        server.now += NEW_SECONDS
        assert await server.look() == ("first", NEW_SECONDS, True)
        server.now += 0.01
        assert await server.look() == ("second", 0.0, True)
        assert server.asked == 2

    tell(story)


def test_many_who_look_at_once_are_one_question() -> None:
    async def story(server: Server) -> None:
        server.gate = asyncio.Event()
        looks = [asyncio.create_task(server.look()) for _ in range(100)]
        await asyncio.sleep(0)
        server.gate.set()
        assert set(await asyncio.gather(*looks)) == {("first", 0.0, True)}
        assert server.asked == 1

    tell(story)


def test_who_goes_away_takes_no_answer_along() -> None:
    async def story(server: Server) -> None:
        server.gate = asyncio.Event()
        one, other = (asyncio.create_task(server.look()) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        server.gate.set()
        assert await other == ("first", 0.0, True)

    tell(story)


def test_while_the_server_hangs_the_first_waits_a_little_and_the_others_hardly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(server: Server) -> None:
        await server.look()
        told = waits(monkeypatch, server)
        server.gate, server.says = asyncio.Event(), said("at last")
        server.now += 60
        assert await server.look() == ("first", 60 + SOON_SECONDS, False)
        server.now += 3
        assert await server.looks(2) == [("first", 63 + SOON_SECONDS, False)] * 2
        assert told == [SOON_SECONDS]
        server.gate.set()
        await asyncio.sleep(0.01)
        assert await server.look() == ("at last", 0.0, True)
        assert server.asked == 2

    tell(story)


def test_one_that_is_away_is_asked_once_a_second_and_shown_with_its_age(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(server: Server) -> None:
        await server.look()
        told = waits(monkeypatch, server)
        server.says = Unanswered("away")
        server.now += 60
        assert await server.looks(3) == [("first", 60.0, False)] * 3
        assert server.asked == 2
        assert server.kept.state().trouble == "away"
        server.now += 1
        assert await server.look() == ("first", 61.0, False)
        assert (server.asked, told) == (3, [SOON_SECONDS, 0.25])
        server.now, server.says = server.now + 1, said("back")
        assert await server.look() == ("back", 0.0, True)
        assert server.kept.state().trouble is None

    tell(story)


def test_who_can_be_shown_nothing_waits_for_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(server: Server) -> None:
        told = waits(monkeypatch, server)
        server.gate = asyncio.Event()
        with pytest.raises(Unanswered, match="no answer yet"):
            await server.look()
        assert told == [FIRST_SECONDS]
        server.gate.set()
        await asyncio.sleep(0.01)
        assert (await server.look())[0] == "first"

    tell(story)


def test_that_envoy_is_not_there_yet_says_nothing_about_the_servers() -> None:
    async def story(server: Server) -> None:
        server.says = Unasked("nobody listens")
        with pytest.raises(Unanswered):
            await server.look()
        server.says = said("there")
        assert await server.look() == ("there", 0.0, True)

    tell(story)


def test_what_is_not_to_be_kept_is_shown_and_forgotten() -> None:
    async def story(server: Server) -> None:
        await server.look()
        server.now += 60
        server.says = Said(said("busy", 500), final=False)
        assert await server.look() == ("first", 60.0, False)
        server.now += 60
        server.says = Said(said("gone", 404), final=True)
        assert await server.look() == ("gone", 0.0, True)
        assert server.kept.empty

    tell(story)


def test_an_answer_that_breaks_our_code_is_trouble_and_not_the_end() -> None:
    async def story(server: Server) -> None:
        await server.look()
        server.now, server.says = server.now + 60, RuntimeError("a bug")
        assert await server.look() == ("first", 60.0, False)
        server.now, server.says = server.now + 1, said("mended")
        assert (await server.look())[0] == "mended"

    tell(story)
