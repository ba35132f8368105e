"""Model mappings: one step, found in any spelling, set by config, command and database."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from parallama import mappings
from parallama.changes import Change
from parallama.config import Database, load
from parallama.db import ledger
from parallama.db.manage import mappings as kept
from parallama.db.manage import usage
from parallama.db.mappings import mappings_of
from parallama.errors import ConfigError, NotFound, UsageError
from parallama.mappings import MOST, aliases, check_name, in_the_way, merged, plain, wrong_with
from tests.parallama.commands import Parallama
from tests.parallama.db_on_disk import NOW, Opened, a_record, on


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("GPT-4", "gpt-4"), ("gpt-4:latest", "gpt-4"), ("A/B:LATEST", "a/b"), ("ÄÖ", "ÄÖ"),
        ("a:latest:latest", "a:latest"), ("a:v1", "a:v1"), ("\ud800", "\ud800"),
    ],
)  # fmt: skip
def test_spellings_of_one_name(name: str, same: str) -> None:
    assert plain(name) == same


@pytest.mark.parametrize("name", ["a", "org/model:tag", "größe", "模型", 'a "b" \\', "x" * 256])
def test_names_there_may_be(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", " ", "a\tb", "a\nb", "a\0", "a\x7f", "a\x85", "a\u2028", "\ud800", " a", "a ", "a*", "*",
     ":latest", ":LATEST", "x" * 257, "é" * 129, "n" * 10_000],
)  # fmt: skip
def test_names_there_may_not_be(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


def test_what_cannot_be_is_told_without_any_name() -> None:
    table = {"gpt-4": "llama2", "B": "c"}
    assert wrong_with(table, "x", "llama2") is None
    assert wrong_with(table, "gpt-4", "other") is None  # in the place of what is there
    for name, target, told in (
        ("x", "X:latest", "means itself"),
        ("x", "b:latest", "is itself mapped"),
        ("llama2", "GPT-4", "goes in a circle"),
        ("c", "b", "goes in a circle"),
    ):
        assert told in (wrong_with(table, name, target) or "")
    assert "default_model" in (wrong_with(table, "usual", "x", "Usual") or "")
    assert in_the_way(table, "LLAMA2:latest") == "gpt-4"
    assert in_the_way(table, "gpt-4") is None


def test_there_is_a_most() -> None:
    table = {f"n{n}": "m" for n in range(MOST)}
    assert wrong_with(table, "n0", "other") is None
    assert "one too many" in (wrong_with(table, "new", "m") or "")


def test_the_database_counts_before_the_configuration() -> None:
    table = merged({"GPT-4": "a", "x": "b"}, {"gpt-4:latest": "c"})
    assert table == {"gpt-4": "c", "x": "b"}
    assert mappings.target_of(table, "Gpt-4") == "c"
    assert mappings.target_of(table, "c") is None


def test_the_text_that_envoy_is_given() -> None:
    assert aliases({}) == ""
    assert aliases({"b": "B", "a": "A"}) == "\na\tA\nb\tB\n"
    assert aliases({"a": "A"}, "usual") == "\n\tusual\na\tA\n"
    assert aliases({}, "usual") == "\n\tusual\n"


# The configuration.


def told(folder: Path, text: str) -> list[str]:
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    try:
        load(folder / "config.yaml", {})
    except ConfigError as error:
        return str(error).splitlines()[1:]
    return []


def test_config_check_says_what_is_wrong_where_and_what_to_write(tmp_path: Path) -> None:
    text = """\
api_gateways:
  openai:
    model_mappings:
      gpt-4: llama2:70b
      GPT-4:latest: x
      a: a:latest
      b: c
      c: d
      e: f
      f: e
      "tab\\tbed": y
      ok: ""
  ollama:
    default_model: Foo
    model_mappings: {foo: bar}
"""
    at = "  api_gateways.openai.model_mappings"
    name = (
        "must be a model's name: up to 256 bytes, visible characters, without * and without space "
        "around it"
    )
    circle = "goes in a circle: remove one of the two, or write the model that is served"
    assert told(tmp_path, text) == [
        f"{at}.GPT-4:latest (line 5): is another spelling of gpt-4: write one of the two",
        f"{at}.a (line 6): means itself: write another model, or leave it out, for a name that is "
        "not mapped means itself anyway",
        f"{at}.b (line 7): means a name that is itself mapped, and a mapping is one step: write "
        "the model that that one means",
        f"{at}.e (line 9): {circle}",
        f"{at}.f (line 10): {circle}",
        f"{at}.tab\tbed (line 11): {name}",
        f"{at}.ok (line 12): {name}",
        "  api_gateways.ollama.default_model (line 14): is itself mapped, and a mapping is one "
        "step: write the model that it means",
    ]


def test_two_gateways_do_not_know_of_each_other(tmp_path: Path) -> None:
    text = "api_gateways: {openai: {model_mappings: {a: b}}, ollama: {model_mappings: {b: a}}}"
    assert told(tmp_path, text) == []


def test_config_check_counts(tmp_path: Path) -> None:
    listed = ", ".join(f"n{n}: m" for n in range(MOST + 1))
    assert told(tmp_path, f"api_gateways: {{openai: {{model_mappings: {{{listed}}}}}}}") == [
        "  api_gateways.openai.model_mappings (line 1): must have at most 200: remove those that "
        "nobody uses"
    ]


# The database.


def test_a_name_is_mapped_in_one_spelling(db: Database) -> None:
    async def story(at: Opened) -> None:
        desk = at.desk()
        made = await kept.set_mapping(desk, "ollama", "Gpt-4", "a")
        assert desk.changes == [Change("mappings")]
        later = at.desk(NOW + timedelta(1))
        again = await kept.set_mapping(later, "ollama", "gpt-4:latest", "b")
        assert again == replace(
            made,
            external_model="gpt-4:latest",
            internal_model="b",
            updated_at=NOW + timedelta(1),
        )
        other = await kept.set_mapping(at.desk(), "openai", "gpt-4", "c" * mappings.LONGEST_NAME)
        assert await mappings_of(at.store) == {
            "ollama": {"gpt-4:latest": "b"},
            "openai": {"gpt-4": "c" * mappings.LONGEST_NAME},
        }
        assert await kept.find_mapping(at.engine, "ollama", "GPT-4") == again
        assert await kept.list_all(at.engine) == [again, other]
        with pytest.raises(NotFound, match="maps no 'x' on ollama"):
            await kept.find_mapping(at.engine, "ollama", "x")
        desk = at.desk()
        await kept.unset_mapping(desk, again.id)
        assert desk.changes == [Change("mappings")]
        assert await kept.list_all(at.engine) == [other]

    on(db, story)


def test_what_cannot_be_is_refused_by_the_database(db: Database) -> None:
    async def story(at: Opened) -> None:
        await kept.set_mapping(at.desk(), "ollama", "a", "b")
        configured = {"c": "d"}
        for name, target, complaint in (
            ("b", "x", "'a' means 'b', and a mapping is one step: map 'a' to 'x' first"),
            ("d", "x", "'c' means 'd'"),
            ("b", "A", "goes in a circle"),
            ("x", "c", "is itself mapped"),
            ("usual", "x", "default_model"),
            ("x", "X", "means itself"),
            ("x*", "y", "without *"),
        ):
            desk = at.desk()
            with pytest.raises(UsageError) as raised:
                await kept.set_mapping(
                    desk, "ollama", name, target, configured=configured, default="usual"
                )
            assert complaint in str(raised.value)
            assert desk.changes == []
        await kept.set_mapping(at.desk(), "ollama", "C", "e", configured=configured)
        await kept.set_mapping(at.desk(), "ollama", "d", "e", configured=configured)
        with pytest.raises(UsageError, match="no gateway 'x': the gateways are ollama, openai"):
            await kept.set_mapping(at.desk(), "x", "a", "b")

    on(db, story)


# The command.


def test_the_command_maps_lists_and_unmaps(cli: Parallama) -> None:
    made = cli.json("models", "map", "gpt-4", "llama2:70b", "--gateway", "openai")
    assert made == {
        "gateway": "openai", "name": "gpt-4", "target": "llama2:70b", "source": "database",
        "updated_at": made["updated_at"],
    }  # fmt: skip
    assert cli.json("models", "list") == [made]
    assert cli.json("models", "list", "--gateway", "ollama") == []
    header, line = cli.table("models", "list").splitlines()
    assert header.split() == ["GATEWAY", "NAME", "TARGET", "SOURCE", "UPDATED", "AT"]
    assert line.split()[:4] == ["openai", "gpt-4", "llama2:70b", "database"]
    assert cli.json("models", "unmap", "GPT-4:latest", "--gateway", "openai") == {"removed": 1}
    assert cli.json("models", "list") == []
    (last, *_) = cli.json("audit", "list", "--action", "mappings")
    assert (last["action"], last["subject"]) == ("mappings.unset", "gpt-4")


def test_what_the_configuration_says_is_listed_unless_the_database_says_otherwise(
    cli: Parallama, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = "PARALLAMA_API_GATEWAYS__"
    monkeypatch.setenv(f"{at}OPENAI__MODEL_MAPPINGS", "{gpt-4: a, gpt-3: b}")
    monkeypatch.setenv(f"{at}OLLAMA__DEFAULT_MODEL", "usual")
    cli.json("models", "map", "GPT-4", "c", "--gateway", "openai")
    listed = cli.json("models", "list")
    assert [tuple(row.values())[:4] for row in listed] == [
        ("ollama", "", "usual", "configuration"),
        ("openai", "GPT-4", "c", "database"),
        ("openai", "gpt-3", "b", "configuration"),
    ]
    refused = cli.refused(3, "models", "unmap", "gpt-3", "--gateway", "openai")
    assert "the database maps no 'gpt-3' on openai" in refused


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("a", "b"), "Missing option '--gateway'"),
        (("a", "A", "--gateway", "openai"), "'a' means itself"),
        (("a" * 10_000, "b", "--gateway", "openai"), "at most 256 bytes, not 10000"),
        (("a", "b*", "--gateway", "openai"), "without *"),
        (("a", "b", "--gateway", "x"), "there is no gateway 'x'"),
    ],
)
def test_what_is_no_mapping_is_refused_by_the_command(
    cli: Parallama, words: tuple[str, ...], complaint: str
) -> None:
    assert complaint in cli.refused(2, "models", "map", *words)


def test_a_row_keeps_both_names(db: Database) -> None:
    async def story(at: Opened) -> None:
        await ledger.add(at.store, [a_record("r1", requested_model="gpt-4"), a_record("r2")])
        found = [row async for row in usage.rows(at.engine, usage.Which())]
        assert [row.requested_model for row in found] == ["gpt-4", None]

    on(db, story)


def test_usage_shows_both_names(cli: Parallama) -> None:
    cli.add(a_record("r1", model_name="llama2", requested_model="gpt-4"))
    (row,) = cli.json("usage", "list")
    assert (row["model_name"], row["requested_model"]) == ("llama2", "gpt-4")
    assert "REQUESTED MODEL" in cli.table("usage", "list")
    told = cli.json("explain", "--request", "r1")
    assert (told["model"], told["requested_model"]) == ("llama2", "gpt-4")
