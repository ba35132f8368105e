"""The example and the page about settings say what the code does."""

import re
from pathlib import Path

import pytest

from parallama.config import document, load, settings, warnings
from parallama.yamlfile import parse

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "config.example.yaml"
PAGE = ROOT / "docs" / "configuration.md"
ALL = list(settings())


def test_the_page_is_current() -> None:
    """`python -m parallama.config docs/configuration.md` makes it so."""
    text = PAGE.read_text("utf-8")
    assert document(text) == text


@pytest.mark.parametrize("path", [each.path for each in ALL])
def test_the_page_names_every_setting(path: str) -> None:
    assert f"`{path}`" in PAGE.read_text("utf-8")


def test_a_page_without_its_tables_gets_them_back() -> None:
    text = PAGE.read_text("utf-8")
    assert document(re.sub(r"\n### At the top.*\n(?=<!-- end)", "", text, flags=re.DOTALL)) == text


def test_the_example_loads_and_sets_nothing_in_vain() -> None:
    assert warnings(load(EXAMPLE, {})) == []


def test_the_example_holds_every_setting_with_its_default() -> None:
    text = re.sub(r"(?m)^( *)#([a-z_]+:)", r"\1\2", EXAMPLE.read_text("utf-8"))
    parsed = parse(text)
    assert parsed.mistakes == []
    held = flat(parsed.data)
    assert set(held) == {each.path for each in ALL}
    defaults = {each.path: each.default for each in ALL if each.default is not None}
    assert {path: held[path] for path in defaults} == defaults


READ = [each.path for each in ALL if "Not used yet." not in each.description]
READ_AS = {
    "api_gateways.ollama.host": "upstream",
    "api_gateways.ollama.default_model": "default_models",
    "database.password_file": "password",
    "api_gateways.ollama.count_tokens": "text_counted",
    "api_gateways.openai.count_tokens": "text_counted",
    "rate_limiting.time_zone": "zone",
    "redis.password_file": "password",
}
SOURCES = "".join(
    file.read_text("utf-8")
    for package in ("parallama", "authz", "ratelimit", "usage_sink")
    for file in sorted((ROOT / package).rglob("*.py"))
    if file.parent.name != "config" and file.name not in ("sections.py", "values.py")
)


@pytest.mark.parametrize("path", [path for path in READ if not path.endswith(".base_path")])
def test_what_is_not_marked_as_unused_is_used(path: str) -> None:
    """By its last name at least. (What nothing reads yet is LATER, and `warnings` says so.)"""
    name = READ_AS.get(path, path.rpartition(".")[2])
    assert re.search(rf"\.{name}\b", SOURCES)


def flat(data: object, above: str = "") -> dict[str, object]:
    """Values by dotted path. An empty mapping is a value."""
    if not isinstance(data, dict) or not data:
        return {above: data}
    found: dict[str, object] = {}
    for name, value in data.items():
        found |= flat(value, f"{above}.{name}".lstrip("."))
    return found
