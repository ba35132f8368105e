"""How every service lives and leaves, as a real process."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING

# A service whose one call counts what it is sent, and lasts as long as the client wants.
PROGRAM = """
import asyncio, sys
from parallama import daemon, rpc
from parallama.errors import ParallamaError

async def count(messages):
    return bytes([len([message async for message in messages])])

async def main():
    server = rpc.Server({}, {"/test.Counter/Count": count})
    await daemon.run_until_stopped(server, listen=sys.argv[1], grace=float(sys.argv[2]))
    print("clean-up ran", flush=True)

try:
    asyncio.run(main())
except ParallamaError as error:
    sys.exit(f"test: {error}")
"""


@pytest.fixture
def listen() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "s.sock"


@asynccontextmanager
async def service(listen: Path, *, grace: float = 10) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, str(listen), str(grace)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


Story = Callable[[asyncio.subprocess.Process, grpc.aio.Channel], Awaitable[None]]


def told(listen: Path, story: Story, *, grace: float = 10) -> None:
    """Run `story` once the service serves. It has ended well by the end of the story."""

    async def story_and_end() -> None:
        async with (
            asyncio.timeout(30),
            service(listen, grace=grace) as process,
            grpc.aio.insecure_channel(f"unix:{listen}") as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            now = await health.Check(request, wait_for_ready=True)
            assert now.status == SERVING
            await story(process, channel)
            assert await process.wait() == 0
            assert process.stdout is not None
            assert await process.stdout.read() == b"clean-up ran\n"

    asyncio.run(story_and_end())


def count(channel: grpc.aio.Channel) -> grpc.aio.StreamUnaryCall:
    return channel.stream_unary("/test.Counter/Count")()


async def gone(listen: Path) -> None:
    """Return once nobody listens any more."""
    while True:
        try:
            _, writer = await asyncio.open_unix_connection(listen)
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except BlockingIOError:  # its backlog is full: it listens
            continue
        writer.close()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_exit_code_0(listen: Path, signum: signal.Signals) -> None:
    async def story(process: asyncio.subprocess.Process, channel: grpc.aio.Channel) -> None:
        process.send_signal(signum)

    told(listen, story)


def test_it_takes_no_new_calls_while_a_running_one_still_ends(listen: Path) -> None:
    async def story(process: asyncio.subprocess.Process, channel: grpc.aio.Channel) -> None:
        call = count(channel)
        await call.write(b"before")
        process.terminate()
        await gone(listen)
        apart = [("grpc.use_local_subchannel_pool", 1)]  # not the connection of the call that runs
        async with grpc.aio.insecure_channel(f"unix:{listen}", options=apart) as late:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await health_pb2_grpc.HealthStub(late).Check(health_pb2.HealthCheckRequest())
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await call.write(b"after")
        await call.done_writing()
        assert await call == bytes([2])

    told(listen, story)


def test_a_call_that_does_not_end_is_cut_after_the_grace(listen: Path) -> None:
    async def story(process: asyncio.subprocess.Process, channel: grpc.aio.Channel) -> None:
        call = count(channel)
        await call.write(b"x")
        begun = time.monotonic()
        process.terminate()
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert 0.1 < time.monotonic() - begun < 5

    told(listen, story, grace=0.2)


def test_the_socket_of_one_that_was_killed_is_replaced(listen: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(listen))
    stale.close()
    assert listen.exists()

    async def story(process: asyncio.subprocess.Process, channel: grpc.aio.Channel) -> None:
        process.terminate()

    told(listen, story)


def test_only_its_own_user_may_connect(listen: Path) -> None:
    modes = []

    async def story(process: asyncio.subprocess.Process, channel: grpc.aio.Channel) -> None:
        modes.append(os.stat(listen).st_mode & 0o777)
        process.terminate()

    told(listen, story)
    assert modes == [0o600]


def test_where_it_cannot_listen_it_says_so(listen: Path) -> None:
    nowhere = listen.parent / "not there" / "s.sock"

    async def story() -> tuple[int, bytes]:
        async with asyncio.timeout(30), service(nowhere) as process:
            _, said = await process.communicate()
            assert process.returncode is not None
            return process.returncode, said

    code, said = asyncio.run(story())
    assert code == 1
    assert f"test: cannot listen on {nowhere}" in said.decode()
    assert b"Traceback" not in said


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: at for name, at in os.environ.items() if not name.startswith("PARALLAMA")}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["authz", "ratelimit", "usage_sink", "parallama.admin"])
def test_a_service_without_a_configuration_says_how_to_name_one(name: str) -> None:
    ended = run_module(name)
    assert ended.returncode == 2
    assert "name the configuration by --config or PARALLAMA_CONFIG" in ended.stderr


@pytest.mark.parametrize("name", ["authz", "ratelimit", "usage_sink", "parallama.admin"])
def test_a_service_that_cannot_start_says_why_in_a_line(name: str, tmp_path: Path) -> None:
    """There is no database yet: what is missing is named, and nothing of Python's."""
    config = tmp_path / "config.yaml"
    config.write_text("{}\n", encoding="utf-8")
    ended = run_module(name, "--config", str(config))
    assert ended.returncode == 1
    said = f"{name.rpartition('.')[2]}: there is no database at {tmp_path}/parallama.db"
    assert ended.stderr.startswith(said)
    assert ended.stderr.count("\n") == 1


_HEAVY = {
    *("pydantic", "fastapi", "sqlalchemy", "alembic", "typer", "rich", "httpx", "redis"),
    *("cryptography", "jwt", "tiktoken", "psycopg", "importlib.metadata", "importlib.resources"),
    *("email", "http.client", "multiprocessing", "zipfile", "difflib"),
}


@pytest.mark.parametrize(
    "main", ["authz.__main__", "ratelimit.__main__", "usage_sink.__main__", "supervisor.chain"]
)
def test_a_process_loads_only_what_it_needs(main: str) -> None:
    """docs/decisions/0025: what one more library takes, five processes take."""
    module = f"parallama.{main}" if main.startswith("supervisor") else main
    program = (
        "import sys, parallama.daemon\n"
        "parallama.daemon.run = lambda *_: None\n"
        f"import {module}\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert _HEAVY & set(done.stdout.split()) == set()
