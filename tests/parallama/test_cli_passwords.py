"""Commands for passwords, sessions and signing keys: no secret in words, answers or records."""

import asyncio
import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import termios
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from parallama import passwords
from parallama.config import load
from parallama.lockout import Locked, Lockout
from parallama.stores import connect_redis
from tests.parallama.commands import Done, Parallama, invoke
from tests.parallama.servers import Server

PASSWORD = "correct horse battery"


def given(cli: Parallama, text: str | bytes, *words: str) -> Done:
    return invoke(*words, "--config", str(cli.config), text=text)


def stored(folder: Path) -> str:
    return "".join(file.read_bytes().decode("latin1") for file in folder.glob("parallama.db*"))


def hashes(folder: Path) -> list[str]:
    """Each at most once in each page of the file that has it."""
    return sorted(set(re.findall(r"\$2b\$12\$[./A-Za-z0-9]{53}", stored(folder))))


# Passwords.


def test_a_password_comes_from_standard_input(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    result = given(cli, f"{PASSWORD}\nanother line\n", "users", "set-password", "anna")
    assert result.exit_code == 0, result.output
    assert PASSWORD not in result.output
    assert "$2b$" not in result.output
    [hash] = hashes(cli.folder)
    assert passwords.verify(PASSWORD, hash, rounds=12)
    assert PASSWORD not in stored(cli.folder)
    assert cli.json("users", "get", "anna")["has_password"] is True


def test_a_password_comes_from_a_file(cli: Parallama, tmp_path: Path) -> None:
    cli.json("users", "create", "anna")
    file = tmp_path / "password"
    file.write_bytes(PASSWORD.encode() + b"\r\n")
    cli.json("users", "set-password", "anna", "--password-file", str(file))
    [hash] = hashes(cli.folder)
    assert passwords.verify(PASSWORD, hash, rounds=12)
    assert cli.json("users", "set-password", "anna", "--remove")["has_password"] is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no password on the first line"),
        ("\nsecond", "no password on the first line"),
        ("short\n", "12 characters or more"),
        ("x" * 4000, "72 bytes or less"),
        ("annaanna1234", "would be guessed"),
        (b"\xff\xfe" * 10, "UTF-8"),
    ],
)
def test_a_password_that_is_not_taken_changes_nothing(
    cli: Parallama, text: str | bytes, said: str
) -> None:
    cli.json("users", "create", "anna")
    result = given(cli, text, "users", "set-password", "anna")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""
    assert cli.json("users", "get", "anna")["has_password"] is False


def test_what_makes_no_sense_is_said(cli: Parallama) -> None:
    assert given(cli, PASSWORD, "users", "set-password", "nobody").exit_code == 3
    nowhere = ("users", "set-password", "anna", "--password-file", "/nowhere")
    assert "/nowhere" in cli.refused(2, *nowhere)
    assert "either" in cli.refused(2, *nowhere, "--remove")


# The first admin.


def init(folder: Path, *words: str, text: str | None = None) -> Done:
    return invoke("init", "--dir", str(folder), *words, text=text)


@pytest.mark.parametrize("name", ["admin", "olga"])
def test_the_first_admin_has_the_password_that_was_given(tmp_path: Path, name: str) -> None:
    words = () if name == "admin" else ("--admin", name)
    result = init(tmp_path, *words, "--password-file", "-", text=f"{PASSWORD}\n")
    assert result.exit_code == 0, result.output
    assert PASSWORD not in result.output
    cli = Parallama(tmp_path)
    [user] = cli.json("users", "list")
    assert (user["username"], user["role"], user["has_password"]) == (name, "admin", True)
    [hash] = hashes(tmp_path)
    assert passwords.verify(PASSWORD, hash, rounds=12)


def test_without_a_password_there_is_no_admin(tmp_path: Path) -> None:
    result = init(tmp_path, text=f"{PASSWORD}\n")  # nobody said that this is one
    assert result.exit_code == 0
    assert "No admin yet" in result.stderr
    assert Parallama(tmp_path).json("users", "list") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--password-file", "-"), "12 characters or more"),
        (("--password-file", "/nowhere"), "/nowhere"),
        (("--password-file", "-", "--admin", "a b"), "no spaces"),
    ],
)
def test_a_bad_first_password_leaves_nothing_behind(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    result = init(tmp_path / "new", *words, text="short\n")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "new").exists()


def at_a_terminal(*words: str, typed: list[tuple[str, str]]) -> tuple[int, str]:
    """Run a command that has a terminal, and type each line once its prompt is there."""
    ours, theirs = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "parallama", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=own_terminal,
    )
    os.close(theirs)
    shown = ""
    for prompt, line in typed:
        while prompt not in shown:
            shown += os.read(ours, 1000).decode()
        shown = shown.replace(prompt, "<asked>", 1)
        os.write(ours, f"{line}\n".encode())
    try:
        while more := os.read(ours, 1000):
            shown += more.decode()
    except OSError:  # it has ended
        pass
    os.close(ours)
    return process.wait(30), shown


def test_at_a_terminal_it_is_asked_for_and_not_shown(tmp_path: Path) -> None:
    twice = [("Password for admin", PASSWORD), ("The same again", PASSWORD)]
    code, shown = at_a_terminal("init", "--dir", str(tmp_path), typed=twice)
    assert code == 0, shown
    assert PASSWORD not in shown
    [hash] = hashes(tmp_path)
    assert passwords.verify(PASSWORD, hash, rounds=12)

    config = ("--config", str(tmp_path / "config.yaml"))
    differs = [("New password for admin", "another good 1"), ("The same again", PASSWORD)]
    code, shown = at_a_terminal("users", "set-password", "admin", *config, typed=differs)
    assert code == 2
    assert "not the same" in shown
    assert hashes(tmp_path) == [hash]


def test_at_a_terminal_nobody_has_to_give_one(tmp_path: Path) -> None:
    typed = [("Password for admin", "")]
    code, shown = at_a_terminal("init", "--dir", str(tmp_path), typed=typed)
    assert code == 0, shown
    assert Parallama(tmp_path).json("users", "list") == []


# Sessions and tokens.


def test_sessions_end_and_leave_a_record(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    assert cli.json("users", "log-out", "anna")["username"] == "anna"
    assert cli.json("tokens", "revoke", "some-id") == {
        "jti": "some-id",
        "issuer": None,
        "revoked": True,
    }
    cli.json("tokens", "revoke", "some-id", "--issuer", "https://id.example.org")
    cli.refused(3, "users", "log-out", "nobody")
    cli.refused(2, "tokens", "revoke", "")


@pytest.mark.parametrize("whole", ["eyJh.eyJz.c2ln", "plr_" + "x" * 60, "plm_" + "x" * 60])
def test_a_whole_token_is_no_name_for_it(cli: Parallama, whole: str) -> None:
    said = cli.refused(2, "tokens", "revoke", whole)
    assert "whole token" in said
    assert whole not in said


# Signing keys.


def configured(cli: Parallama, **authentication: Any) -> None:
    # YAML takes JSON as it is.
    text = f"{cli.config.read_text()}\nauthentication: {json.dumps(authentication)}\n"
    cli.config.write_text(text)


def test_keys_are_made_listed_and_rotated(cli: Parallama) -> None:
    configured(cli, jwt_algorithm="EdDSA")
    assert "does not exist" in cli.refused(1, "signing-keys", "list")
    first = cli.json("signing-keys", "rotate")
    assert Path(first["file"]).parent == cli.folder / "state" / "signing"
    second = cli.json("signing-keys", "rotate")
    told = {each["kid"]: each["state"] for each in cli.json("signing-keys", "list")}
    assert told == {first["kid"]: "signing", second["kid"]: "next"} or first["kid"] > second["kid"]
    third = cli.json("signing-keys", "rotate", "--at-once")
    assert sorted(third["removed"]) == sorted([first["kid"], second["kid"]])
    [only] = cli.json("signing-keys", "list")
    assert (only["kid"], only["state"], only["algorithm"]) == (third["kid"], "signing", "EdDSA")
    assert [(each["action"], each["subject"]) for each in cli.json("audit", "list")].count(
        ("signing-keys.rotate", third["kid"])
    ) == 1


def test_keys_for_another_algorithm_are_told_apart(cli: Parallama) -> None:
    configured(cli, jwt_algorithm="EdDSA")
    cli.json("signing-keys", "rotate")
    cli.config.write_text(cli.config.read_text().replace("EdDSA", "ES256"))
    cli.json("signing-keys", "rotate")
    told = {each["algorithm"]: each["state"] for each in cli.json("signing-keys", "list")}
    assert told == {"EdDSA": "unused", "ES256": "signing"}


def test_a_broken_key_is_named_and_nothing_is_made(cli: Parallama) -> None:
    folder = cli.folder / "state" / "signing"
    folder.mkdir(parents=True, mode=0o700)
    broken = folder / "20260101T000000Z-a.pem"
    broken.touch(0o600)
    for command in ("list", "rotate"):
        assert str(broken) in cli.refused(1, "signing-keys", command)
    assert list(folder.iterdir()) == [broken]


def test_a_shared_secret_is_not_rotated_by_us(cli: Parallama) -> None:
    secret = cli.folder / "secrets" / "jwt"
    secret.touch(0o600)
    secret.write_text("x" * 40)
    configured(cli, jwt_algorithm="HS256", jwt_secret_key_file="secrets/jwt")
    for command in ("list", "rotate"):
        assert "jwt_secret_key_file" in cli.refused(2, "signing-keys", command)


# Waiting.


def test_who_has_to_wait_is_unlocked_and_it_is_recorded(
    cli: Parallama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.json("users", "create", "anna")
    assert "cannot be used" in cli.refused(5, "users", "unlock", "anna")
    secret = load(cli.config, os.environ).redis.password
    assert secret is not None
    password = secret.get_secret_value()
    with Server(tmp_path / "redis", f"requirepass {password}", password=password) as server:
        monkeypatch.setenv("PARALLAMA_REDIS__HOST", "127.0.0.1")
        monkeypatch.setenv("PARALLAMA_REDIS__PORT", str(server.port))

        async def guess() -> bool:
            config = load(cli.config, os.environ)
            async with (
                connect_redis(config) as redis,
                aclosing(Lockout(redis, config.authentication, timeout=5)) as lockout,
            ):
                try:
                    await lockout.attempt("anna", "192.0.2.7")
                except Locked:
                    return False
                return True

        assert [asyncio.run(guess()) for _ in range(6)] == [True] * 5 + [False]
        assert cli.json("users", "unlock", "anna")["username"] == "anna"
        assert asyncio.run(guess())
        cli.refused(3, "users", "unlock", "nobody")
    (record,) = cli.json("audit", "list", "--action", "users.unlock")
    assert record["subject"] == "anna"
