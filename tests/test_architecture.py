"""What holds the parts together: names that nobody else owns, and one contract for metadata."""

import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallama import contract, http2
from parallama.supervisor.children import envoy_binary

ROOT = Path(__file__).parent.parent
ENVOY = ROOT / "envoy"
KEYS = {
    contract.LUA: contract.LUA_KEYS,
    contract.TEXT: contract.TEXT_KEYS,
    contract.AUTHZ: contract.AUTHZ_KEYS,
    contract.RATELIMIT: contract.RATELIMIT_KEYS,
}


@pytest.mark.parametrize("name", ["authz", "ratelimit", "usage_sink", "parallama"])
def test_no_other_distribution_owns_our_names(name: str) -> None:
    """PyPI has a `ratelimit` and an `authz`: with one of them, ours would be mixed or hidden."""
    assert set(packages_distributions().get(name, [])) <= {"parallama"}


def test_the_name_envoy_is_left_to_envoys_messages() -> None:
    assert not list(ENVOY.rglob("__init__.py"))


def test_tests_are_no_packages() -> None:
    """`tests/authz/__init__.py` would make pytest import that folder as `authz`."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_readme_can_be_read() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_envoy_takes_the_files_as_they_stand_in_the_repository(tmp_path: Path) -> None:
    (tmp_path / "envoy").symlink_to(ENVOY)
    (tmp_path / "trail").mkdir()  # it opens its logs
    done = subprocess.run(
        [envoy_binary(), "--mode", "validate", "-c", "envoy/envoy.yaml", "--disable-hot-restart"],
        cwd=tmp_path,
        capture_output=True,
        timeout=30,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# Metadata names. What Python uses are the constants of contract.py themselves.


def within(tree: Any) -> Iterator[Any]:
    yield tree
    for inner in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(inner, dict | list):
            yield from within(inner)


def metadata_in(file: Path) -> set[tuple[str, str]]:
    """Every namespace and key of dynamic metadata that a YAML file names."""
    text = file.read_text("utf-8")
    found = set(re.findall(r"%DYNAMIC_METADATA\(([^:)]+):([^:)]+)\)%", text))
    for at in within(yaml.safe_load(text)):
        if isinstance(at, dict) and isinstance(at.get("path"), list):
            found.add((at.get("filter") or at.get("key"), at["path"][0]["key"]))
        if isinstance(at, dict) and "metadata_namespace" in at:
            found.add((at["metadata_namespace"], at["key"]))
    return found


def lua() -> dict[str, str]:
    """Our filters by name, without their comments."""
    return {
        file.name: re.sub(r"--.*", "", file.read_text("utf-8"))
        for file in (ENVOY / "lua").glob("*.lua")
    }


def names(pattern: str) -> set[str]:
    return {name for text in lua().values() for name in re.findall(pattern, text)}


def test_yaml_reads_only_metadata_of_the_contract() -> None:
    found = metadata_in(ENVOY / "envoy.yaml") | metadata_in(ENVOY / "routes.yaml")
    assert {
        (contract.LUA, contract.TOTAL_TOKENS),
        (contract.AUTHZ, contract.CHECK_MODEL),
        (contract.RATELIMIT, contract.RESERVATION),
    } < found
    assert [(space, key) for space, key in found if key not in KEYS.get(space, ())] == []


def test_entries_that_waited_for_usage_sink_fit_into_one_message() -> None:
    """With one more, which has the text of a request and of its answer, and all their headers."""
    tree = yaml.safe_load((ENVOY / "envoy.yaml").read_text("utf-8"))
    (waiting,) = (
        at["buffer_size_bytes"]
        for at in within(tree)
        if isinstance(at, dict) and "buffer_size_bytes" in at
    )
    assert waiting + 2 * 90_000 + 2 * 65_536 < http2.STREAM_WINDOW


def test_descriptors_are_named_as_the_metadata_they_carry() -> None:
    entries = [
        at
        for at in within(yaml.safe_load((ENVOY / "envoy.yaml").read_text("utf-8")))
        if isinstance(at, dict) and "descriptor_key" in at
    ]
    carried = {
        at["descriptor_key"]: at["metadata_key"]["path"][0]["key"]
        for at in entries
        if "metadata_key" in at
    }
    assert carried == {key: key for key in carried}
    others = {at["descriptor_key"] for at in entries} - carried.keys()
    assert others == {contract.REQUEST_ID}


def test_lua_uses_the_namespaces_of_the_contract() -> None:
    given = {
        name: set(re.findall('"([^"]+)"', values))
        for text in lua().values()
        for name, values in re.findall(r"local ((?:NS|TEXT|AUTHZ)[A-Z, ]*) = ([^\n]+)", text)
    }
    assert given == {
        "NS": {contract.LUA},
        "NS, TEXT": {contract.LUA, contract.TEXT},
        "NS, AUTHZ": {contract.LUA, contract.AUTHZ},
        "AUTHZ, RATELIMIT": {contract.AUTHZ, contract.RATELIMIT},
    }
    others = r"(?:metadata|dynamicMetadata\(\)):[gs]et\((?!NS\b|TEXT\b|AUTHZ\b|RATELIMIT\b)([^,)]+)"
    assert names(others) == set()


def test_lua_reads_only_what_authz_writes() -> None:
    read = names(r"\bauthz\.(\w+)")
    assert contract.METERED in read
    assert read <= contract.AUTHZ_KEYS


def test_lua_writes_exactly_its_part_of_the_contract() -> None:
    written = (
        names(r'\bset\(NS, "(\w+)"')
        | names(r':note\("(\w+)"')
        | names(r"\bout\.(\w+) =")
        | set(re.findall(r"(\w+) = ", "".join(names(r"local out = \{([^}]*model[^}]*)\}"))))
    )
    assert written == contract.LUA_KEYS
    assert names(r"\bfacts\.(?!lua\b)(\w+)") <= contract.LUA_KEYS


def test_text_has_a_namespace_of_its_own_that_no_file_of_envoys_writes_down() -> None:
    assert names(r'\bset\(TEXT, "(\w+)"') == contract.TEXT_KEYS
    written = (ENVOY / "envoy.yaml").read_text("utf-8")
    assert contract.TEXT not in written
    assert "FILTER_STATE" not in written
    assert "%DYNAMIC_METADATA()%" not in written


def test_routes_tell_authz_what_the_contract_says() -> None:
    told = [
        at["context_extensions"]
        for at in within(yaml.safe_load((ENVOY / "routes.yaml").read_text("utf-8")))
        if isinstance(at, dict) and "context_extensions" in at
    ]
    assert len(told) >= 5
    for extensions in told:
        assert extensions.keys() == {
            contract.ROUTE_GATEWAY,
            contract.ROUTE_DIALECT,
            contract.ROUTE_BASE,
        }


@pytest.mark.parametrize("space", KEYS)
def test_python_names_every_key_once(space: str) -> None:
    """The sets list what is defined above them, so a new name cannot be left out of these tests."""
    constants = {
        name: value
        for name, value in vars(contract).items()
        if name.isupper() and isinstance(value, str) and not name.startswith("ROUTE_")
    }
    assert KEYS[space] <= set(constants.values())
    listed = frozenset().union(*KEYS.values())
    assert set(constants.values()) - listed == {*KEYS, contract.REQUEST_ID}
