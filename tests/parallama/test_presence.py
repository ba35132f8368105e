"""A real database that goes and comes: seen, said once, and told to whom it concerns."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from parallama.config import Database
from parallama.errors import SchemaError, Unavailable
from parallama.presence import Presence, opened
from tests.postgres import Postgres


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """Of its own: it is stopped."""
    running = Postgres()
    yield running
    running.remove()


@pytest.fixture
def at(server: Postgres) -> Iterator[Database]:
    database = server.migrated()
    yield database
    if server._process is None:
        server.start()
    server.drop(database)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Story = Callable[[Presence, Clock], Awaitable[None]]


def told(at: Database, story: Story, *, too_long: Callable[[], None] = lambda: None) -> None:
    async def inside() -> None:
        clock = Clock()
        async with opened(at) as store:
            presence = Presence(store, monotonic=clock, patience=60, too_long=too_long)
            await story(presence, clock)

    asyncio.run(inside())


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [at.message for at in caplog.records if at.name == "parallama.presence"]


def test_one_that_comes_late_is_waited_for_and_this_is_said_once(
    server: Postgres, at: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def story(presence: Presence, clock: Clock) -> None:
        await presence.begin(wait=True)
        await presence.look()
        assert not presence.there()
        assert not presence.lately()
        server.start()
        await presence.look()
        await presence.look()
        assert presence.there()
        assert presence.lately()

    server.stop()
    told(at, story)
    assert said(caplog) == ["database away", "database is there"]
    (away, _) = (at for at in caplog.records if at.name == "parallama.presence")
    assert "is the server running" in away.cause  # type: ignore[attr-defined]


def test_whoever_does_not_want_to_wait_is_told_at_once(server: Postgres, at: Database) -> None:
    async def story(presence: Presence, clock: Clock) -> None:
        with pytest.raises(Unavailable, match="does not answer"):
            await presence.begin(wait=False)

    server.stop()
    told(at, story)


def test_how_long_it_has_been_away_is_measured_from_its_last_answer(
    server: Postgres, at: Database
) -> None:
    alarms: list[float] = []

    async def story(presence: Presence, clock: Clock) -> None:
        await presence.begin(wait=False)
        clock.now += 10_000  # nobody looked: that it was away is not known
        assert presence.lately()
        await presence.look()
        server.stop()
        for seconds, lately in ((1, True), (59, True), (1, False), (1, False)):
            clock.now += seconds
            await presence.look()
            assert presence.lately() is lately
            assert not presence.there()
            alarms.append(len(calls))
        server.start()
        await presence.look()
        assert presence.lately()

    calls: list[None] = []
    told(at, story, too_long=lambda: calls.append(None))
    assert alarms == [0, 0, 1, 2]
    assert len(calls) == 2


@pytest.mark.parametrize("late", [False, True])
def test_tables_of_another_version_are_an_error_whenever_it_comes(
    server: Postgres, late: bool
) -> None:
    empty = server.empty()

    async def story(presence: Presence, clock: Clock) -> None:
        if late:
            server.stop()
            await presence.begin(wait=True)
            server.start()
        with pytest.raises(SchemaError, match="has no tables yet: run `parallama db upgrade`"):
            await (presence.look() if late else presence.begin(wait=True))

    told(empty, story)
    server.drop(empty)


def test_an_upgrade_under_a_running_service_is_none_of_its_business(
    server: Postgres, at: Database
) -> None:
    """It is followed by `parallama restart`, and until then the old ones serve."""

    async def story(presence: Presence, clock: Clock) -> None:
        await presence.begin(wait=False)
        server.run("UPDATE alembic_version SET version_num = 'newer'", database=at.name or "")
        await presence.look()
        assert presence.there()

    told(at, story)
