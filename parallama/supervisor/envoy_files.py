"""Envoy's files as `up` runs them: the operator's, with the addresses of config.yaml in them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import parallama
from parallama.config import Config
from parallama.errors import ParallamaError

_HERE = Path(parallama.__file__).parent
_HCM = "envoy.filters.network.http_connection_manager"

_TLS_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"

Upstream = tuple[str, str, int]
"""Scheme, host and port."""


def packaged() -> Path:
    """The Envoy files that come with Parallama: in the package, or beside it in a checkout."""
    inside = _HERE / "share" / "envoy"
    return inside if inside.is_dir() else _HERE.parent / "envoy"


def render(config: Config, upstream: Upstream, into: Path) -> None:
    """
    Write Envoy's files to `into`, each by renaming it into place, so that a running Envoy reloads.

    The addresses in envoy.yaml and clusters.yaml are replaced; all else stays as the operator
    wrote it.
    """
    source = config.envoy.dir or packaged()
    (into / "lua").mkdir(parents=True, exist_ok=True)
    for script in sorted((source / "lua").glob("*.lua")):
        shutil.copyfile(script, into / "lua" / script.name)
    _place(into / "envoy.yaml", _edited(source / "envoy.yaml", lambda at: _listen(at, config)))
    clusters = _edited(source / "clusters.yaml", lambda at: _send_to(at, upstream))
    _place(into / "clusters.yaml", clusters)
    _place(into / "routes.yaml", _read(source / "routes.yaml"))


def _edited(path: Path, edit: Callable[[Any], None]) -> str:
    try:
        tree = yaml.safe_load(_read(path))
        edit(tree)
    except yaml.YAMLError as error:
        raise ParallamaError(f"{path} is not YAML: {error}") from error
    except (KeyError, IndexError, TypeError, StopIteration) as error:
        raise ParallamaError(
            f"{path} has no listener 'gateway' or no cluster 'upstream' as Parallama knows them:"
            f" compare it with {packaged()}"
        ) from error
    return yaml.safe_dump(tree, sort_keys=False, width=200)


def _listen(bootstrap: Any, config: Config) -> None:
    listener = next(
        at for at in bootstrap["static_resources"]["listeners"] if at["name"] == "gateway"
    )
    listener["address"] = _socket(config.server.host, config.server.port)
    manager = next(at for at in listener["filter_chains"][0]["filters"] if at["name"] == _HCM)
    manager["typed_config"]["xff_num_trusted_hops"] = config.server.trusted_hops


def _send_to(clusters: Any, upstream: Upstream) -> None:
    scheme, host, port = upstream
    cluster = next(at for at in clusters["resources"] if at["name"] == "upstream")
    endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    endpoint["address"] = _socket(host, port)
    if scheme == "https":
        cluster["transport_socket"] = _tls(host)


def _socket(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _tls(host: str) -> dict[str, Any]:
    """A verified TLS connection to `host`."""
    trust = {"trusted_ca": {"filename": "/etc/ssl/certs/ca-certificates.crt"}}
    names = [{"san_type": "DNS", "matcher": {"exact": host}}]
    return {
        "name": "tls",
        "typed_config": {
            "@type": _TLS_TYPE,
            "sni": host,
            "common_tls_context": {
                "validation_context": trust | {"match_typed_subject_alt_names": names}
            },
        },
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ParallamaError(f"cannot read {path}: {error.strerror}") from error


def _place(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
