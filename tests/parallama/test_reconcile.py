"""The trail, the rows and what was kept aside: every difference is found, and can be mended."""

import asyncio
import json
import os
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from parallama.config import load
from parallama.counters import Call, Counters, Hold
from parallama.db import Store, database
from parallama.db.known import known
from parallama.db.ledger import add, add_lost
from parallama.limits import Unit
from parallama.reconcile import Found, Reconciliation
from parallama.stores import connect_redis
from parallama.trail import Letter, Trail, parse
from parallama.usage import UsageRecord
from tests.parallama.commands import invoke
from tests.parallama.db_on_disk import a_record, migrate, settings
from tests.parallama.servers import Server
from tests.usage_sink.lines import a_line, append, lines
from tests.usage_sink.make import START

NOW = datetime.fromtimestamp(START, UTC) + timedelta(hours=1)


def record_of(id: str) -> UsageRecord:
    finished = parse(a_line(id))
    assert finished is not None
    return finished.record


class Scene:
    """A database and a trail, in a folder of `parallama init`'s shape."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trail = Trail(folder / "state" / "trail")
        self.trail.make()
        self.config = folder / "config.yaml"
        self.config.write_text("{}\n")
        asyncio.run(migrate(settings(folder)))

    def write(self, *ids: object) -> None:
        append(self.trail.current, lines(*ids))

    def store(self, *records: UsageRecord) -> None:
        async def work(store: Store) -> None:
            assert not (await add(store, records)).refused

        self._on(work)

    def lose(self, record: UsageRecord) -> None:
        async def work(store: Store) -> None:
            unknown = replace(record, token_source="unknown", tokens_used=0)
            assert await add_lost(store, [unknown]) == 1

        self._on(work)

    def rows(self) -> dict[str, tuple[str, int]]:
        found: dict[str, tuple[str, int]] = {}

        async def work(store: Store) -> None:
            query = "SELECT request_id, token_source, tokens_used FROM gateway_usage_logs"
            found.update({id: (source, used) for id, source, used in await store.read(query)})

        self._on(work)
        return found

    def reconcile(self, *, repair: bool = False, **more: Any) -> Found:
        found: list[Found] = []

        async def work(store: Store) -> None:
            reconciliation = Reconciliation(
                self.trail,
                partial(known, store),
                partial(add, store),
                repair=repair,
                **{"now": NOW, **more},
            )
            found.append(await reconciliation.run())

        self._on(work)
        return found[0]

    def _on(self, work: Any) -> None:
        async def opened() -> None:
            async with database(settings(self.folder)) as store:
                await work(store)

        asyncio.run(opened())


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_where_all_is_well_nothing_differs(scene: Scene) -> None:
    scene.write(1, 2)
    scene.store(record_of("1"), record_of("2"))
    assert scene.reconcile() == Found(lines=2)
    assert scene.reconcile(repair=True) == Found(lines=2)


def test_an_empty_trail_differs_in_nothing(scene: Scene) -> None:
    assert scene.reconcile(repair=True) == Found()


def test_a_missing_row_is_found_and_mended_in_every_file(scene: Scene) -> None:
    scene.write(1, 2)
    scene.trail.rename()
    scene.write(3)
    scene.store(record_of("2"))
    found = scene.reconcile()
    assert (found.lines, found.without_row, found.differs) == (3, 2, 2)
    assert scene.rows().keys() == {"2"}
    found = scene.reconcile(repair=True)
    assert (found.mended, found.differs) == (2, 0)
    assert scene.rows().keys() == {"1", "2", "3"}
    assert scene.reconcile().differs == 0


def test_a_row_that_is_marked_unknown_gives_way_to_what_the_trail_knows(scene: Scene) -> None:
    scene.write(1)
    scene.lose(record_of("1"))
    assert scene.rows()["1"] == ("unknown", 0)
    assert scene.reconcile().without_row == 1
    assert scene.reconcile(repair=True).differs == 0
    assert scene.rows()["1"] == ("reported", 31)


def test_what_ended_a_moment_ago_is_under_way(scene: Scene) -> None:
    scene.write(1)
    ended = datetime.fromtimestamp(START + 2, UTC)
    found = scene.reconcile(now=ended + timedelta(seconds=9))
    assert (found.under_way, found.differs) == (1, 0)
    assert scene.reconcile(now=ended + timedelta(seconds=11)).without_row == 1
    assert scene.reconcile(now=ended - timedelta(hours=1)).without_row == 1  # clocks jump


def test_what_was_pruned_is_not_missing(scene: Scene) -> None:
    scene.write(1)
    found = scene.reconcile(oldest=NOW)
    assert (found.lines, found.differs) == (0, 0)


def test_what_is_no_line_differs_until_it_is_kept_aside_and_after_that_as_well(
    scene: Scene,
) -> None:
    scene.write(1)
    append(scene.trail.current, b"nonsense\n")
    scene.store(record_of("1"))
    assert scene.reconcile().unreadable == 1
    scene.trail.set_aside([Letter("no line", "usage.jsonl", 9, b"nonsense")] * 2)
    found = scene.reconcile(repair=True)
    assert (found.unreadable, found.kept_aside, found.differs) == (0, 1, 1)
    assert len(scene.trail.letters()) == 1
    (scene.trail.folder / "refused.jsonl").unlink()  # the operator has looked at it
    append(scene.trail.folder / "refused.jsonl", b"nonsense of an editor\n")
    assert scene.reconcile().kept_aside == 1


def test_what_was_kept_aside_and_can_be_stored_by_now_is_stored(scene: Scene) -> None:
    scene.trail.set_aside(
        [
            Letter("refused once", row=a_record("r1")),
            Letter("refused twice", row=a_record("r1")),
            Letter("the version before could not read it", "usage.jsonl", 0, a_line("r2")),
            Letter("stored in the meantime", row=a_record("r3")),
        ]
    )
    scene.store(a_record("r3"))
    assert scene.reconcile().kept_aside == 2
    found = scene.reconcile(repair=True)
    assert (found.mended, found.differs) == (2, 0)
    assert scene.rows().keys() == {"r1", "r2", "r3"}
    assert scene.trail.letters() == []


def test_late_reservations_are_a_difference() -> None:
    assert Found(late_reservations=2).differs == 2


# The command.


def command(scene: Scene, *words: str) -> tuple[int, dict[str, Any]]:
    result = invoke("--config", str(scene.config), "usage", "reconcile", "-o", "json", *words)
    return result.exit_code, json.loads(result.stdout)


def test_the_command_says_by_its_exit_code_whether_something_differs(scene: Scene) -> None:
    assert command(scene)[0] == 0
    scene.write(1)
    scene.lose(a_record("other"))
    code, told = command(scene)
    assert (code, told["without_row"], told["rows_unknown"], told["differs"]) == (1, 1, 1, 1)
    code, told = command(scene, "--repair")
    assert (code, told["mended"], told["differs"]) == (0, 1, 0)
    assert command(scene)[0] == 0


def test_a_row_that_is_mended_closes_its_reservation(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At its price, and at once: not when the lease ends."""
    scene.write(1)
    record = record_of("1")
    hold = Hold("b", Unit.TOKENS, 100, 50, 0, 2**40)
    money = Hold("m", Unit.COST, 10**12, 50, 0, 2**40)
    price = ("prices", "set", "llama3", "--prompt", "1", "--completion", "1")
    invoke("--config", str(scene.config), *price)

    async def reserve(counters: Counters) -> tuple[int, int]:
        at = datetime.now(UTC).timestamp()
        await counters.begin(record.user_id, 0)
        call = Call("1", record.user_id, "", "ollama", "ollama", "/api/chat", "llama3", at)
        taken = Counters.taken(
            await counters.reserve(call, [hold, money], tokens=50, least=0, now=at)
        )
        assert taken.taken
        return await levels(counters)

    async def levels(counters: Counters) -> tuple[int, int]:
        at = datetime.now(UTC).timestamp()
        probe = Call("probe", record.user_id, "", "", "", "", "", at)
        none = Hold("none", Unit.REQUESTS, 0, 1, 0, 2**40)
        seen = Counters.taken(
            await counters.reserve(probe, [hold, money, none], tokens=9, least=0, now=at)
        )
        return tuple((level.used, level.reserved) for level in seen.levels[:2])

    with Server(tmp_path / "redis") as server:
        monkeypatch.setenv("PARALLAMA_REDIS__HOST", "127.0.0.1")
        monkeypatch.setenv("PARALLAMA_REDIS__PORT", str(server.port))

        def ask(work: Any) -> Any:
            async def opened() -> Any:
                config = load(scene.config, os.environ)
                async with (
                    connect_redis(config) as redis,
                    aclosing(Counters(redis, lease=60, timeout=5)) as counters,
                ):
                    return await work(counters)

            return asyncio.run(opened())

        assert ask(reserve) == ((0, 50), (0, 50))
        assert command(scene, "--repair")[0] == 0
        assert ask(levels) == ((31, 0), (31000, 0))
        assert command(scene, "--repair")[0] == 0  # nothing is charged twice
        assert ask(levels) == ((31, 0), (31000, 0))
