"""A child is kept running, and its troubles are seen."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from parallama.errors import ParallamaError
from parallama.supervisor.child import Backoff, Child, Command


class States(asyncio.Queue[str]):
    """What a child became, one after the other."""

    async def reach(self, state: str) -> None:
        while await self.get() != state:
            pass


async def at_once(pid: int) -> bool:
    return True


async def never(pid: int) -> bool:
    return False


def command(script: str, **more: Any) -> Command:
    argv = [sys.executable, "-S", "-c", script]
    return Command(
        **{"name": "child", "argv": argv, "ready": at_once, "cwd": Path("/"), "env": {}, **more}
    )


def watched(command: Command, see: Callable[[Child, States], Awaitable[None]]) -> Child:
    """The child after `see` and `stop`."""

    async def main() -> Child:
        states = States()
        child = Child(command, on_change=lambda: states.put_nowait(child.state))
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            tasks.create_task(child.run())
            await see(child, states)
            await child.stop()
        assert child.state == "stopped"
        return child

    return asyncio.run(main())


def test_pauses_grow_up_to_a_bound() -> None:
    backoff = Backoff()
    pauses = [backoff.died(lived=0.0) for _ in range(10)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]


def test_the_fourth_death_in_a_row_is_a_crash_loop() -> None:
    backoff = Backoff()
    looping = []
    for _ in range(4):
        backoff.died(lived=1.0)
        looping.append(backoff.looping)
    assert looping == [False, False, False, True]


def test_a_child_that_was_well_for_a_while_begins_anew() -> None:
    backoff = Backoff(deaths=7)
    assert backoff.died(lived=60.0) == 0.1
    assert not backoff.looping


def test_a_child_that_keeps_dying_is_a_crash_loop_with_its_exit() -> None:
    async def see(child: Child, states: States) -> None:
        await states.reach("crash loop")
        assert child.restarts == 4
        assert child.last_exit == "code 3"

    watched(command("raise SystemExit(3)"), see)


def test_a_child_that_never_served_is_not_tried_again() -> None:
    async def see(child: Child, states: States) -> None:
        with pytest.raises(ParallamaError, match=r"child does not start \(code 3\).* in a.log"):
            await child.serving()

    child = watched(command("raise SystemExit(3)", ready=never, messages="in a.log"), see)
    assert child.restarts == 0


def test_a_program_that_is_not_there_is_told_like_a_death() -> None:
    async def see(child: Child, states: States) -> None:
        with pytest.raises(ParallamaError, match="cannot be run: No such file"):
            await child.serving()

    watched(command("", argv=["/no/such/program"], ready=never), see)


def test_a_child_that_does_not_answer_is_given_up_in_time() -> None:
    async def see(child: Child, states: States) -> None:
        with pytest.raises(ParallamaError, match=r"child does not answer after 0\.1 s"):
            await child.serving()

    watched(command("input()", ready=never, start_seconds=0.1, argv=["/bin/sleep", "9"]), see)


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    deaf = tmp_path / "deaf"

    async def ready(pid: int) -> bool:
        return deaf.exists()

    async def see(child: Child, states: States) -> None:
        await child.serving()

    script = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"open({str(deaf)!r}, 'w').close(); signal.pause()"
    )
    child = watched(command(script, ready=ready, stop_seconds=0.1), see)
    assert child.last_exit == "SIGKILL"


def test_a_stop_does_not_wait_for_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_PAUSE_SECONDS", "_LONGEST_PAUSE_SECONDS"):
        monkeypatch.setattr(f"parallama.supervisor.child.{name}", 60.0)

    async def see(child: Child, states: States) -> None:
        await states.reach("restarting")

    watched(command("raise SystemExit(1)"), see)
