"""The service over a real socket, on a real Valkey."""

import asyncio
import json
import logging
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

from parallama import rpc
from parallama.errors import Unavailable
from parallama.limits import Limit, Unit, Window
from ratelimit.buckets import Buckets
from ratelimit.estimate import Estimate
from ratelimit.service import SHOULD_RATE_LIMIT, RateLimit

NOON = 1_700_049_600.0
REQUESTS = Limit("*", "*", Unit.REQUESTS, Window.MINUTE, 1)
TOKENS = Limit("*", "*", Unit.TOKENS, Window.DAY, 1000)
ESTIMATE = partial(Estimate, bytes_per_token=4, default_max_tokens=512)
OK, OVER = RateLimitResponse.OK, RateLimitResponse.OVER_LIMIT


def reserve_call(id, **entries) -> RateLimitRequest:
    known = {
        "user": "u1", "gateway": "openai", "dialect": "openai", "model": "smollm2",
        "endpoint": "/v1/chat/completions", "max_tokens": "100", "body_bytes": "400",
    }  # fmt: skip
    return call({**known, "request_id": id, **entries})


def settle_call(id, used) -> RateLimitRequest:
    settle = call({"user": "u1", "reservation": id})
    settle.descriptors[0].hits_addend.value = used
    return settle


def call(entries) -> RateLimitRequest:
    request = RateLimitRequest(domain="parallama")
    descriptor = request.descriptors.add()
    for key, value in entries.items():
        descriptor.entries.add(key=key, value=value)
    return request


class Gateway:
    """Asks as Envoy does."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = RateLimitServiceStub(channel)
        self.now = NOON
        self.limits: tuple[Limit, ...] | Exception = ()

    def peek(self, user: str) -> tuple[Limit, ...] | None:
        return None if isinstance(self.limits, Exception) else self.limits

    async def limits_of(self, user: str) -> tuple[Limit, ...]:
        if isinstance(self.limits, Exception):
            raise self.limits
        return self.limits

    async def reserve(self, id="r1", **entries) -> RateLimitResponse:
        return await self._stub.ShouldRateLimit(reserve_call(id, **entries), timeout=10)

    async def settle(self, id="r1", used=0) -> RateLimitResponse:
        return await self._stub.ShouldRateLimit(settle_call(id, used), timeout=10)


@asynccontextmanager
async def serving(redis, *, when_down="deny") -> AsyncIterator[Gateway]:
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{Path(folder) / 's'}"
        async with grpc.aio.insecure_channel(address) as channel:
            gateway = Gateway(channel)
            buckets = Buckets(redis, lease=600, timeout=5)
            service = RateLimit(
                buckets,
                gateway,
                clock=lambda: gateway.now,
                estimate=ESTIMATE(),
                when_down=when_down,
            )
            server = rpc.Server({SHOULD_RATE_LIMIT: service.should_rate_limit})
            await server.start(address.removeprefix("unix:"))
            try:
                yield gateway
            finally:
                await server.stop(1)
                await buckets.aclose()


def headers(response: RateLimitResponse) -> dict[str, str]:
    return {header.key: header.value for header in response.response_headers_to_add}


def test_reserve_then_settle(valkey):
    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (TOKENS,)
            first = await gateway.reserve("r1")
            assert first.overall_code == OK
            assert dict(first.dynamic_metadata) == {
                "reservation": "r1",
                "granted": 200,
                "tokens_left": 800,
            }
            assert (await gateway.settle("r1", 42)).overall_code == OK
            second = await gateway.reserve("r2")
            assert headers(second)["x-ratelimit-remaining-tokens"] == str(1000 - 42 - 200)
            assert headers(second)["x-ratelimit-reset-tokens"] == "12h0m0s"

    valkey.run(told)


def test_without_a_limit_no_store_is_asked(own_valkey):
    own_valkey.stop()

    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (Limit("ollama", "*", Unit.REQUESTS, Window.DAY, 0),)
            assert await gateway.reserve() == RateLimitResponse(overall_code=OK)

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


@pytest.mark.parametrize("entries", [{"user": ""}, {"body_bytes": "x"}, {"dialect": "?"}])
def test_what_is_not_understood_fails_closed(valkey, caplog, entries):
    async def told(redis):
        async with serving(redis, when_down="allow") as gateway:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await gateway.reserve(**entries)
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    valkey.run(told)
    assert "rate limit call not understood" in caplog.messages


def test_away_and_deny(own_valkey, caplog):
    caplog.set_level(logging.INFO, "ratelimit")

    async def told(redis):
        async with serving(redis, when_down="deny") as gateway:
            gateway.limits = (TOKENS,)
            own_valkey.stop()
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await gateway.reserve()
                assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            own_valkey.start()
            assert (await gateway.reserve()).overall_code == OK

    own_valkey.run(told)
    assert caplog.messages == ["limits not checked", "limits checked again"]


def test_away_and_allow(own_valkey, caplog):
    caplog.set_level(logging.INFO, "ratelimit")

    async def told(redis):
        async with serving(redis, when_down="allow") as gateway:
            gateway.limits = (TOKENS,)
            for _ in range(2):
                own_valkey.stop()
                for _ in range(3):
                    assert await gateway.reserve() == RateLimitResponse(overall_code=OK)
                own_valkey.start()
                assert (await gateway.reserve()).HasField("dynamic_metadata")

    own_valkey.run(told)
    assert caplog.messages == ["limits not checked", "limits checked again"] * 2


def test_limits_that_cannot_be_read_follow_the_same_policy(valkey):
    async def told(redis):
        async with serving(redis, when_down="deny") as gateway:
            gateway.limits = Unavailable("the database is away")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await gateway.reserve()
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "database" not in (error.value.details() or "")

    valkey.run(told)


def test_a_lost_charge_is_told(own_valkey, caplog):
    async def told(redis):
        async with serving(redis) as gateway:
            gateway.limits = (TOKENS,)
            await gateway.reserve("r0")
            await gateway.reserve("r1")
            own_valkey.stop()
            await gateway.settle("r0", 0)  # nothing is lost with it
            assert (await gateway.settle("r1", 42)).overall_code == OK

    own_valkey.run(told)
    (lost,) = [record for record in caplog.records if record.getMessage() == "charge lost"]
    assert (lost.user, lost.reservation, lost.tokens) == ("u1", "r1", 42)


def test_a_client_that_leaves_while_we_ask_holds_nothing(own_valkey):
    """Called without a socket: only so is it certain what has happened when it is cancelled."""

    class Known:
        def peek(self, user):
            return (TOKENS,)

        async def limits_of(self, user):
            return (TOKENS,)

    async def told(redis):
        async with aclosing(Buckets(redis, lease=600, timeout=5)) as buckets:
            service = RateLimit(
                buckets, Known(), clock=lambda: NOON, estimate=ESTIMATE(), when_down="deny"
            )

            async def ask(id) -> RateLimitResponse:
                request = reserve_call(id).SerializeToString()
                return RateLimitResponse.FromString(await service.should_rate_limit(request))

            await ask("r0")
            own_valkey.pause(signal.SIGSTOP)
            leaving = asyncio.create_task(ask("r1"))
            for _ in range(5):  # turns of the loop: until the question is on its way
                await asyncio.sleep(0)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            own_valkey.pause(signal.SIGCONT)
            after = await ask("r2")
            assert headers(after)["x-ratelimit-remaining-tokens"] == str(1000 - 2 * 200)

    own_valkey.run(told)
