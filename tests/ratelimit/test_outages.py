"""What callers see while the counters are away, and that they come back by themselves."""

import asyncio
import signal
import time
from contextlib import aclosing

import pytest

from parallama.counters import Call, Counters
from parallama.errors import Unavailable
from parallama.limits import Limit, Unit, Window
from parallama.pipeline import Pipeline, Script
from ratelimit import rules

NOON = 1_700_049_600.0
(BUCKET,) = rules.buckets([Limit("*", "*", Unit.TOKENS, Window.HOUR, 1000)], "g", "m", "k", NOON)
HOLD = BUCKET.hold(10)


async def reserve(counters: Counters, id: str):
    call = Call(id, "u", "k", "g", "openai", "/v1/chat/completions", "m", NOON)
    taken = Counters.taken(await counters.reserve(call, [HOLD], tokens=10, least=0, now=NOON))
    if not taken.known:
        await counters.begin("u", 0)
        taken = Counters.taken(await counters.reserve(call, [HOLD], tokens=10, least=0, now=NOON))
    return taken


async def connections(redis) -> set[str]:
    return {client["id"] for client in await redis.client_list()}


def test_away_is_said_at_once(own_valkey):
    own_valkey.stop()

    async def told(redis):
        async with aclosing(Counters(redis, lease=600, timeout=5)) as counters:
            answers = await asyncio.gather(
                *(reserve(counters, f"r{i}") for i in range(20)), return_exceptions=True
            )
            assert {type(answer) for answer in answers} == {Unavailable}

    begun = time.monotonic()
    own_valkey.run(told)
    assert time.monotonic() - begun < 4


def test_a_hung_server_costs_no_more_than_the_time_out(own_valkey):
    async def told(redis):
        async with aclosing(Counters(redis, lease=600, timeout=0.1)) as counters:
            await reserve(counters, "r0")
            known = await connections(redis)
            own_valkey.pause(signal.SIGSTOP)
            begun = time.monotonic()
            first = asyncio.create_task(reserve(counters, "r1"))
            await asyncio.sleep(0)  # the first is on its way; the others queue behind it
            answers = await asyncio.gather(
                first, *(reserve(counters, f"q{i}") for i in range(5)), return_exceptions=True
            )
            waited = time.monotonic() - begun
            own_valkey.pause(signal.SIGCONT)
            assert {type(answer) for answer in answers} == {Unavailable}
            assert "no answer within 0.1 s" in str(answers[0])
            assert waited < 1
            assert (await reserve(counters, "r2")).taken
            assert not known <= await connections(redis)  # one that says nothing may be dead

    own_valkey.run(told)


def test_killed_while_calls_run_and_started_again(own_valkey):
    async def told(redis):
        async with aclosing(Counters(redis, lease=600, timeout=5)) as counters:
            assert (await reserve(counters, "r0")).taken
            own_valkey.pause(signal.SIGSTOP)
            under_way = asyncio.create_task(reserve(counters, "r1"))
            for _ in range(5):  # turns of the loop: until it is on its way
                await asyncio.sleep(0)
            own_valkey.stop()
            with pytest.raises(Unavailable):
                await under_way
            with pytest.raises(Unavailable):
                await counters.settle("u", "r0", 5, NOON)
            own_valkey.start()
            again = await reserve(counters, "r2")
            assert (again.taken, again.levels[0].reserved) == (True, 10)

    own_valkey.run(told)


def test_a_restart_between_two_calls_is_not_noticed(own_valkey):
    async def told(redis):
        async with aclosing(Counters(redis, lease=600, timeout=5)) as counters:
            await reserve(counters, "r0")
            own_valkey.stop()
            own_valkey.start()
            assert (await reserve(counters, "r1")).taken

    own_valkey.run(told)


def test_flushed_scripts_are_sent_again(valkey):
    async def told(redis):
        async with aclosing(Counters(redis, lease=600, timeout=5)) as counters:
            for i in range(2):
                await redis.script_flush()
                one, two = await asyncio.gather(
                    reserve(counters, f"a{i}"), reserve(counters, f"b{i}")
                )
                assert (one.taken, two.taken) == (True, True)
                await redis.script_flush()
                assert await counters.settle("u", f"a{i}", 7, NOON) == 1

    valkey.run(told)


def test_a_server_that_refuses_to_write_is_away_too(own_valkey):
    async def told(redis):
        async with aclosing(Counters(redis, lease=600, timeout=5)) as counters:
            await redis.config_set("maxmemory", 1)
            with pytest.raises(Unavailable, match="maxmemory"):
                await reserve(counters, "r1")
            await redis.config_set("maxmemory", 0)
            assert (await reserve(counters, "r1")).taken

    own_valkey.run(told)


def test_one_bad_call_does_not_harm_its_neighbours(valkey):
    async def told(redis):
        async with aclosing(Pipeline(redis, timeout=5)) as pipeline:
            good, bad = (
                Script(text, "0" * 39 + str(n)) for n, text in enumerate(["return 1", "return x.y"])
            )
            answers = await asyncio.gather(
                *(pipeline.run(script, [], []) for script in (good, bad, good)),
                return_exceptions=True,
            )
            assert answers[0] == answers[2] == 1
            assert isinstance(answers[1], Unavailable)

    valkey.run(told)


def test_calls_go_out_together_and_in_order(valkey):
    async def told(redis):
        async with aclosing(Pipeline(redis, timeout=5)) as pipeline:
            count = Script("return redis.call('INCR', KEYS[1])", "0" * 40)
            assert await asyncio.gather(*(pipeline.run(count, ["n"], []) for _ in range(100))) == [
                *range(1, 101)
            ]

    valkey.run(told)


def test_who_waits_no_longer_is_not_sent(valkey):
    async def told(redis):
        async with aclosing(Pipeline(redis, timeout=5)) as pipeline:
            count = Script("return redis.call('INCR', KEYS[1])", "0" * 40)
            gone, stays = (pipeline.run(count, ["n"], []) for _ in range(2))
            gone.cancel()
            assert await stays == 1

    valkey.run(told)


def test_closing_waits_for_what_is_under_way(valkey):
    async def told(redis):
        async with aclosing(Counters(redis, lease=600, timeout=5)) as counters:
            await reserve(counters, "r0")
            charge = counters.settle("u", "r0", 7, NOON)
        assert charge.result() == 1

    valkey.run(told)
