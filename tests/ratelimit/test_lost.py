"""Calls whose end nobody told, on a real Valkey and a real database."""

import asyncio
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime

import pytest

from parallama.counters import Call, Counters
from parallama.errors import Unavailable
from parallama.limits import Limit, Unit, Window
from parallama.usage import Spent
from ratelimit import rules
from ratelimit.lost import Finder

NOON = 1_700_049_600.0
LEASE = 60
LIMITS = [
    Limit("*", "*", Unit.TOKENS, Window.HOUR, 1000),
    Limit("*", "*", Unit.COST, Window.DAY, 10**9),
]


class Ledger:
    """Rows by request id, and whether the database is away."""

    def __init__(self) -> None:
        self.rows = {}
        self.spent = {}
        self.charged = []
        self.away = False

    async def add_lost(self, records) -> int:
        if self.away:
            raise Unavailable("the database is away")
        new = [row for row in records if row.request_id not in {**self.rows, **self.spent}]
        self.rows |= {row.request_id: row for row in new}
        return len(new)

    async def spent_by(self, ids, since):
        assert since < datetime.fromtimestamp(NOON, UTC)
        return {id: told for id, told in self.spent.items() if id in ids}

    async def charge(self, call, spent):
        self.charged.append((call.request_id, spent))

    async def name_of(self, user):
        return {"u": "anna"}.get(user)


@asynccontextmanager
async def finding(redis):
    async with aclosing(Counters(redis, lease=LEASE, timeout=5)) as counters:
        ledger = Ledger()
        finder = Finder(
            counters,
            ledger.add_lost,
            ledger.spent_by,
            ledger.charge,
            ledger.name_of,
            clock=lambda: finder.now,
        )
        finder.now = NOON
        yield counters, ledger, finder


async def reserve(counters, id, user="u"):
    met = rules.buckets(LIMITS, "ollama", "m", "k", NOON)
    need = rules.Need(10, 90, 0, 5000)
    call = Call(id, user, "k", "ollama", "ollama", "/api/chat", "m", NOON)
    holds = [at.hold(need.of(at.limit.unit)) for at in met]
    await counters.begin(user, 0)
    taken = Counters.taken(await counters.reserve(call, holds, tokens=100, least=0, now=NOON))
    return [(level.used, level.reserved) for level in taken.levels]


def test_a_call_without_an_end_becomes_a_row(valkey, caplog):
    async def told(redis):
        async with finding(redis) as (counters, ledger, finder):
            await reserve(counters, "r1")
            assert await finder.look() == 0
            finder.now += LEASE
            assert await finder.look() == 1
            row = ledger.rows["r1"]
            assert (row.token_source, row.tokens_used, row.finished) == ("unknown", 0, False)
            assert (row.username, row.key_id, row.gateway) == ("anna", "k", "ollama")
            assert (row.endpoint, row.model_name) == ("/api/chat", "m")
            assert row.timestamp == datetime.fromtimestamp(NOON, UTC)
            assert await reserve(counters, "r2") == [(0, 100), (0, 5000)]
            finder.now += 10 * LEASE
            assert await finder.look() == 1  # r2

    valkey.run(told)
    assert "requests without an end became rows" in caplog.messages


def test_one_that_was_settled_keeps_its_tokens(valkey):
    async def told(redis):
        async with finding(redis) as (counters, ledger, finder):
            await reserve(counters, "r1", user="gone")
            await counters.settle("gone", "r1", 42, NOON + 5)
            finder.now += 5 + LEASE
            assert await finder.look() == 1
            assert ledger.rows["r1"].tokens_used == 42
            assert ledger.rows["r1"].username == "gone"

    valkey.run(told)


def test_one_that_has_a_row_is_charged_by_it(valkey):
    """usage_sink was killed after it had stored the row, before it could tell the counters."""

    async def told(redis):
        async with finding(redis) as (counters, ledger, finder):
            await reserve(counters, "r1")
            ledger.spent["r1"] = Spent(42, cost=1000)
            finder.now += LEASE
            assert await finder.look() == 0
            assert ledger.rows == {}
            assert await reserve(counters, "r2") == [(42, 100), (1000, 5000)]

    valkey.run(told)


def test_one_that_is_in_no_bucket_is_charged_by_its_row(valkey):
    """The counters were lost and built anew before its row was stored."""

    async def told(redis):
        async with finding(redis) as (counters, ledger, finder):
            await counters.begin("u", NOON + 5)
            late = Call("r1", "u", "k", "ollama", "ollama", "/api/chat", "m", NOON)
            ledger.spent["r1"] = Spent(42, 7, 1000)
            await counters.close("u", "r1", Spent(42), began=NOON, now=NOON + 6, late=late)
            finder.now += 6
            assert await finder.look() == 0
            assert (ledger.charged, ledger.rows) == ([("r1", ledger.spent["r1"])], {})

    valkey.run(told)


def test_a_lost_call_that_a_grant_paid_for_says_so(valkey):
    async def told(redis):
        async with finding(redis) as (counters, ledger, finder):
            call = Call("r1", "u", "k", "ollama", "ollama", "/api/chat", "m", NOON, "tokens:g1")
            await counters.begin("u", 0)
            await counters.reserve(call, [], tokens=1, least=0, now=NOON)
            finder.now += LEASE
            assert await finder.look() == 1
            assert ledger.rows["r1"].grants == "tokens:g1"

    valkey.run(told)


def test_while_the_database_is_away_nothing_is_forgotten(valkey):
    async def told(redis):
        async with finding(redis) as (counters, ledger, finder):
            await reserve(counters, "r1")
            ledger.away = True
            finder.now += LEASE
            with pytest.raises(Unavailable):
                await finder.look()
            ledger.away = False
            finder.now += LEASE
            running = asyncio.create_task(finder.run(lambda: asyncio.sleep(0)))
            async with asyncio.timeout(5):
                while "r1" not in ledger.rows:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            running.cancel()

    valkey.run(told)
