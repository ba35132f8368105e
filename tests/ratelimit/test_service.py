"""The service over a real socket, on a real Valkey."""

import asyncio
import json
import logging
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

from parallama import rpc
from parallama.counters import Counters
from parallama.db.ledger import Spending, Used
from parallama.db.policies import Policy
from parallama.errors import Unavailable
from parallama.limits import Grant, Limit, Unit, Window
from parallama.prices import Price, Prices
from ratelimit.charging import Charging
from ratelimit.estimate import Estimate
from ratelimit.outage import Outage
from ratelimit.rebuild import Rebuild
from ratelimit.service import SHOULD_RATE_LIMIT, RateLimit
from tests.ratelimit.calls import reserve_call, settle_call

NOON = 1_700_049_600.0


REQUESTS = Limit("*", "*", Unit.REQUESTS, Window.MINUTE, 1)
TOKENS = Limit("*", "*", Unit.TOKENS, Window.DAY, 1000)
ESTIMATE = partial(Estimate, bytes_per_token=4, default_max_tokens=512)
OK, OVER = RateLimitResponse.OK, RateLimitResponse.OVER_LIMIT


class Gateway:
    """Asks as Envoy does."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = RateLimitServiceStub(channel)
        self.now = NOON
        self.monotonic = 0.0
        self.limits: tuple[Limit, ...] | Exception = ()
        self.remembers = True
        self.grants: tuple[Grant, ...] = ()
        self.prices: tuple[Price, ...] = ()
        self.rows: list[Used] = []
        self.stored: tuple[str, ...] = ()
        self.asked: list[tuple[float, float]] = []
        self.service: RateLimit
        self.outage: Outage

    def known(self, user: str) -> Policy | None:
        known = self.remembers and not isinstance(self.limits, Exception)
        return self.policy() if known else None

    async def policy_of(self, user: str) -> Policy:
        if isinstance(self.limits, Exception):
            raise self.limits
        return self.policy()

    def policy(self) -> Policy:
        assert not isinstance(self.limits, Exception)
        return Policy(self.limits, self.grants)

    async def prices_of(self) -> tuple[Price, ...]:
        return self.prices

    async def spending(self, user, spans, recent) -> Spending:
        assert (recent[1] - recent[0]).total_seconds() == 3660
        self.asked += [(start.timestamp(), end.timestamp()) for start, end in spans]
        return Spending((tuple(self.rows),) * len(spans), self.stored)

    async def reserve(self, id="r1", **entries) -> RateLimitResponse:
        return await self._stub.ShouldRateLimit(reserve_call(id, **entries), timeout=10)

    async def settle(self, id="r1", used=0, **entries) -> RateLimitResponse:
        return await self._stub.ShouldRateLimit(settle_call(id, used, **entries), timeout=10)


@asynccontextmanager
async def serving(redis, *, away="deny", hard=False, processes=1) -> AsyncIterator[Gateway]:
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{Path(folder) / 's'}"
        async with grpc.aio.insecure_channel(address) as channel:
            gateway = Gateway(channel)
            counters = Counters(redis, lease=600, timeout=5)
            service = serve(counters, gateway, away=away, hard=hard, processes=processes)
            server = rpc.Server({SHOULD_RATE_LIMIT: service.should_rate_limit})
            await server.start(address.removeprefix("unix:"))
            try:
                yield gateway
            finally:
                await server.stop(1)
                await service.aclose()
                await counters.aclose()


def serve(counters, gateway, *, away="deny", hard=False, processes=1) -> RateLimit:
    gateway.outage = Outage(
        {"openai": away, "ollama": "deny"}, processes=processes, monotonic=lambda: gateway.monotonic
    )
    clock = lambda: gateway.now  # noqa: E731
    rebuild = Rebuild(counters, gateway.spending)
    gateway.service = RateLimit(
        counters,
        gateway,
        clock=clock,
        zone=UTC,
        estimate=ESTIMATE(),
        prices=Prices(gateway.prices_of),
        rebuild=rebuild,
        charging=Charging(counters, gateway, rebuild, clock=clock, zone=UTC),
        outage=gateway.outage,
        hard=hard,
    )
    return gateway.service


def headers(response: RateLimitResponse) -> dict[str, str]:
    return {header.key: header.value for header in response.response_headers_to_add}


def test_reserve_then_settle(valkey):
    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (TOKENS,)
            first = await gateway.reserve("r1")
            assert first.overall_code == OK
            told = dict(first.dynamic_metadata)
            why = json.loads(f"{{{told.pop('decision')}}}")
            assert told == {"reservation": "r1", "granted": 200, "tokens_left": 800}
            assert why == {
                "policy_at": 0.0,
                "limit": "1000 tokens per day",
                "used": 0,
                "held": 200,
                "needs": 200,
                "ends": gateway.now + 12 * 3600,
            }
            assert (await gateway.settle("r1", 42)).overall_code == OK
            second = await gateway.reserve("r2")
            assert headers(second)["x-ratelimit-remaining-tokens"] == str(1000 - 42 - 200)
            assert headers(second)["x-ratelimit-reset-tokens"] == "12h0m0s"

    valkey.run(told)


def test_without_a_limit_no_counter_is_needed(own_valkey):
    own_valkey.stop()

    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (Limit("ollama", "*", Unit.REQUESTS, Window.DAY, 0),)
            answer = await gateway.reserve()
            assert answer.overall_code == OK
            told = dict(answer.dynamic_metadata)
            assert told == {"reservation": "r1", "granted": 0, "decision": '"away":"redis"'}

    own_valkey.run(told)


def test_refused_in_the_dialect_of_the_caller(valkey):
    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (REQUESTS,)
            gateway.now = NOON + 12
            assert (await gateway.reserve("r1")).overall_code == OK
            over = await gateway.reserve("r2")
            assert over.overall_code == OVER
            assert headers(over)["retry-after"] == "48"
            assert json.loads(over.raw_body)["error"]["code"] == "rate_limit_exceeded"
            ollama = json.loads((await gateway.reserve("r3", dialect="ollama")).raw_body)
            assert ollama == {
                "error": "You have reached your limit of 1 request per minute. "
                "It resets in 48s: try again then."
            }

    valkey.run(told)


@pytest.mark.parametrize(
    ("limit", "says", "tries"),
    [
        pytest.param(REQUESTS, "reached your limit of 1 request per minute", 2, id="minute"),
        pytest.param(
            Limit("*", "smol*", Unit.REQUESTS, Window.DAY, 1),
            "used up your limit of 1 request per day for model smol*", 1, id="day",
        ),
        pytest.param(
            Limit("*", "*", Unit.TOKENS, Window.MINUTE, 0), "no allowance for tokens", 1, id="zero"
        ),
    ],
)  # fmt: skip
def test_the_openai_client_raises_a_readable_rate_limit_error(valkey, limit, says, tries):
    """And tries again only where waiting can help."""

    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (limit,)
            gateway.now = NOON + 59.5  # so that obeying retry-after takes a second
            await gateway.reserve("r1")
            return await gateway.reserve("r2")

    over = valkey.run(told)
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(429, headers=headers(over), content=over.raw_body)

    with (
        httpx.Client(transport=httpx.MockTransport(answer)) as transport,
        openai.OpenAI(
            api_key="k", base_url="http://x/v1", http_client=transport, max_retries=1
        ) as client,
        pytest.raises(openai.RateLimitError, match=says),
    ):
        client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": ""}])
    assert len(asked) == tries


def test_fifty_at_once_against_ten(valkey):
    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (Limit("*", "*", Unit.REQUESTS, Window.DAY, 10),)
            answers = await asyncio.gather(*(gateway.reserve(f"r{i}") for i in range(50)))
            assert [answer.overall_code for answer in answers].count(OK) == 10

    valkey.run(told)


def test_a_call_that_comes_alone_is_answered_as_any_other(valkey):
    """Redis is nudged before it, and its answer is rehearsed: nobody is told of either."""

    async def told(redis):
        async with serving(redis, hard=True) as gateway:
            gateway.limits = (Limit("*", "*", Unit.REQUESTS, Window.DAY, 5), TOKENS)

            async def eight(user: str, apart: float) -> tuple[list[RateLimitResponse], int]:
                answers, before = [], await runs(redis)
                for i in range(8):
                    gateway.now += apart
                    answers.append(await gateway.reserve(f"r{i}", user=user, max_tokens="9"))
                    del answers[-1].dynamic_metadata.fields["decision"]  # the time is in it
                return answers, await runs(redis) - before

            close, asked = await eight("one", 0)
            apart, asked_too = await eight("another", 0.01)
            assert apart == close
            assert {answer.overall_code for answer in close} == {OK, OVER}
            assert asked_too == asked + 8

    valkey.run(told)


async def runs(redis) -> int:
    """How many scripts."""
    return int((await redis.info("commandstats")).get("cmdstat_evalsha", {"calls": 0})["calls"])


@pytest.mark.parametrize("entries", [{"user": ""}, {"body_bytes": "x"}, {"dialect": "?"}])
def test_what_is_not_understood_fails_closed(valkey, caplog, entries):
    async def told(redis):
        async with serving(redis, away="allow") as gateway:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await gateway.reserve(**entries)
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    valkey.run(told)
    assert "rate limit call not understood" in caplog.messages


def test_away_and_deny(own_valkey, caplog):
    caplog.set_level(logging.INFO, "ratelimit")

    async def told(redis):
        async with serving(redis, away="deny") as gateway:
            gateway.limits = (TOKENS,)
            own_valkey.stop()
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await gateway.reserve()
                assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            own_valkey.start()
            # Nobody asks again at once: who waits for a server that is away is enough.
            with pytest.raises(grpc.aio.AioRpcError):
                await gateway.reserve()
            gateway.monotonic += 0.5
            assert (await gateway.reserve()).overall_code == OK

    own_valkey.run(told)
    assert caplog.messages == ["limits not checked", "limits checked again"]


def test_away_and_allow(own_valkey, caplog):
    caplog.set_level(logging.INFO, "ratelimit")

    async def told(redis):
        async with serving(redis, away="allow") as gateway:
            gateway.limits = (TOKENS,)
            for _ in range(2):
                own_valkey.stop()
                for i in range(3):
                    answer = await gateway.reserve(f"r{i}")
                    assert answer.overall_code == OK
                    assert "tokens_left" not in dict(answer.dynamic_metadata)
                own_valkey.start()
                gateway.monotonic += 0.5
                assert "tokens_left" in dict((await gateway.reserve("r9")).dynamic_metadata)

    own_valkey.run(told)
    assert caplog.messages == ["limits not checked", "limits checked again"] * 2


def test_limits_that_cannot_be_read_follow_the_same_policy(valkey):
    async def told(redis):
        async with serving(redis, away="deny") as gateway:
            gateway.limits = Unavailable("the database is away")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await gateway.reserve()
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "database" not in (error.value.details() or "")

    valkey.run(told)


def test_what_redis_could_not_be_told_is_owed_and_paid(own_valkey, caplog):
    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (TOKENS,)
            await gateway.reserve("r0")
            await gateway.reserve("r1")
            own_valkey.stop()
            await gateway.settle("r0", 0)  # nothing is owed for it
            assert (await gateway.settle("r1", 42)).overall_code == OK
            await until(lambda: gateway.outage.owed)
            own_valkey.start()
            await pay(gateway)
            gateway.monotonic += 0.5
            # The server came back empty: what it is told it charges all the same.
            answer = await gateway.reserve("r2")
            assert headers(answer)["x-ratelimit-remaining-tokens"] == str(1000 - 42 - 200)

    own_valkey.run(told)
    assert "charges wait for redis" in caplog.messages


async def pay(gateway: Gateway) -> None:
    """Until nothing is owed."""
    paying = asyncio.create_task(
        gateway.outage.pay(gateway.service.settle, pause=lambda: asyncio.sleep(0.001))
    )
    await until(lambda: not gateway.outage.owed)
    paying.cancel()
    await gateway.service.aclose()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def test_local_gives_out_what_was_left_and_no_more(own_valkey):
    async def told(redis):
        async with serving(redis, away="local", processes=2) as gateway:
            gateway.limits = (TOKENS,)
            await gateway.reserve("r0", max_tokens="100")  # 200 are held of 1000
            own_valkey.stop()
            answers = [await gateway.reserve(f"r{i}") for i in range(1, 6)]
            # Half of the 800 that were left is this process's: two calls of 200.
            assert [answer.overall_code for answer in answers] == [OK, OK, OVER, OVER, OVER]
            assert headers(answers[2])["retry-after"] == "5"
            await gateway.settle("r1", 20)
            assert (await gateway.reserve("r6", max_tokens="50")).overall_code == OK
            ollama = gateway.reserve("r7", gateway="ollama", dialect="ollama")
            with pytest.raises(grpc.aio.AioRpcError):
                await ollama
            own_valkey.start()
            await gateway.settle("r2", 30)
            gateway.monotonic += 0.5
            await pay(gateway)
            answer = await gateway.reserve("r8")
            assert headers(answer)["x-ratelimit-remaining-tokens"] == str(1000 - 20 - 30 - 200)

    own_valkey.run(told)


def test_counters_that_were_lost_are_rebuilt_from_the_rows(own_valkey):
    """And calls that ran meanwhile are charged once, also those whose row was in the sums."""

    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (TOKENS, Limit("*", "*", Unit.REQUESTS, Window.MONTH, 50))
            await gateway.reserve("running")
            own_valkey.flush()
            gateway.asked.clear()
            gateway.rows = [
                Used("openai", "smollm2", "k1", None, 7, 300, 0.0, Decimal(0)),
                Used("ollama", None, None, None, 1, 11, 0.0, Decimal(0)),
            ]
            gateway.stored = ("stored",)
            answers = await asyncio.gather(*(gateway.reserve(f"r{i}") for i in range(4)))
            left = {headers(answer)["x-ratelimit-remaining-tokens"] for answer in answers}
            assert sum(answer.overall_code == OK for answer in answers) == 3
            assert min(map(int, left)) == 1000 - 311 - 600
            month = [datetime(2023, at, 1, tzinfo=UTC).timestamp() for at in (11, 12)]
            day = (NOON - 12 * 3600, NOON + 12 * 3600)
            assert sorted(gateway.asked) == [tuple(month), day]  # once for all
            await gateway.settle("running", 40)
            await gateway.settle("stored", 500)
            await gateway.settle("r0", 0)
            await gateway.service.aclose()
            answer = await gateway.reserve("last", max_tokens="1", body_bytes="4")
            assert headers(answer)["x-ratelimit-remaining-requests"] == str(50 - 8 - 3 - 1 - 1)

    own_valkey.run(told)


def test_what_was_spent_of_a_grant_is_rebuilt_too(own_valkey):
    """The rows say what a grant paid for: that is in its count, and in no limit's of its unit."""

    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (
                Limit("*", "*", Unit.TOKENS, Window.MINUTE, 250),
                Limit("*", "*", Unit.TOKENS, Window.MONTH, 5000),
                Limit("*", "*", Unit.REQUESTS, Window.DAY, 9),
            )
            gateway.grants = (
                Grant("g1", "*", "*", Unit.TOKENS, 300, NOON - 9, NOON + 9000),
                Grant("g2", "*", "*", Unit.TOKENS, 700, NOON - 9, NOON + 90_000),
                Grant("over", "*", "*", Unit.TOKENS, 10**6, NOON - 90, NOON - 9),
            )
            own_valkey.flush()
            gateway.rows = [
                Used("openai", "smollm2", None, None, 2, 260, 0.0, Decimal(0)),
                Used("openai", "smollm2", None, "tokens:g1", 3, 300, 0.0, Decimal(0)),
                Used("openai", "smollm2", None, "tokens:g2,requests:gone", 1, 450, 0.0, Decimal(0)),
            ]
            answer = await gateway.reserve("r1")  # 200, for which g1 has no room, and g2 has
            facts = dict(answer.dynamic_metadata)
            assert (facts["grants"], facts["tokens_left"]) == ("tokens:g2", 700 - 450 - 200)
            assert headers(answer)["x-ratelimit-remaining-requests"] == str(9 - 5 - 1)
            assert (await gateway.reserve("r2")).overall_code == OVER
            gateway.grants = ()
            gateway.now = NOON + 60
            answer = await gateway.reserve("r3")
            gateway.limits = gateway.limits[1:2]
            answer = await gateway.reserve("r4")
            left = headers(answer)["x-ratelimit-remaining-tokens"]
            assert left == str(5000 - 260 - 400)

    own_valkey.run(told)


def test_a_new_limit_counts_what_was_used_in_its_window_before(valkey):
    """Also of a user who has been known for long."""

    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (REQUESTS,)
            gateway.now = NOON - 86400
            await gateway.reserve("r0")
            gateway.now = NOON
            gateway.rows = [Used("openai", "smollm2", None, None, 7, 300, 0.0, Decimal(0))]
            new = replace(TOKENS, set_at=NOON - 5)
            gateway.limits = (new,)
            answer = await gateway.reserve("r1")
            assert headers(answer)["x-ratelimit-remaining-tokens"] == str(1000 - 300 - 200)
            assert len(gateway.asked) == 2
            await gateway.reserve("r2")
            assert len(gateway.asked) == 2  # it is known now

    valkey.run(told)


def test_a_grant_is_used_when_a_limit_is_full(valkey):
    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (Limit("*", "*", Unit.TOKENS, Window.DAY, 250),)
            gateway.grants = (Grant("g1", "*", "*", Unit.TOKENS, 300, NOON - 9, NOON + 9000),)
            first = await gateway.reserve("r1")
            assert headers(first)["x-ratelimit-limit-tokens"] == "250"
            second = await gateway.reserve("r2")
            assert headers(second)["x-ratelimit-limit-tokens"] == "300"
            paid = [dict(answer.dynamic_metadata).get("grants") for answer in (first, second)]
            assert paid == [None, "tokens:g1"]
            third = await gateway.reserve("r3")
            assert third.overall_code == OVER
            assert b"limit of 250 tokens per day" in third.raw_body
            await gateway.settle("r2", 10)
            assert (await gateway.reserve("r4")).overall_code == OK

    valkey.run(told)


def test_money_is_held_by_the_price_of_the_model(valkey):
    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (Limit("*", "*", Unit.COST, Window.DAY, 10**9),)
            gateway.prices = (Price("smollm2", Decimal(1000), Decimal(4000)),)
            # 100 for the prompt cost 0.1, and 100 for the answer 0.4.
            answers = [await gateway.reserve(f"r{i}") for i in range(3)]
            assert [answer.overall_code for answer in answers] == [OK, OK, OVER]
            assert b"your limit of 1 of cost per day" in answers[2].raw_body
            free = await gateway.reserve("r9", model="another")
            assert free.overall_code == OVER

    valkey.run(told)


def test_hard_caps_the_answer_at_what_is_left(valkey):
    async def told(redis):
        async with serving(redis, hard=True) as gateway:
            gateway.limits = (TOKENS,)
            learned = {"body_bytes": "400", "prompt_reported": "100"}
            await gateway.reserve("r0", max_tokens="50")
            await gateway.settle("r0", 150, **learned)
            capped = [await gateway.reserve(f"r{i}", max_tokens="") for i in (1, 2)]
            caps = [dict(answer.dynamic_metadata).get("cap") for answer in capped]
            # The usual length is 50 by now, so that both have room.
            assert caps == ["50", "50"]
            last = await gateway.reserve("r3", max_tokens="5000")
            told = dict(last.dynamic_metadata)
            assert (told["granted"], told["cap"]) == (1000 - 150 - 300, str(550 - 100))
            assert (await gateway.reserve("r4")).overall_code == OVER

    valkey.run(told)


def test_a_shadow_limit_is_told_and_refuses_nothing(valkey, caplog):
    caplog.set_level(logging.INFO, "ratelimit")

    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (replace(REQUESTS, shadow=True),)
            answers = [await gateway.reserve(f"r{i}") for i in range(3)]
            assert [answer.overall_code for answer in answers] == [OK] * 3
            told = [dict(answer.dynamic_metadata).get("would_refuse") for answer in answers]
            assert told == [None, "1 request per minute", "1 request per minute"]

    valkey.run(told)
    assert caplog.messages == ["would be refused"] * 2


@pytest.mark.parametrize("known", [True, False], ids=["limits known", "limits asked for"])
def test_a_client_that_leaves_while_we_ask_holds_nothing(own_valkey, known):
    """Called without a socket: only so is it certain what has happened when it leaves."""

    async def told(redis):
        async with aclosing(Counters(redis, lease=600, timeout=5)) as counters:
            async with grpc.aio.insecure_channel("unix:none") as channel:
                gateway = Gateway(channel)
            gateway.limits = (TOKENS,)
            gateway.remembers = known
            service = serve(counters, gateway)

            async def ask(id) -> RateLimitResponse:
                request = reserve_call(id).SerializeToString()
                return RateLimitResponse.FromString(await service.should_rate_limit(request))

            await ask("r0")
            own_valkey.pause(signal.SIGSTOP)
            request = reserve_call("r1").SerializeToString()
            answer = service.should_rate_limit(request)
            assert isinstance(answer, rpc.Later) is known
            if isinstance(answer, rpc.Later):  # as rpc.Server does it: see test_rpc.py
                own_valkey.pause(signal.SIGCONT)
                await asyncio.wait([answer.asked])
                service.untaken(request)
            else:
                leaving = asyncio.ensure_future(answer)
                for _ in range(5):  # turns of the loop: until the question is on its way
                    await asyncio.sleep(0)
                leaving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
                own_valkey.pause(signal.SIGCONT)
            after = await ask("r2")
            assert headers(after)["x-ratelimit-remaining-tokens"] == str(1000 - 2 * 200)

    own_valkey.run(told)
