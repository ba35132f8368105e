"""The trail's files stay small, their sum bounded, and nothing of that is silent."""

import asyncio
import logging
from pathlib import Path

import pytest

from tests.usage_sink.lines import a_trail, append, lines
from usage_sink.tending import Tender


class Envoy:
    """Its admin interface."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.away = False
        self.failed = 0

    async def ask(self, method: str, path: str) -> str:
        if self.away:
            raise OSError("nobody listens")
        self.asked.append(f"{method} {path}")
        return f"filesystem.write_failed: {self.failed}\n" if method == "GET" else "OK\n"

    @property
    def posted(self) -> list[str]:
        return [at.removeprefix("POST ") for at in self.asked if at.startswith("POST")]


class Scene:
    def __init__(self, folder: Path) -> None:
        self.trail = a_trail(folder)
        self.envoy = Envoy()
        self.now = 0.0
        self.tender = self.again()

    def again(self, *, file_size: int = 10_000, max_size: int = 100_000) -> Tender:
        self.tender = Tender(
            self.trail,
            self.envoy.ask,
            file_size=file_size,
            max_size=max_size,
            monotonic=lambda: self.now,
        )
        return self.tender

    def look(self, times: int = 1) -> list[str]:
        """What Envoy is told."""
        before = len(self.envoy.posted)
        for _ in range(times):
            asyncio.run(self.tender.look())
        return self.envoy.posted[before:]

    def names(self) -> list[str]:
        return [path.name for path in self.trail.files()]

    def write(self, size: int) -> None:
        append(self.trail.current, b"x" * size)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    scene = Scene(tmp_path)
    assert scene.look() == ["/runtime_modify?trail.write=100"]
    return scene


def test_a_file_that_is_large_enough_is_renamed_and_envoy_opens_another(scene: Scene) -> None:
    scene.write(9_999)
    assert scene.look(3) == []
    scene.write(1)
    assert scene.look() == ["/reopen_logs"]
    assert scene.names() == ["usage.00000001.jsonl"]
    assert scene.look() == ["/reopen_logs"]  # until it has
    scene.write(1)
    assert scene.look() == []


def test_an_envoy_that_does_not_answer_is_asked_again(scene: Scene) -> None:
    scene.write(10_000)
    scene.envoy.away = True
    assert scene.look(2) == []
    scene.envoy.away = False
    assert scene.look() == ["/reopen_logs"]


def test_a_small_file_is_renamed_after_a_day(scene: Scene) -> None:
    scene.write(1)
    scene.now = 86_399
    assert scene.look() == []
    scene.now = 86_400
    assert scene.look() == ["/reopen_logs"]
    scene.write(1)
    assert scene.look() == []


def test_an_empty_trail_is_left_alone(scene: Scene) -> None:
    scene.trail.current.touch()
    scene.now = 100_000
    assert scene.look() == []
    scene.trail.current.unlink()
    assert scene.look() == []


def test_a_full_trail_is_written_no_more_and_that_is_said_until_there_is_room(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(11):
        scene.write(10_000)
        scene.trail.rename()
    scene.write(1)
    assert scene.look(30) == ["/runtime_modify?trail.write=0"] * 30
    said = [at for at in caplog.records if at.levelno == logging.ERROR]
    assert {at.message for at in said} == {
        "the trail is full: finished requests are kept in memory alone"
    }
    assert 3 <= len(said) <= 4
    scene.trail.remove(scene.trail.files()[0])
    scene.look()
    assert scene.look() == ["/runtime_modify?trail.write=0"]  # not for one file
    scene.trail.remove(scene.trail.files()[0])
    scene.trail.remove(scene.trail.files()[0])
    assert scene.look() == ["/runtime_modify?trail.write=100"]
    assert scene.look(3) == []


def test_a_single_file_never_fills_the_trail(scene: Scene) -> None:
    scene.again(file_size=10**9, max_size=4_000)
    scene.write(1_000)
    assert "/reopen_logs" in scene.look()


def test_what_a_dead_process_stopped_is_started_again(scene: Scene) -> None:
    scene.again()
    scene.envoy.away = True
    scene.look(2)
    scene.envoy.away = False
    assert scene.look() == ["/runtime_modify?trail.write=100"]


def test_writes_that_fail_are_told(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.envoy.failed = 3
    scene.look(10)
    scene.look(20)
    scene.envoy.failed = 5
    scene.look(10)
    said = [at for at in caplog.records if at.levelno == logging.ERROR]
    assert [at.failed_writes for at in said] == [3, 2]  # type: ignore[attr-defined]


def test_a_disk_that_does_not_let_it_is_no_end(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.write(20_000)
    scene.trail.folder.rename(scene.trail.folder.with_name("elsewhere"))
    scene.trail.folder.write_bytes(b"")
    scene.look()
    assert "the trail's files cannot be tended" in caplog.text


def test_lines_have_room(scene: Scene) -> None:
    append(scene.trail.current, lines(1, 2, 3))
    assert scene.look() == []
