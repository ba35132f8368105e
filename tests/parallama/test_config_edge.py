"""Settings of the edge: several upstreams, and pages that may call."""

from pathlib import Path
from typing import Any

import pytest

from parallama.config import Config, load
from parallama.errors import ConfigError


def loaded(folder: Path, text: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return load(path, {})


def of_hosts(folder: Path, hosts: str, more: str = "") -> list[Any]:
    config = loaded(folder, f"api_gateways: {{ollama: {{hosts: {hosts}{more}}}}}")
    return config.api_gateways.ollama.upstreams()


def test_several_upstreams(tmp_path: Path) -> None:
    assert of_hosts(tmp_path, '[10.0.0.1:11434, "http://[::1]:80", "http://a.example.org:1"]') == [
        ("http", "10.0.0.1", 11434), ("http", "::1", 80), ("http", "a.example.org", 1),
    ]  # fmt: skip
    assert of_hosts(tmp_path, '["https://a:443", "https://b:443"]') == [
        ("https", "a", 443), ("https", "b", 443),
    ]  # fmt: skip
    assert of_hosts(tmp_path, "[]") == [("http", "127.0.0.1", 11434)]


@pytest.mark.parametrize(
    ("hosts", "more", "told"),
    [
        ("[10.0.0.1]", "", "must name a host and a port, such as http://10.0.0.1:11434"),
        ('["http://a:99999"]', "", "must name a host and a port"),
        ('["ftp://a:1"]', "", "must begin with http:// or https://"),
        ('["http://u:p@a:1"]', "", "must not hold a user or a password"),
        ('["http://a:1/v1"]', "", "must end after the host"),
        ('["http://a:1", "https://b:1"]', "", "must be all http:// or all https://"),
        ('["http://a:1"]', ", port: 1", "stands instead of `host` and `port`"),
        ('["http://a:1"]', ", host: b", "stands instead of `host` and `port`"),
    ],
)
def test_upstreams_that_are_none(tmp_path: Path, hosts: str, more: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_hosts(tmp_path, hosts, more)
    assert told in str(caught.value)
    assert "(line 1)" in str(caught.value)


@pytest.mark.parametrize(
    "origin",
    ["*", "https://A.example.org", "http://localhost:*", "https://*.a.net:8443",
     "chrome-extension://abc", "http://[::1]:3000"],
)  # fmt: skip
def test_an_origin(tmp_path: Path, origin: str) -> None:
    config = loaded(tmp_path, f'server: {{cors: {{origins: ["{origin}"]}}}}')
    assert config.server.cors.origins == (origin.lower(),)


@pytest.mark.parametrize(
    "origin", ["", "a.net", "https://a.net/", "https://a.net/x", "https://", "https://a b", "**"]
)
def test_what_no_browser_sends_as_origin(tmp_path: Path, origin: str) -> None:
    with pytest.raises(ConfigError, match="must be an origin as browsers send it"):
        loaded(tmp_path, f'server: {{cors: {{origins: ["{origin}"]}}}}')
