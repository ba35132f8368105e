"""The pages name what there is, and what they name exists."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from parallama import contract, endpoints, keys, roles
from parallama.cli import app
from parallama.config import settings
from parallama.usage import UsageRecord

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
WRITTEN = [page for page in PAGES if page.name not in ("cli.md", "configuration.md")]
SOURCES = "".join(
    file.read_text("utf-8")
    for folder in ("authz", "ratelimit", "usage_sink", "parallama", "envoy")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".py", ".lua", ".yaml")
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(command, TyperGroup):
        for verb, inner in command.commands.items():
            yield from commands(inner, (*words, verb))
    else:
        yield words, command


COMMANDS = dict(commands(get_command(app)))
TARGETS = re.findall(r"(?m)^([a-z-]+):.*##", text("Makefile"))


# What there is, is named.


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent != ROOT], ids=name)
def test_every_page_is_linked_from_the_index(page: Path) -> None:
    if page.name != "index.md":
        assert f"({page.relative_to(DOCS)})" in text("docs/index.md")


@pytest.mark.parametrize("page", ["docs/index.md", "CONTRIBUTING.md", "LICENSE", "CHANGELOG.md"])
def test_every_page_at_the_top_is_there_and_linked(page: str) -> None:
    assert (ROOT / page).is_file()
    if page != "LICENSE":
        assert f"{page})" in text("README.md") + text("docs/index.md")


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_is_named(target: str) -> None:
    assert f"`make {target}`" in text("CONTRIBUTING.md")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_named(words: tuple[str, ...]) -> None:
    assert f"\n## parallama {' '.join(words)}\n" in text("docs/cli.md")


@pytest.mark.parametrize("name", sorted(field.name for field in fields(UsageRecord)))
def test_every_field_of_a_usage_row_is_explained(name: str) -> None:
    told = text("docs/how-it-works.md")
    table = told[told.index("## What a usage row means") :]
    assert re.search(rf"(?m)^\| [^|]*`{name}`[^|]* \| \S", table)


NAMESPACES = {
    contract.AUTHZ: contract.AUTHZ_KEYS,
    contract.TEXT: contract.TEXT_KEYS,
    contract.LUA: contract.LUA_KEYS,
    contract.RATELIMIT: contract.RATELIMIT_KEYS,
}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_metadata_is_named_in_full_and_nothing_else(namespace: str) -> None:
    rows = re.findall(
        rf"(?m)^\| `{re.escape(namespace)}` \|[^|]*\|(.*)\|$", text("docs/how-it-works.md")
    )
    named = {key for row in rows for key in re.findall(r"`([a-z_]+)`", row)}
    assert named == NAMESPACES[namespace]


# What is named, exists.


def links(page: Path) -> Iterator[tuple[Path, str]]:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_link_is_dead(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target}#{anchor}"


def shown(page: Path) -> Iterator[str]:
    """Lines of shell, in blocks or between backticks."""
    told = page.read_text("utf-8")
    for block in re.findall(r"(?ms)^```sh\n(.*?)^```", told):
        yield from block.replace("\\\n", " ").splitlines()
    for block in re.findall(r"(?m)^    ((?:make|parallama) .*)$", told):
        yield block
    without_blocks = re.sub(r"(?ms)^```.*?^```", "", told)
    yield from re.findall(r"`([^`\n]+)`", without_blocks)


def calls(page: Path, program: str) -> Iterator[list[str]]:
    for line in shown(page):
        found = re.match(rf"(?:\.venv/bin/)?{program} (.*)", line)
        if found:
            yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_commands_that_are_shown_exist_and_take_these_options(page: Path) -> None:
    for words in calls(page, "parallama"):
        if words == ["..."]:
            continue
        nouns = {known[:1] for known in COMMANDS} | set(COMMANDS)
        command = COMMANDS.get(tuple(words[:2])) or COMMANDS.get(tuple(words[:1]))
        assert command is not None or tuple(words) in nouns, words
        options = {word.partition("=")[0] for word in words if re.match("-+[a-z]", word)}
        known = {option for at in getattr(command, "params", ()) for option in at.opts}
        assert options <= known, words


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_make_targets_that_are_shown_exist(page: Path) -> None:
    for words in calls(page, "make"):
        assert words[0] in TARGETS, words


KNOWN_SETTINGS = {setting.path for setting in settings()}
SECTIONS = {path.partition(".")[0] for path in KNOWN_SETTINGS if "." in path}


OTHER_NAMES = re.compile(r"envoy\.filters\.|.*\.(py|yaml|db|log|lua)$")


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_settings_that_are_named_exist(page: Path) -> None:
    for word in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: [^`]+)?`", page.read_text("utf-8")):
        if word.partition(".")[0] in SECTIONS and not OTHER_NAMES.match(word):
            assert word in KNOWN_SETTINGS


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    top = "authz|ratelimit|usage_sink|parallama|envoy|tests|bench|docs"
    for path in re.findall(rf"`((?:{top})/[\w./-]*)`", page.read_text("utf-8")):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.parent == DOCS], ids=name)
def test_codes_and_log_events_that_are_named_exist(page: Path) -> None:
    told = re.sub(r"(?ms)^```.*?^```", "", page.read_text("utf-8"))
    tables = "".join(re.findall(r"(?m)^\|.*\|$", told))
    for event in re.findall(r"`([a-z]+(?: [a-z]+){1,4})`", tables):
        assert f'"{event}' in SOURCES or f"{event} " in text("docs/cli.md"), event
    for code in re.findall(r"(?:503|504|code) `([a-z_]+)`", told):
        assert code in SOURCES, code


# What is said, is so.


def rows(page: str, columns: int) -> list[list[str]]:
    """The cells of all tables that are so wide, without their heads."""
    lines = re.findall(r"(?m)^\| .* \|$", text(page))
    split = [[cell.strip().strip("`") for cell in line.strip("| ").split(" | ")] for line in lines]
    return [cells for cells in split if len(cells) == columns]


def test_the_table_of_endpoints_is_that_of_the_code() -> None:
    head, *told = rows("docs/endpoints.md", 7)
    assert head[3:] == list(roles.Role)
    for method, path, action, *may in told:
        endpoint = endpoints.find_endpoint(method, path)
        assert endpoint is not None, path
        assert action == endpoint.action
        assert may == [
            "yes" if roles.permits(roles.BUILT_IN[at], "models", endpoint.action) else "no"
            for at in roles.Role
        ]
    listed = {(method, path) for method, path, *_ in told}
    assert listed >= {*endpoints._OLLAMA, *endpoints._OPENAI}
    assert {path for _, path in listed} >= {endpoints.ONE_MODEL, "/api/blobs/sha256:{digest}"}


def routes() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text("envoy/routes.yaml"))["resources"][0]
    return found


def test_the_table_of_prefixes_is_that_of_the_routes() -> None:
    dialects = {
        "ollama": "Ollama", "openai": "OpenAI", "anthropic": "Anthropic", "problem": "problem"
    }  # fmt: skip
    real = []
    for route in routes()["virtual_hosts"][0]["routes"]:
        identity = route.get("typed_per_filter_config", {}).get("identity", {})
        match = route["match"]
        prefix = match.get("prefix") or match.get("path_separated_prefix")
        special = "-blobs" in route["name"] or route.get("route", {}).get("cluster") == "catalog"
        if "check_settings" in identity and prefix and not special:
            told = identity["check_settings"]["context_extensions"]
            goes_to = route["route"].get("prefix_rewrite", prefix)
            assert prefix == told["base"] + goes_to
            real.append(
                [f"{prefix}...", f"{goes_to}...", told["gateway"], dialects[told["dialect"]]]
            )
    _, *told = rows("docs/endpoints.md", 4)
    assert sorted(told) == sorted(real)


def test_the_headers_that_never_pass_are_those_that_are_removed() -> None:
    told = text("docs/security.md")
    section = told[told.index("## What never passes on") :].split("\n## ")[0]
    assert re.findall(r"`([a-z-]+)`", section) == routes()["request_headers_to_remove"]


def test_the_expression_that_finds_keys_is_the_published_one() -> None:
    assert f"\n      {keys.PATTERN}\n" in text("docs/security.md")


@pytest.mark.parametrize(
    ("page", "said", "source", "line"),
    [
        ("docs/operations.md", "32 MiB at most", "envoy/routes.yaml", "buffer_limit: 33554432"),
        ("docs/operations.md", "for 30 minutes is cut", "envoy/envoy.yaml", "idle_timeout: 1800s"),
        ("docs/operations.md", "10,000 client", "envoy/envoy.yaml", "connections: 10000"),
        ("docs/operations.md", "4 GiB", "envoy/envoy.yaml", "heap_size_bytes: 4294967296"),
        ("docs/operations.md", "5,000 rows", "usage_sink/__main__.py", "_QUEUE_ROWS = 5_000"),
        ("docs/operations.md", "up to 15", "parallama/supervisor/__main__.py", "SECONDS = 15.0"),
        ("docs/operations.md", "10 seconds", "parallama/supervisor/child.py", "SECONDS = 10.0"),
        ("docs/operations.md", "107 bytes", "parallama/stores.py", "_PATH = 107"),
        ("docs/limits.md", "is at most 5", "ratelimit/rules.py", "_HELD_RETRY = 5"),
        ("docs/limits.md", "two minutes cannot", "ratelimit/rules.py", "LONGEST_RETRY = 120"),
        ("docs/when-things-fail.md", "after 5 s", "envoy/envoy.yaml", "timeout: 5s"),
        ("docs/models.md", "more than 200 on one", "parallama/mappings.py", "MOST = 200"),
        ("docs/models.md", "over 256 bytes", "parallama/mappings.py", "LONGEST_NAME = 256"),
        ("docs/how-it-works.md", "4 bytes a token", "envoy/lua/tally.lua", "PER_TOKEN = 4"),
        ("docs/how-it-works.md", "above 16 MB", "envoy/lua/follow.lua", "16 * 1024 * 1024"),
    ],
)  # fmt: skip
def test_numbers_are_those_of_the_sources(page: str, said: str, source: str, line: str) -> None:
    assert said in text(page)
    assert line in text(source)


@pytest.mark.parametrize("page", sorted((DOCS / "decisions").glob("*.md")), ids=name)
def test_a_decision_has_its_number_and_three_parts(page: Path) -> None:
    told = page.read_text("utf-8")
    number = int(page.name[:4])
    assert re.match(rf"# {number}\. \S", told)
    assert {"## Context", "## Choice", "## Cost"} <= set(told.splitlines())


def test_what_is_not_released_stands_on_top_of_the_changelog() -> None:
    sections = re.findall(r"(?m)^## (.+)$", text("CHANGELOG.md"))
    assert sections[0] == "[Unreleased]"
