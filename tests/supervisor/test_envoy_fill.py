"""Envoy's files for every configuration: what is filled in, and that Envoy takes all of it."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallama.config import load
from parallama.supervisor import envoy_files
from parallama.supervisor.children import envoy_binary
from parallama.supervisor.envoy_fill import named

Json = dict[str, Any]

ONE = "{}"
SEVERAL = '{hosts: ["http://10.0.0.1:11434", "http://[::1]:8080", "model.example.org:80"]}'
TLS = '{hosts: ["https://a.example.org:443", "https://10.0.0.1:8443"], silence_seconds: 5}'
NAMED = "{host: https://a.example.org, port: 443, max_parallel: 4}"


def written(folder: Path, text: str, own: Path | None = None) -> Path:
    """The folder with Envoy's files for this config.yaml."""
    (folder / "config.yaml").write_text(text + (f"\nenvoy: {{dir: {own}}}\n" if own else ""))
    config = load(folder / "config.yaml", {})
    into = folder / "check" / "envoy"
    envoy_files.write(config, config.api_gateways.ollama.upstreams(), into, 1)
    return into


def tree(into: Path, name: str) -> Any:
    return yaml.safe_load((into / name).read_text())


def upstream(into: Path) -> Json:
    found: Json = named("upstream", tree(into, "clusters.yaml")["resources"])
    return found


def addresses(cluster: Json) -> list[tuple[str, int]]:
    return [
        (at["address"], at["port_value"])
        for group in cluster["load_assignment"]["endpoints"]
        for each in group["lb_endpoints"]
        for at in [each["endpoint"]["address"]["socket_address"]]
    ]


def routes(into: Path) -> list[Json]:
    """What is done with those that go to the upstream."""
    (resource,) = tree(into, "routes.yaml")["resources"]
    (virtual_host,) = resource["virtual_hosts"]
    all_of_them = [at.get("route", {}) for at in virtual_host["routes"]]
    return [at for at in all_of_them if at.get("cluster") == "upstream"]


def virtual_host(into: Path) -> Json:
    found: Json = tree(into, "routes.yaml")["resources"][0]["virtual_hosts"][0]
    return found


EVERYBODY, SOME = '["*"]', '["https://a", "http://localhost:*"]'

PAIRS = [
    (ONE, "soft", "[]"), (ONE, "hard", EVERYBODY), (SEVERAL, "hard", "[]"),
    (SEVERAL, "soft", SOME), (TLS, "soft", EVERYBODY), (TLS, "hard", SOME), (NAMED, "hard", "[]"),
]  # fmt: skip
"""Each value of one beside each of the next."""


@pytest.mark.parametrize(("ollama", "enforcement", "origins"), PAIRS)
def test_envoy_takes_them_and_warns_of_nothing(
    tmp_path: Path, ollama: str, enforcement: str, origins: str
) -> None:
    into = written(
        tmp_path,
        f"api_gateways: {{ollama: {ollama}}}\nrate_limiting: {{enforcement: {enforcement}}}\n"
        f"server: {{cors: {{origins: {origins}}}}}\n",
    )
    (into.parent / "trail").mkdir()
    done = subprocess.run(
        [
            *(envoy_binary(), "-c", f"envoy/{envoy_files.WHOLE}", "--mode", "validate"),
            *("--disable-hot-restart", "--log-level", "warning"),
        ],
        cwd=into.parent,
        capture_output=True,
        timeout=30,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr[:2000]
    assert (done.stdout + done.stderr).strip() == f"configuration 'envoy/{envoy_files.WHOLE}' OK"


def test_one_upstream_takes_the_place_of_the_first_endpoint_and_others_stay(tmp_path: Path) -> None:
    own = tmp_path / "own"
    subprocess.run(["cp", "-r", envoy_files.packaged(), own], check=True)
    clusters = tree(own, "clusters.yaml")
    groups = named("upstream", clusters["resources"])["load_assignment"]["endpoints"]
    added = {"socket_address": {"address": "10.0.0.9", "port_value": 1}}
    groups[0]["lb_endpoints"].append({"endpoint": {"address": added}})
    (own / "clusters.yaml").write_text(yaml.safe_dump(clusters))
    into = written(tmp_path, "api_gateways: {ollama: {host: 10.0.0.1, port: 2}}", own)
    assert addresses(upstream(into)) == [("10.0.0.1", 2), ("10.0.0.9", 1)]
    several = written(tmp_path, f"api_gateways: {{ollama: {SEVERAL}}}", own)
    assert addresses(upstream(several)) == [
        ("10.0.0.1", 11434), ("::1", 8080), ("model.example.org", 80),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ollama", "again"),
    [
        (ONE, False),
        ("{host: localhost}", False),
        ("{host: '::1'}", False),
        ("{host: models.example.org}", True),
        (SEVERAL, True),
    ],
)
def test_only_another_server_is_asked_again(tmp_path: Path, ollama: str, again: bool) -> None:
    into = written(tmp_path, f"api_gateways: {{ollama: {ollama}}}")
    has = {"retry_policy" in at for at in routes(into)}
    assert has == ({True, False} if again else {False})  # uploads never


def test_what_may_have_been_generated_is_not_asked_for_again(tmp_path: Path) -> None:
    into = written(tmp_path, f"api_gateways: {{ollama: {SEVERAL}}}")
    for at in routes(into):
        if "retry_policy" in at:
            told = at["retry_policy"]
            assert told["retry_on"] == "connect-failure,refused-stream,retriable-status-codes"
            assert told["retriable_status_codes"] == [503]
            assert "per_try_timeout" not in told
            assert "per_try_idle_timeout" not in told


def test_how_long_silence_lasts_and_how_many_calls_there_are_at_once(tmp_path: Path) -> None:
    into = written(tmp_path, "api_gateways: {ollama: {silence_seconds: 7, max_parallel: 3}}")
    assert {at["idle_timeout"] for at in routes(into)} == {"7s"}
    (threshold,) = upstream(into)["circuit_breakers"]["thresholds"]
    assert threshold["max_requests"] == 3
    assert not any(
        "idle_timeout" in at for at in routes(written(tmp_path, f"api_gateways: {{ollama: {ONE}}}"))
    )


def test_tls_is_verified_by_the_names_of_all_hosts(tmp_path: Path) -> None:
    into = written(tmp_path, f"api_gateways: {{ollama: {TLS}}}")
    told = upstream(into)["transport_socket"]["typed_config"]
    names = told["common_tls_context"]["validation_context"]["match_typed_subject_alt_names"]
    assert names == [
        {"san_type": "DNS", "matcher": {"exact": "a.example.org"}},
        {"san_type": "IP_ADDRESS", "matcher": {"exact": "10.0.0.1"}},
    ]
    assert told["auto_host_sni"] is True


def test_what_is_off_costs_nothing(tmp_path: Path) -> None:
    """Filters that a configuration does not need are disabled."""

    def disabled(into: Path) -> set[str]:
        listener = named("gateway", tree(into, "listeners-1.yaml")["resources"])
        (manager,) = listener["filter_chains"][0]["filters"]
        filters = manager["typed_config"]["http_filters"]
        return {each["name"] for each in filters if each.get("disabled")}

    into = written(tmp_path, f"api_gateways: {{ollama: {ONE}}}")
    assert {"cors", "cap"} <= disabled(into)
    assert "cors" not in virtual_host(into)["typed_per_filter_config"]
    into = written(tmp_path, "rate_limiting: {enforcement: hard}")
    assert "cap" not in disabled(into)


@pytest.mark.parametrize(
    ("origins", "credentials"),
    [
        ('["*"]', False),
        ('["https://a"]', True),
        ('["https://*.a"]', True),
        ('["*", "https://a"]', False),
    ],
)
def test_cookies_pass_from_named_origins_alone(
    tmp_path: Path, origins: str, credentials: bool
) -> None:
    into = written(tmp_path, f"server: {{cors: {{origins: {origins}, headers: [X-Mine]}}}}")
    told = virtual_host(into)["typed_per_filter_config"]["cors"]
    assert told["allow_credentials"] is credentials
    assert told["allow_headers"].endswith(", x-mine")


@pytest.mark.parametrize(
    ("origin", "good", "bad"),
    [
        ("https://a.net", ["https://a.net"], ["https://a.net:1", "http://a.net", "https://a-net"]),
        (
            "http://localhost:*",
            ["http://localhost:1"],
            ["http://localhost:1.net", "http://localhost:"],
        ),
        (
            "https://*.a.net",
            ["https://x.y.a.net"],
            [
                "https://e.net/.a.net",
                "https://e.net:1.a.net",
                "https://e.net?.a.net",
                "https://e@.a.net",
            ],
        ),
    ],
)
def test_an_origin_with_a_star_is_not_more_than_it_says(
    tmp_path: Path, origin: str, good: list[str], bad: list[str]
) -> None:
    into = written(tmp_path, f'server: {{cors: {{origins: ["{origin}"]}}}}')
    (told,) = virtual_host(into)["typed_per_filter_config"]["cors"]["allow_origin_string_match"]

    def allowed(given: str) -> bool:
        if "exact" in told:
            return bool(told["exact"] == given)
        return bool(re.fullmatch(told["safe_regex"]["regex"], given))

    assert all(map(allowed, good))
    assert not any(map(allowed, bad))
