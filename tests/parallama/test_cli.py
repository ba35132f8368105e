"""The commands, in this process, on a real database."""

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from parallama import keys
from parallama.cli import EXIT_CODES
from parallama.cli.docs import render
from parallama.config import load
from parallama.db import database
from parallama.db.accounts import find_key
from parallama.db.revisions import HEAD
from tests.parallama.commands import Done, Parallama, invoke
from tests.parallama.db_on_disk import a_record, settings

NOBODY = "7c1f2c1e-0000-4000-8000-000000000000"


# init


def init(folder: Path, *words: str) -> Done:
    return invoke("init", "--dir", str(folder), *words)


def test_init_writes_what_up_needs(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    upstream = ("--upstream", "http://[::1]:11435/")
    assert init(folder, "--listen", "[::1]:8001", *upstream).exit_code == 0
    config = load(folder / "config.yaml", {})
    assert (config.server.host, config.server.port) == ("::1", 8001)
    assert config.api_gateways.ollama.upstream() == ("http", "::1", 11435)
    assert config.redis.password is not None
    assert len(config.redis.password.get_secret_value()) >= 32
    assert asyncio.run(_revision(folder)) == HEAD
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "secrets", "parallama.db"}


async def _revision(folder: Path) -> str | None:
    async with database(settings(folder)) as store:
        return await store.revision()


def test_what_init_writes_is_private(tmp_path: Path) -> None:
    init(tmp_path / "new")
    modes = {
        str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777
        for path in (tmp_path / "new").rglob("*")
    }
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert modes == {
        "new/config.yaml": 0o600,
        "new/parallama.db": 0o600,
        "new/secrets": 0o700,
        "new/secrets/redis_password": 0o600,
    }


def test_init_leaves_an_existing_configuration_alone(cli: Parallama) -> None:
    before = {path: path.stat().st_mtime_ns for path in cli.folder.rglob("*")}
    again = init(cli.folder, "--listen", "127.0.0.1:2")
    assert again.exit_code == 4
    assert "config.yaml is there already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in cli.folder.rglob("*")} == before


def test_init_finishes_what_was_interrupted(cli: Parallama) -> None:
    password = (cli.folder / "secrets" / "redis_password").read_text()
    cli.json("users", "create", "anna")
    cli.config.unlink()
    assert init(cli.folder).exit_code == 0
    assert (cli.folder / "secrets" / "redis_password").read_text() == password
    assert cli.json("users", "get", "anna")["username"] == "anna"


def test_init_fails_clearly_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = init(tmp_path / "file" / "folder")
    assert result.exit_code == 1
    assert result.stderr == f"error: cannot write {tmp_path}/file/folder: Not a directory\n"


@pytest.mark.parametrize(
    "words",
    [
        ("--listen", "8000"),
        ("--listen", "127.0.0.1:"),
        ("--listen", "127.0.0.1:70000"),
        ("--listen", "::1:8000"),
        ("--upstream", "127.0.0.1:11434"),
        ("--upstream", "ftp://127.0.0.1"),
        ("--upstream", "http://127.0.0.1:x"),
        ("--upstream", "http://user:secret@127.0.0.1"),
        ("--upstream", "http://127.0.0.1/v1"),
    ],
)
def test_init_says_how_an_address_is_written(tmp_path: Path, words: tuple[str, str]) -> None:
    result = init(tmp_path, *words)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {words[0]} ")
    assert "secret" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failed_init_leaves_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "parallama.db").write_text("no database " * 100)
    result = init(tmp_path)
    assert (result.exit_code, "is not a SQLite database" in result.stderr) == (5, True)
    assert {path.name for path in tmp_path.iterdir()} == {"parallama.db", "secrets"}


# --config, db, config


def test_the_configuration_may_be_named_before_or_behind_or_by_the_environment(
    cli: Parallama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(*words: str) -> int:
        return invoke(*words).exit_code

    here, missing = str(cli.config), str(cli.folder / "missing.yaml")
    assert listed("users", "list") == 2
    assert listed("--config", here, "users", "list") == 0
    assert listed("users", "list", "--config", here) == 0
    assert listed("--config", missing, "users", "list") == 1
    assert listed("--config", missing, "users", "list", "--config", here) == 0
    monkeypatch.setenv("PARALLAMA_CONFIG", missing)
    assert listed("users", "list") == 1
    assert listed("users", "list", "--config", here) == 0
    monkeypatch.setenv("PARALLAMA_CONFIG", here)
    assert listed("users", "list") == 0


def test_config_check_reports_mistakes_all_at_once(cli: Parallama) -> None:
    assert "no mistakes" in cli.table("config", "check")
    cli.config.write_text("server: {prot: 1, host: 7}\n")
    complaint = cli.refused(1, "config", "check")
    assert "server.prot" in complaint
    assert "server.host" in complaint


def test_config_check_warns_of_what_has_no_effect(cli: Parallama) -> None:
    cli.config.write_text("redis: {port: 1234}\n")
    result = cli.run("config", "check")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: redis.port")


def test_db_current_and_upgrade(cli: Parallama) -> None:
    assert cli.json("db", "current") == {
        "revision": HEAD, "wanted": HEAD, "up_to_date": True,
    }  # fmt: skip
    (cli.folder / "parallama.db").unlink()
    for words in (("db", "current"), ("users", "list"), ("up",)):
        assert "run `parallama db upgrade`" in cli.refused(1, *words)
    assert cli.json("db", "upgrade") == {"before": None, "revision": HEAD}
    assert cli.json("users", "list") == []


# users


def test_users_are_created_shown_changed_and_deleted(cli: Parallama) -> None:
    anna = cli.json("users", "create", "anna", "--role", "operator")
    assert (anna["username"], anna["role"], anna["disabled_at"]) == ("anna", "operator", None)
    assert cli.json("users", "create", "bob")["role"] == "user"
    assert [user["username"] for user in cli.json("users", "list")] == ["anna", "bob"]
    assert cli.json("users", "get", anna["id"]) == anna
    assert cli.json("users", "update", "anna", "--role", "readonly")["role"] == "readonly"
    assert cli.json("users", "update", "anna", "--name", "anne")["id"] == anna["id"]
    assert cli.json("users", "disable", "anne")["disabled_at"] is not None
    assert cli.json("users", "enable", "anne")["disabled_at"] is None
    assert cli.json("users", "delete", "anne")["username"] == "anne"
    assert [user["username"] for user in cli.json("users", "list")] == ["bob"]


@pytest.mark.parametrize(
    ("code", "words", "complaint"),
    [
        (4, ("users", "create", "anna"), "there is a user 'anna' already"),
        (2, ("users", "create", "a b"), "no spaces"),
        (3, ("users", "create", "eve", "--role", "boss"), "there is no role 'boss'"),
        (3, ("users", "get", "ghost"), "there is no user 'ghost'"),
        (3, ("users", "disable", NOBODY), f"there is no user '{NOBODY}'"),
        (2, ("users", "update", "anna"), "nothing to change"),
        (3, ("keys", "create", "ghost"), "there is no user 'ghost'"),
        (2, ("keys", "create", "anna", "--expires", "soon"), "not a time: 'soon'"),
        (2, ("keys", "create", "anna", "--expires", "0d"), "in the past"),
        (2, ("keys", "create", "anna", "--expires", "999999999d"), "too long a time"),
        (2, ("keys", "create", "anna", "--models", ","), "at least one model"),
        (2, ("keys", "create", "anna", "--networks", "here"), "not a network"),
        (3, ("keys", "revoke", "nothing"), "there is no key 'nothing'"),
        (2, ("limits", "set", "anna", "--gateway", "ollama"), "at least one limit"),
        (2, ("limits", "set", "anna", "--tokens-per-day", "1"), "--gateway"),
        (2, ("limits", "set", "anna", "--gateway", "x", "--tokens-per-day", "1"), "'x' is not"),
        (2, ("limits", "set", "anna", "--gateway", "*", "--tokens-per-day", "-1"), "0"),
        (2, ("limits", "set", "anna", "--gateway", "*", "--tokens-per-day", "1.5"), "integer"),
        (3, ("limits", "set", "role:x", "--gateway", "*", "--tokens-per-day", "1"), "no role 'x'"),
        (2, ("limits", "unset", "anna", "--model", "llama3"), "--model needs --gateway"),
        (3, ("limits", "unset", "anna", "--gateway", "ollama"), "no limits of its own"),
        (3, ("usage", "list", "--user", "ghost"), "there is no user 'ghost'"),
        (2, ("usage", "list", "--since", "yesterday"), "not a time: 'yesterday'"),
        (2, ("usage", "summary", "--by", "colour"), "choose from user, key, gateway, model, day"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_place(
    cli: Parallama, code: int, words: tuple[str, ...], complaint: str
) -> None:
    cli.json("users", "create", "anna")
    assert complaint in cli.refused(code, *words)


# keys


def test_a_key_is_shown_once_and_works(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    made = cli.json("keys", "create", "anna", "--name", "laptop")
    parsed = keys.parse(made["key"])
    assert parsed is not None
    record = asyncio.run(_find(cli, parsed.public_id))
    assert record.id == made["id"]
    assert keys.verify(parsed.secret, record.secret_hash)
    for words in (("keys", "list"), ("keys", "get", "laptop"), ("users", "get", "anna")):
        assert parsed.secret not in cli.run(*words).output
        assert record.secret_hash not in cli.run(*words).output


async def _find(cli: Parallama, public_id: str) -> Any:
    async with database(settings(cli.folder)) as store:
        return await find_key(store, public_id)


def test_a_key_for_people_stands_on_stdout_and_the_advice_does_not(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    result = cli.run("keys", "create", "anna")
    assert len(re.findall(keys.PATTERN, result.stdout)) == 1
    assert "cannot be shown again" in result.stderr
    assert not re.search(keys.PATTERN, result.stderr)


def test_restrictions_of_a_key_are_kept(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    before = datetime.now(UTC)
    made = cli.json(
        *("keys", "create", "anna", "--expires", "30d"),
        *("--models", "llama*, gemma", "--networks", "10.0.0.0/8,::1"),
    )
    assert made["models"] == ["llama*", "gemma"]
    assert made["networks"] == ["10.0.0.0/8", "::1/128"]
    expires = datetime.fromisoformat(made["expires_at"])
    assert timedelta(0) <= expires - before - timedelta(days=30) < timedelta(minutes=1)
    exact = cli.json("keys", "create", "anna", "--expires", "2999-01-01T02:00:00+02:00")
    assert exact["expires_at"] == "2999-01-01T00:00:00Z"


def test_the_state_of_a_key_is_shown(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    revoked = cli.json("keys", "create", "anna", "--name", "a")
    cli.json("keys", "create", "anna", "--name", "b")
    cli.json("users", "create", "bob")
    cli.json("keys", "create", "bob")
    assert cli.json("keys", "revoke", revoked["id"])["state"] == "revoked"
    mine = cli.json("keys", "list", "--user", "anna")
    assert [(key["name"], key["state"]) for key in mine] == [("a", "revoked"), ("b", "active")]
    assert len(cli.json("keys", "list")) == 3


def test_a_whole_key_in_an_argument_is_refused_and_not_repeated(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    token = cli.json("keys", "create", "anna")["key"]
    complaint = cli.refused(2, "keys", "revoke", token)
    assert token not in complaint
    assert token[:16] in complaint


# limits


def test_limits_are_set_listed_and_unset(cli: Parallama) -> None:
    anna = cli.json("users", "create", "anna")["id"]
    every = [
        f"--{unit}-per-{window}"
        for unit in ("requests", "tokens")
        for window in ("minute", "hour", "day")
    ]
    options = [word for number, name in enumerate(every) for word in (name, str(number))]
    made = cli.json("limits", "set", "anna", "--gateway", "*", *options)
    assert [made[name[2:].replace("-", "_")] for name in every] == [0, 1, 2, 3, 4, 5]
    assert (made["scope"], made["user_id"], made["model"]) == ("anna", anna, "*")
    changed = cli.json("limits", "set", anna, "--gateway", "*", "--tokens-per-day", "9")
    assert changed == made | {"tokens_per_day": 9, "updated_at": changed["updated_at"]}
    cli.json(
        *("limits", "set", "role:user", "--gateway", "ollama", "--model", "llama*"),
        *("--requests-per-minute", "5"),
    )
    assert {row["scope"] for row in cli.json("limits", "list", "anna")} == {"anna", "role:user"}
    assert cli.json("limits", "unset", "anna") == {"removed": 1}
    assert [row["scope"] for row in cli.json("limits", "list")] == ["role:user"]
    assert cli.json("limits", "unset", "anna") == {"removed": 0}
    assert cli.json("limits", "unset", "role:user", "--gateway", "ollama", "--model", "llama*") == {
        "removed": 1
    }


# usage


def test_usage_has_the_promised_fields(cli: Parallama) -> None:
    cli.add(a_record("r1", key_id=NOBODY, decision='{"known_at":1.5}'))
    (row,) = cli.json("usage", "list")
    assert row == {
        "request_id": "r1", "timestamp": "2026-03-01T12:00:00Z", "user": "anna",
        "user_id": a_record().user_id, "key_id": NOBODY, "gateway": "ollama", "dialect": "ollama",
        "endpoint": "/api/chat", "model_name": "llama3", "served_model": "llama3",
        "prompt_tokens": 10, "completion_tokens": 20, "cached_tokens": None, "tokens_used": 30,
        "token_source": "reported", "streamed": True, "finished": True, "aborted": False,
        "status_code": 200, "flags": "", "error_message": None, "request_duration": 1.5,
        "time_to_first_token": 0.25, "compute_ms": 900.0, "upstream_host": "127.0.0.1:11434",
        "cost": None, "grants": None, "decision": {"known_at": 1.5}, "requested_model": None,
        "attempts": None,
        "reasoning_tokens": None,
    }  # fmt: skip


def test_usage_is_filtered_and_complete_for_programs(cli: Parallama) -> None:
    now = datetime.now(UTC)
    ages = [timedelta(minutes=30 * number) for number in range(60)]
    cli.add(*(a_record(f"r{n}", timestamp=now - age) for n, age in enumerate(ages)))
    assert len(cli.json("usage", "list")) == 60
    assert len(cli.csv("usage", "list")) == 60
    assert [row["request_id"] for row in cli.json("usage", "list", "--since", "59m")] == [
        "r0",
        "r1",
    ]
    since = (now - ages[2]).isoformat()
    until = (now - ages[1]).isoformat().replace("+00:00", "Z")
    found = cli.json("usage", "list", "--user", "anna", "--since", since, "--until", until)
    assert [row["request_id"] for row in found] == ["r2"]
    assert [row["request_id"] for row in cli.json("usage", "list", "--limit", "1")] == ["r0"]
    table = cli.run("usage", "list")
    assert len(table.stdout.splitlines()) == 51
    assert "--limit" in table.stderr


def test_export_is_oldest_first_in_both_formats(cli: Parallama) -> None:
    cli.add(*(a_record(f"r{n}", timestamp=datetime(2026, 3, n, tzinfo=UTC)) for n in (3, 1, 2)))
    for read in (cli.csv, cli.json):
        assert [row["request_id"] for row in read("usage", "export")] == ["r1", "r2", "r3"]
    row = cli.csv("usage", "export")[0]
    assert (row["cached_tokens"], row["streamed"], row["timestamp"]) == (
        "", "true", "2026-03-01T00:00:00Z",
    )  # fmt: skip


def test_no_usage_is_an_answer_too(cli: Parallama) -> None:
    assert cli.json("usage", "list") == []
    assert cli.json("usage", "export") == []
    assert cli.json("usage", "summary") == []
    assert cli.table("usage", "list").startswith("TIMESTAMP  USER")


def test_summary_adds_up(cli: Parallama) -> None:
    cli.add(a_record("r1"), a_record("r2", model_name="gemma", tokens_used=3, status_code=429))
    (anna,) = cli.json("usage", "summary", "--user", "anna")
    assert (anna["user"], anna["requests"], anna["errors"], anna["tokens_used"]) == (
        "anna", 2, 1, 33,
    )  # fmt: skip
    rows = cli.csv("usage", "summary", "--by", "day,model")
    assert [(row["day"], row["model_name"]) for row in rows] == [
        ("2026-03-01", "gemma"),
        ("2026-03-01", "llama3"),
    ]
    assert "TOKENS USED" in cli.table("usage", "summary", "--by", "model")


def test_a_name_from_a_client_cannot_drive_a_terminal_or_a_spreadsheet(cli: Parallama) -> None:
    cli.add(a_record("r1", model_name="=cmd()\x1b[2J\nfake row"))
    assert "\x1b" not in cli.table("usage", "list")
    assert len(cli.table("usage", "list").splitlines()) == 2
    assert cli.csv("usage", "export")[0]["model_name"].startswith("'=cmd()")
    assert cli.json("usage", "list")[0]["model_name"] == "=cmd()\x1b[2J\nfake row"


# all


def test_tables_are_aligned_and_plain(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    cli.json("users", "create", "maximilian", "--role", "admin")
    header, *rows = cli.table("users", "list").splitlines()
    assert len(rows) == 2
    for line in (header, *rows):
        assert line == line.rstrip()
        assert line.isascii()
    assert header.index("ROLE") == rows[0].index("user") == rows[1].index("admin")


def test_status_names_what_is_missing(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    result = cli.run("status", "-o", "json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["ok"], found["up"], found["database"]) == (False, "not running", "ok")
    assert found["health"].startswith("no answer")
    assert (found["users"], found["active_keys"], found["usage_rows"]) == (1, 0, 0)
    (cli.folder / "parallama.db").unlink()
    assert "db upgrade" in json.loads(cli.run("status", "-o", "json").stdout)["database"]


def test_the_documentation_is_the_commands_help() -> None:
    """If this fails: python -m parallama.cli.docs > docs/cli.md"""
    assert Path("docs/cli.md").read_text(encoding="utf-8") == render()


def test_every_command_and_option_explains_itself() -> None:
    for section in render().split("\n## ")[1:]:
        name, _, text = section.partition("\n")
        explanation = text.split("\n\n")[2].strip()
        assert len(explanation) > 15, name
        for option in re.findall(r"^  (--[a-z-]+(?: \S+)?) *$", text, re.MULTILINE):
            assert re.search(rf"^  {re.escape(option)} *\n {{10,}}\S", text, re.MULTILINE), (
                name,
                option,
            )


def test_the_help_names_the_exit_codes() -> None:
    shown = invoke("--help").stdout
    for code, meaning in EXIT_CODES:
        assert f"  {code:<4} {meaning}\n" in shown
