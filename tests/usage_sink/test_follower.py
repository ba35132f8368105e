"""The trail is read behind Envoy, and what its stream did not bring is stored."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

import pytest

from parallama.db.ledger import Added
from parallama.errors import Unavailable
from parallama.trail import Letter, Trail
from parallama.usage import UsageRecord
from tests.usage_sink.lines import a_line, append, lines, nobody
from usage_sink.follower import Follower
from usage_sink.storing import Storing
from usage_sink.writer import Settled

Price = Callable[[Sequence[UsageRecord]], Awaitable[Sequence[UsageRecord]]]


class Ledger:
    def __init__(self) -> None:
        self.rows: list[str] = []
        self.batches: list[int] = []
        self.refused: set[str] = set()
        self.away = 0

    async def add(self, records: Sequence[UsageRecord]) -> Added:
        if self.away:
            self.away -= 1
            raise Unavailable("away")
        taken = [record for record in records if record.request_id not in self.refused]
        new = [at.request_id for at in taken if at.request_id not in self.rows]
        self.batches.append(len(records))
        self.rows += new
        return Added(len(new), tuple((at, "odd") for at in records if at not in taken))


class Disk(Trail):
    """A trail on a disk that may be full."""

    full = False

    def set_aside(self, letters: Iterable[Letter]) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        super().set_aside(letters)


async def as_it_is(records: Sequence[UsageRecord]) -> Sequence[UsageRecord]:
    return records


class Scene:
    """A trail that nobody but the test writes, and a follower whose pauses the test decides."""

    def __init__(self, folder: Path) -> None:
        self.trail = Disk(folder / "trail")
        self.trail.make()
        self.ledger = Ledger()
        self.settled = Settled()
        self.now = 0.0
        self.follower = self.again()

    def again(self, price: Price = as_it_is) -> Follower:
        """Another process, which knows what is on the disk."""
        self.settled = Settled()
        self.follower = Follower(
            self.trail,
            Storing(self.ledger.add, self.trail.set_aside, price=price),
            self.settled,
            batch_rows=10,
            monotonic=lambda: self.now,
        )
        return self.follower

    def write(self, *ids: object) -> None:
        append(self.trail.current, lines(*ids))

    async def looks(self, times: int = 1) -> None:
        for _ in range(times):
            await self.follower.look()

    def names(self) -> list[str]:
        return [path.name for path in self.trail.files()]

    def letters(self) -> list[Letter]:
        return [Letter.load(text) for text in self.trail.take_letters()]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def told(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await story()

    asyncio.run(bounded())


def test_at_the_start_all_that_is_there_is_stored_in_order(scene: Scene) -> None:
    scene.write(*range(25))
    told(scene.follower.catch_up)
    assert scene.ledger.rows == [str(n) for n in range(25)]
    assert scene.ledger.batches == [10, 10, 5]
    assert scene.trail.waiting() == 0


def test_lines_are_left_alone_for_one_look(scene: Scene) -> None:
    """So that Envoy's stream has time to bring the same row."""

    async def story() -> None:
        scene.write(1)
        await scene.looks()
        scene.write(2)
        assert scene.ledger.rows == []
        await scene.looks()
        assert scene.ledger.rows == ["1"]
        await scene.looks()
        assert scene.ledger.rows == ["1", "2"]

    told(story)


def test_what_envoys_stream_brought_is_passed_over(scene: Scene) -> None:
    scene.write(1, 2, 3)
    scene.settled.add(["1", "3"])
    told(scene.follower.catch_up)
    assert scene.ledger.rows == ["2"]
    assert scene.ledger.batches == [1]
    assert scene.trail.waiting() == 0


def test_what_is_stored_is_not_read_again_by_the_next_process(scene: Scene) -> None:
    scene.write(1, 2)
    told(scene.follower.catch_up)
    scene.write(3)
    told(scene.again().catch_up)
    assert scene.ledger.batches == [2, 1]


def test_an_offset_that_was_lost_costs_time_and_no_row(scene: Scene) -> None:
    scene.write(1, 2)
    told(scene.follower.catch_up)
    (scene.trail.folder / "read.json").write_bytes(b"\0" * 20)
    told(scene.again().catch_up)
    assert scene.ledger.rows == ["1", "2"]


def test_while_the_database_is_away_the_offset_stays(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        scene.ledger.away = 3
        scene.write(*range(15))
        reading = asyncio.create_task(scene.follower.catch_up())
        await asyncio.sleep(0.01)
        assert scene.trail.load_read() == {}
        await reading

    told(story)
    assert scene.ledger.rows == [str(n) for n in range(15)]
    assert caplog.text.count("rows not stored yet") == 1


def test_who_is_killed_during_an_outage_loses_nothing(scene: Scene) -> None:
    async def story() -> None:
        scene.ledger.away = 1000
        scene.write(1, 2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(scene.follower.catch_up(), 0.01)
        scene.ledger.away = 0
        await scene.again().catch_up()

    told(story)
    assert scene.ledger.rows == ["1", "2"]


# What is no line.


def test_what_cannot_be_read_is_kept_aside_and_the_others_are_stored(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    bad = b'{"id":"r9","secret of the line'
    append(scene.trail.current, lines(1) + bad + b"\n" + a_line("2", v=2) + b"\n" + lines(3))
    told(scene.follower.catch_up)
    assert scene.ledger.rows == ["1", "3"]
    assert [(at.reason, at.offset, at.line) for at in scene.letters()] == [
        ("not a whole line of JSON", len(lines(1)), bad),
        (
            "written by another version: v is 2, not 1",
            len(lines(1)) + len(bad) + 1,
            a_line("2", v=2),
        ),
    ]
    (said,) = [at for at in caplog.records if at.levelno == logging.ERROR]
    assert (said.message, said.lines, said.offset) == (  # type: ignore[attr-defined]
        "lines of the trail kept aside", 2, len(lines(1)),
    )  # fmt: skip
    assert "secret" not in str([vars(at) for at in caplog.records])


def test_requests_of_nobody_are_passed_over(scene: Scene) -> None:
    append(scene.trail.current, nobody() + b"\n" + lines(1))
    told(scene.follower.catch_up)
    assert scene.ledger.rows == ["1"]
    assert len(scene.trail.letters()) == 0


def test_half_a_line_waits_for_its_end(scene: Scene) -> None:
    async def story() -> None:
        scene.write(0)
        append(scene.trail.current, a_line("1")[:50])
        await scene.looks(3)
        assert scene.ledger.rows == ["0"]
        append(scene.trail.current, a_line("1")[50:] + b"\n")
        await scene.looks(2)
        assert scene.ledger.rows == ["0", "1"]

    told(story)


def test_a_row_that_is_refused_stops_nothing(scene: Scene) -> None:
    scene.ledger.refused = {"2"}
    scene.write(1, 2, 3)
    told(scene.follower.catch_up)
    assert scene.ledger.rows == ["1", "3"]
    (letter,) = scene.letters()
    assert letter.row is not None
    assert (letter.reason, letter.row.request_id) == ("odd", "2")


@pytest.mark.parametrize("what", ["a line", "a row"])
def test_what_can_be_kept_nowhere_is_not_passed_over(
    scene: Scene, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        scene.trail.full = True
        append(scene.trail.current, lines(1) + (b"odd\n" if what == "a line" else lines("odd")))
        scene.ledger.refused = {"odd"}
        await scene.looks(4)
        assert scene.ledger.rows == ["1"]
        assert scene.trail.waiting() > 0
        scene.trail.full = False
        await scene.looks()
        assert scene.trail.waiting() == 0

    told(story)
    assert len(scene.trail.letters()) == 1
    assert caplog.text.count("the trail cannot be read or kept") == 1


# Files that were renamed.


def test_a_renamed_file_is_read_to_its_end_and_removed_once_envoy_let_go(scene: Scene) -> None:
    async def story() -> None:
        scene.write(1)
        await scene.looks()
        scene.trail.rename()
        append(scene.trail.files()[0], lines(2))  # Envoy still has it
        scene.now = 100
        await scene.looks(2)
        assert scene.ledger.rows == ["1", "2"]
        scene.now = 200
        await scene.looks()
        assert scene.names() == ["usage.00000001.jsonl"]  # nobody opened another one
        scene.write(3)
        await scene.looks()
        scene.now = 205
        append(scene.trail.files()[0], lines(4))
        await scene.looks()
        scene.now = 214
        await scene.looks()
        assert scene.names() == ["usage.00000001.jsonl", "usage.jsonl"]
        scene.now = 215
        await scene.looks()
        assert scene.names() == ["usage.jsonl"]
        assert scene.ledger.rows == ["1", "2", "3", "4"]
        assert len(scene.trail.load_read()) == 1

    told(story)


def test_at_its_end_half_a_line_is_no_line(scene: Scene) -> None:
    async def story() -> None:
        scene.write(1)
        append(scene.trail.current, a_line("2")[:-1])
        scene.trail.rename()
        scene.write(3)
        await scene.looks()
        scene.now = 20
        await scene.looks()
        assert scene.names() == ["usage.jsonl"]

    told(story)
    assert [at.line for at in scene.letters()] == [a_line("2")[:-1]]


@pytest.mark.parametrize("text", [b"", a_line("1")[:-1]])
def test_a_file_without_a_whole_line_goes_as_well(scene: Scene, text: bytes) -> None:
    async def story() -> None:
        append(scene.trail.current, text)
        scene.trail.rename()
        scene.write(3)
        await scene.looks(2)
        scene.now = 20
        await scene.looks()
        assert scene.names() == ["usage.jsonl"]
        assert len(scene.trail.letters()) == bool(text)

    told(story)


def test_a_file_that_goes_in_the_middle_of_a_look_is_no_error(scene: Scene) -> None:
    async def story() -> None:
        scene.write(1)
        scene.trail.rename()
        scene.write(2)

        async def slow(records: Sequence[UsageRecord]) -> Sequence[UsageRecord]:
            for path in scene.trail.files():
                path.unlink()
            return records

        await scene.again(slow).catch_up()

    told(story)
    assert scene.ledger.rows == ["1"]


def test_a_current_file_that_is_renamed_in_the_middle_of_a_look_is_not_mixed_with_the_next(
    scene: Scene,
) -> None:
    async def story() -> None:
        scene.write(*range(1000))  # several blocks

        async def slow(records: Sequence[UsageRecord]) -> Sequence[UsageRecord]:
            if scene.names() == ["usage.jsonl"]:
                scene.trail.rename()
                scene.write("next")
            return records

        await scene.again(slow).catch_up()
        await scene.follower.catch_up()

    told(story)
    assert scene.ledger.rows == [*map(str, range(1000)), "next"]
    assert len(scene.trail.letters()) == 0


def test_which_rows_no_line_has(scene: Scene) -> None:
    scene.write(1, 2)
    told(scene.follower.catch_up)
    scene.write(3, 4)
    assert scene.follower.missing(["3", "4", "5"]) == {"5"}


def test_a_pass_over_what_is_known_is_cheap(scene: Scene) -> None:
    """It runs beside every request: nothing is parsed."""

    async def story() -> None:
        scene.write(*range(100))
        scene.settled.add(map(str, range(100)))
        await scene.follower.catch_up()
        assert scene.ledger.batches == []

    told(story)


def test_no_clock_of_envoys_decides_what_is_read(scene: Scene) -> None:
    """Times that jump in either direction are times of rows, and nothing else."""

    async def story() -> None:
        for n, start in enumerate((1_772_366_400, 4_000_000_000, 0, 1_772_366_399)):
            append(scene.trail.current, a_line(str(n), start_us=f"{start}000000") + b"\n")
            await scene.looks(2)
            await scene.again().catch_up()

    told(story)
    assert scene.ledger.rows == ["0", "1", "2", "3"]
    assert scene.ledger.batches == [1, 1, 1, 1]
