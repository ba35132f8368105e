"""Roles, keys that are bound and rotated, public keys, and who changed what: by commands."""

import asyncio
import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from parallama import keys
from parallama.db import database
from parallama.db.accounts import KeyRecord, find_key
from parallama.db.policies import Policy, policy_of
from parallama.limits import Unit
from tests.ollama_cli import OllamaCommand
from tests.parallama.commands import Parallama
from tests.parallama.db_on_disk import settings


def known(cli: Parallama, public_id: str) -> KeyRecord:
    """As authz sees it."""

    async def work() -> KeyRecord | None:
        async with database(settings(cli.folder)) as store:
            return await find_key(store, public_id)

    found = asyncio.run(work())
    assert found is not None
    return found


def public_id(token: str) -> str:
    parsed = keys.parse(token)
    assert parsed is not None
    return parsed.public_id


# roles


def test_a_role_is_made_given_changed_and_deleted(cli: Parallama) -> None:
    made = cli.json(
        "roles", "create", "auditor", "--permissions", "audit:read,usage:*", "--description", "Ann"
    )
    assert (made["origin"], made["permissions"]) == ("database", ["audit:read", "usage:*"])
    anna = cli.json("users", "create", "anna", "--role", "auditor")
    assert (anna["role"], anna["more_roles"]) == ("auditor", [])
    assert "is still that of 1 users" in cli.refused(4, "roles", "delete", "auditor")
    assert cli.json("users", "update", "anna", "--role", "user")["role"] == "user"
    more = cli.json("users", "update", "anna", "--more-roles", "auditor,readonly")
    assert more["more_roles"] == ["auditor", "readonly"]
    assert "is still that of 1 users" in cli.refused(4, "roles", "delete", "auditor")
    changed = cli.json("roles", "update", "auditor", "--permissions", "audit:read")
    assert (changed["permissions"], changed["description"]) == (["audit:read"], "Ann")
    assert cli.json("users", "update", "anna", "--more-roles", "")["more_roles"] == []
    assert cli.json("roles", "delete", "auditor")["name"] == "auditor"
    cli.refused(3, "roles", "get", "auditor")


def test_roles_are_listed_with_where_they_come_from(cli: Parallama) -> None:
    with cli.config.open("a") as file:
        file.write("roles: {clerk: ['usage:read']}\n")
    cli.json("roles", "create", "auditor", "--permissions", "audit:read")
    listed = {role["name"]: role["origin"] for role in cli.json("roles", "list")}
    assert listed == {
        **dict.fromkeys(("admin", "operator", "user", "readonly"), "built in"),
        "clerk": "configuration",
        "auditor": "database",
    }
    assert "usage:read" in cli.json("roles", "get", "clerk")["permissions"]
    assert "cannot be changed here" in cli.refused(4, "roles", "delete", "clerk")


@pytest.mark.parametrize(
    ("code", "words", "complaint"),
    [
        (2, ("create", "Auditor", "--permissions", "audit:read"), "begins with a letter"),
        (2, ("create", "auditor", "--permissions", "audit:fly"), "no permission 'audit:fly'"),
        (4, ("create", "admin", "--permissions", "audit:read"), "a role 'admin' already"),
        (4, ("update", "admin", "--permissions", "audit:read"), "built in"),
        (2, ("update", "admin"), "nothing to change"),
        (3, ("update", "ghost", "--permissions", "audit:read"), "no role 'ghost'"),
        (3, ("get", "ghost"), "no role 'ghost'"),
        (3, ("delete", "ghost"), "no role 'ghost'"),
    ],
)
def test_what_cannot_be_a_role(
    cli: Parallama, code: int, words: tuple[str, ...], complaint: str
) -> None:
    assert complaint in cli.refused(code, "roles", *words)


def test_a_role_that_was_made_here_has_default_limits(cli: Parallama) -> None:
    """And ratelimit finds them for its users: those whose first role it is."""
    cli.json("roles", "create", "guest", "--permissions", "models:infer")
    cli.json("limits", "set", "role:guest", "--gateway", "*", "--tokens-per-day", "100")
    anna = cli.json("users", "create", "anna", "--role", "guest")
    ben = cli.json("users", "create", "ben", "--more-roles", "guest")

    async def limits_of(user: str) -> Policy:
        async with database(settings(cli.folder)) as store:
            return await policy_of(store, user)

    (limit,) = asyncio.run(limits_of(anna["id"])).limits
    assert (limit.unit, limit.amount) == (Unit.TOKENS, 100)
    assert asyncio.run(limits_of(ben["id"])).limits == ()
    cli.json("users", "update", "anna", "--role", "user")
    cli.json("users", "update", "ben", "--more-roles", "")
    assert "of 1 limits" in cli.refused(4, "roles", "delete", "guest")


# keys


def test_a_key_is_bound_to_gateways_and_permissions_and_unbound_again(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    made = cli.json(
        "keys", "create", "anna", "--name", "laptop", "--gateways", "ollama",
        "--scopes", "models:infer,models:read:ollama",
    )  # fmt: skip
    assert (made["kind"], made["gateways"]) == ("secret", ["ollama"])
    assert made["scopes"] == ["models:infer", "models:read:ollama"]
    record = known(cli, public_id(made["key"]))
    assert record.gateways == ("ollama",)
    assert record.scopes == {"models:infer", "models:read:ollama"}

    changed = cli.json(
        "keys", "update", "laptop", "--gateways", "*", "--scopes", "models:read", "--models",
        "llama3*", "--networks", "10.0.0.0/8", "--expires", "30d", "--name", "desktop",
    )  # fmt: skip
    assert (changed["gateways"], changed["scopes"]) == (None, ["models:read"])
    assert (changed["models"], changed["networks"]) == (["llama3*"], ["10.0.0.0/8"])
    assert changed["expires_at"]
    bare = cli.json(
        "keys", "update", "desktop", "--scopes", "*", "--models", "*", "--networks", "*",
        "--expires", "never",
    )  # fmt: skip
    fields = ("gateways", "scopes", "models", "networks", "expires_at")
    assert [bare[field] for field in fields] == [None] * 5
    for words in (["--gateways", "x"], ["--scopes", "x:y"], ["--models", ""], []):
        cli.refused(2, "keys", "update", "desktop", *words)


def test_the_list_of_keys_shows_what_they_are_bound_to(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    cli.json("keys", "create", "anna", "--gateways", "openai", "--scopes", "models:read")
    table = cli.table("keys", "list")
    for shown in ("KIND", "GATEWAYS", "SCOPES", "secret", "openai", "models:read"):
        assert shown in table


def test_a_rotated_key_is_printed_once_and_the_old_one_works_for_a_while(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    made = cli.json("keys", "create", "anna", "--name", "laptop")
    rotated = cli.json("keys", "rotate", "laptop", "--grace", "1h")
    assert rotated["id"] == made["id"]
    assert keys.parse(rotated["key"])
    assert rotated["key"] != made["key"]
    assert rotated["key_prefix"] == keys.PREFIX + public_id(rotated["key"])
    new, old = (known(cli, public_id(each["key"])) for each in (rotated, made))
    assert new.id == old.id == made["id"]
    assert new.expires_at is None
    assert old.expires_at is not None
    for each, record in ((rotated, new), (made, old)):
        secret = keys.parse(each["key"])
        assert secret is not None
        assert keys.verify(secret.secret, record.secret_hash)
    assert rotated["key"] not in cli.table("keys", "list")
    for grace in ("soon", "-1h", "1"):
        cli.refused(2, "keys", "rotate", "laptop", "--grace", grace)
    cli.json("keys", "revoke", "laptop")
    assert "revoked" in cli.refused(4, "keys", "rotate", "laptop")


# ssh


@pytest.fixture
def public_key(tmp_path: Path) -> Path:
    file = tmp_path / "id_ed25519.pub"
    file.write_text(OllamaCommand().public_key_file, encoding="utf-8")
    return file


def test_a_public_key_is_registered_with_bounds(cli: Parallama, public_key: Path) -> None:
    cli.json("users", "create", "anna")
    made = cli.json(
        "keys", "add-ssh", "anna", str(public_key), "--expires", "30d", "--models", "llama3*",
        "--networks", "10.0.0.0/8", "--gateways", "ollama", "--scopes", "models:infer",
    )  # fmt: skip
    assert (made["kind"], made["name"]) == ("ssh", "anna@laptop")
    assert "key" not in made
    record = known(cli, made["key_prefix"])
    assert record.kind == "ssh"
    assert record.secret_hash == " ".join(public_key.read_text().split()[:2])
    assert (record.models, record.networks) == (("llama3*",), ("10.0.0.0/8",))
    assert (record.gateways, record.scopes) == (("ollama",), {"models:infer"})
    assert cli.json("keys", "get", made["key_prefix"])["id"] == made["id"]
    assert "no secret to rotate" in cli.refused(2, "keys", "rotate", made["id"])
    again = cli.refused(4, "keys", "add-ssh", "anna", str(public_key))
    assert "registered already" in again
    assert cli.json("keys", "revoke", made["id"])["state"] == "revoked"


def _openssh(key: Any) -> str:
    encoded: bytes = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return encoded.decode()


PRIVATE = OllamaCommand().key.private_bytes(
    Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
).decode()  # fmt: skip
GOOD = OllamaCommand().public_key_file


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param(PRIVATE, "a private key", id="private"),
        pytest.param(_openssh(rsa.generate_private_key(65537, 2048)), "not a public key", id="rsa"),
        pytest.param(_openssh(ec.generate_private_key(ec.SECP256R1())), "not a pub", id="ecdsa"),
        pytest.param("", "one line", id="empty"),
        pytest.param(GOOD + GOOD, "one line", id="two keys"),
        pytest.param("x" * 100_000, "one line", id="large"),
        pytest.param("ssh-ed25519", "not a public key", id="no key"),
        pytest.param("ssh-ed25519 AAAA", "not a public key", id="too short"),
        pytest.param(GOOD.replace("AAAAC3", "AAAAC4"), "not a public key", id="another head"),
        pytest.param("\x00\xff", "not a public key", id="no text"),
    ],
)
def test_what_is_no_public_key_of_ollamas(
    cli: Parallama, tmp_path: Path, text: str, complaint: str
) -> None:
    cli.json("users", "create", "anna")
    file = tmp_path / "key"
    file.write_text(text, encoding="latin-1")
    said = cli.refused(2, "keys", "add-ssh", "anna", str(file))
    assert complaint in said
    assert "BEGIN" not in said
    assert "no such file" in cli.refused(2, "keys", "add-ssh", "anna", "nowhere.pub").lower()


# audit


def changes(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    cli.json("users", "update", "anna", "--role", "operator")
    cli.json("keys", "create", "anna", "--name", "=1+1")
    cli.json("users", "disable", "anna")


def test_changes_are_listed_newest_first_with_what_is_different(cli: Parallama) -> None:
    changes(cli)
    listed = cli.json("audit", "list")
    assert [entry["action"] for entry in listed] == [
        "users.disable", "keys.create", "users.update", "users.create",
    ]  # fmt: skip
    assert {entry["via"] for entry in listed} == {"cli"}
    assert listed[2]["changes"] == ["role: user -> operator"]
    assert (listed[2]["before"]["role"], listed[2]["after"]["role"]) == ("user", "operator")
    shown = cli.run("audit", "list", "--limit", "3")
    assert "role: user -> operator" in shown.stdout
    assert "users.create" not in shown.stdout
    assert "The newest 3 are shown" in shown.stderr


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (("--subject", "anna"), 3),
        (("--action", "keys"), 1),
        (("--action", "users.update"), 1),
        (("--action", "user"), 0),
        (("--actor", "nobody-of-this-name"), 0),
        (("--since", "1h"), 4),
        (("--until", "1h"), 0),
        (("--limit", "2"), 2),
    ],
)
def test_changes_are_chosen(cli: Parallama, words: tuple[str, ...], count: int) -> None:
    changes(cli)
    assert len(cli.json("audit", "list", *words)) == count


def test_changes_are_exported_oldest_first(cli: Parallama) -> None:
    changes(cli)
    lines = cli.run("audit", "export", "-o", "ndjson").stdout.splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["id"] for entry in entries] == [1, 2, 3, 4]
    assert entries == json.loads(cli.run("audit", "export", "-o", "json").stdout)
    rows = list(csv.DictReader(StringIO(cli.run("audit", "export").stdout)))
    assert json.loads(rows[1]["after"]) == entries[1]["after"]
    assert rows[1]["changes"] == "role: user -> operator"
    assert len(rows) == 4


def test_no_secret_is_in_the_record_of_changes(cli: Parallama) -> None:
    cli.json("users", "create", "anna")
    made = cli.json("keys", "create", "anna", "--name", "laptop")
    rotated = cli.json("keys", "rotate", "laptop")
    record = known(cli, public_id(rotated["key"]))
    told = cli.run("audit", "export", "-o", "ndjson").stdout
    for secret in (made["key"], rotated["key"], record.secret_hash):
        assert secret not in told
        assert secret[20:] not in told
