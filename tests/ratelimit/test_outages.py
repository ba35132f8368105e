"""What callers see while the counters are away, and that they come back by themselves."""

import asyncio
import signal
import time
from contextlib import aclosing

import pytest

from parallama.errors import Unavailable
from parallama.limits import Limit, Unit, Window
from ratelimit import rules
from ratelimit.buckets import Buckets
from ratelimit.pipeline import Pipeline, Script

NOON = 1_700_049_600.0
MET = rules.buckets([Limit("*", "*", Unit.TOKENS, Window.HOUR, 1000)], "g", "m", NOON)


def reserve(buckets: Buckets, id: str):
    return buckets.reserve("u", id, 10, MET, NOON)


async def connections(redis) -> set[str]:
    return {client["id"] for client in await redis.client_list()}


def test_away_is_said_at_once(own_valkey):
    own_valkey.stop()

    async def told(redis):
        async with aclosing(Buckets(redis, lease=600, timeout=5)) as buckets:
            answers = await asyncio.gather(
                *(reserve(buckets, f"r{i}") for i in range(20)), return_exceptions=True
            )
            assert {type(answer) for answer in answers} == {Unavailable}

    begun = time.monotonic()
    own_valkey.run(told)
    assert time.monotonic() - begun < 4


def test_a_hung_server_costs_no_more_than_the_time_out(own_valkey):
    async def told(redis):
        async with aclosing(Buckets(redis, lease=600, timeout=0.1)) as buckets:
            await reserve(buckets, "r0")
            known = await connections(redis)
            own_valkey.pause(signal.SIGSTOP)
            begun = time.monotonic()
            first = asyncio.create_task(reserve(buckets, "r1"))
            await asyncio.sleep(0)  # the first is on its way; the others queue behind it
            answers = await asyncio.gather(
                first, *(reserve(buckets, f"q{i}") for i in range(5)), return_exceptions=True
            )
            waited = time.monotonic() - begun
            own_valkey.pause(signal.SIGCONT)
            assert {type(answer) for answer in answers} == {Unavailable}
            assert "no answer within 0.1 s" in str(answers[0])
            assert waited < 1
            assert (await reserve(buckets, "r2")).taken
            assert not known <= await connections(redis)  # one that says nothing may be dead

    own_valkey.run(told)


def test_killed_while_calls_run_and_started_again(own_valkey):
    async def told(redis):
        async with aclosing(Buckets(redis, lease=600, timeout=5)) as buckets:
            assert (await reserve(buckets, "r0")).taken
            own_valkey.pause(signal.SIGSTOP)
            under_way = asyncio.create_task(reserve(buckets, "r1"))
            for _ in range(5):  # turns of the loop: until it is on its way
                await asyncio.sleep(0)
            own_valkey.stop()
            with pytest.raises(Unavailable):
                await under_way
            with pytest.raises(Unavailable):
                await buckets.settle("u", "r0", 5, NOON)
            own_valkey.start()
            again = await reserve(buckets, "r2")
            assert (again.taken, again.levels[0].reserved) == (True, 10)

    own_valkey.run(told)


def test_a_restart_between_two_calls_is_not_noticed(own_valkey):
    async def told(redis):
        async with aclosing(Buckets(redis, lease=600, timeout=5)) as buckets:
            await reserve(buckets, "r0")
            own_valkey.stop()
            own_valkey.start()
            assert (await reserve(buckets, "r1")).taken

    own_valkey.run(told)


def test_flushed_scripts_are_sent_again(valkey):
    async def told(redis):
        async with aclosing(Buckets(redis, lease=600, timeout=5)) as buckets:
            for i in range(2):
                await redis.script_flush()
                one, two = await asyncio.gather(
                    reserve(buckets, f"a{i}"), reserve(buckets, f"b{i}")
                )
                assert (one.taken, two.taken) == (True, True)
                await redis.script_flush()
                assert await buckets.settle("u", f"a{i}", 7, NOON) == 1

    valkey.run(told)


def test_a_server_that_refuses_to_write_is_away_too(own_valkey):
    async def told(redis):
        async with aclosing(Buckets(redis, lease=600, timeout=5)) as buckets:
            await redis.config_set("maxmemory", 1)
            with pytest.raises(Unavailable, match="maxmemory"):
                await reserve(buckets, "r1")
            await redis.config_set("maxmemory", 0)
            assert (await reserve(buckets, "r1")).taken

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
        async with aclosing(Buckets(redis, lease=600, timeout=5)) as buckets:
            await reserve(buckets, "r0")
            charge = buckets.settle("u", "r0", 7, NOON)
        assert charge.result() == 1

    valkey.run(told)
