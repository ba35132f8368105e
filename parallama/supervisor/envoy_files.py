"""Envoy's files as `up` runs them: the operator's, with the addresses of config.yaml in them."""

import copy
import ipaddress
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

import parallama
from parallama.config import Config
from parallama.errors import ParallamaError

_HERE = Path(parallama.__file__).parent
_HCM = "envoy.filters.network.http_connection_manager"
_TYPES = "type.googleapis.com/envoy"
_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"

WHOLE = "whole.yaml"
"""All that Envoy is given, in one file: `--mode validate` does not follow envoy.yaml to others."""

TRIAL = "trial.yaml"
"""The same for one that nobody asks but us, at TRIAL_SOCKET."""

TRIAL_SOCKET = "run/trial.sock"

_FOLDERS = {"lua": "*.lua", "wasm": "*.wasm"}
_STARTING = (*_FOLDERS, "envoy.yaml", "clusters.yaml", "routes.yaml")
_LISTENERS = "listeners-{}.yaml"

RELOADING = ("lua", "clusters.yaml", "routes.yaml")
"""What a running Envoy reads again, without an effect on requests that run."""


def starting(number: int) -> tuple[str, ...]:
    """
    What a starting Envoy reads. Each start has its `number`: the listeners of one Envoy are not
    those of another that still runs beside it.
    """
    return (*_STARTING, _LISTENERS.format(number))


Upstream = tuple[str, str, int]
"""Scheme, host and port."""


def packaged() -> Path:
    """The Envoy files that come with Parallama: in the package, or beside it in a checkout."""
    inside = _HERE / "share" / "envoy"
    return inside if inside.is_dir() else _HERE.parent / "envoy"


def write(config: Config, upstream: Upstream, into: Path, number: int) -> None:
    """
    Write all files to `into`, which Envoy does not read: see `place`.

    The addresses in envoy.yaml and clusters.yaml are replaced, and the listeners get a file of
    their own (see `_move_listeners`); all else stays as the operator wrote it.
    """
    source = config.envoy.dir or packaged()
    shutil.rmtree(into, ignore_errors=True)
    for folder, pattern in _FOLDERS.items():
        (into / folder).mkdir(parents=True, mode=0o700)
        for file in sorted((source / folder).glob(pattern)):
            (into / folder / file.name).write_bytes(_bytes(file))

    bootstrap, clusters, routes = (
        _read(source / name) for name in ("envoy.yaml", "clusters.yaml", "routes.yaml")
    )
    (into / "routes.yaml").write_text(_text(source / "routes.yaml"), encoding="utf-8")
    try:
        _listen(bootstrap, config)
        _send_to(clusters, upstream)
        whole = _whole(bootstrap, clusters, routes)
        trial = _trial(whole)
        listeners = _move_listeners(bootstrap, _LISTENERS.format(number))
    except (LookupError, TypeError, AttributeError) as error:
        raise ParallamaError(
            f"the files in {source} lack what Parallama fills in or needs ({error}):"
            f" compare them with {packaged()}"
        ) from error
    written = {
        "envoy.yaml": bootstrap,
        _LISTENERS.format(number): listeners,
        "clusters.yaml": clusters,
        WHOLE: whole,
        TRIAL: trial,
    }
    for name, tree in written.items():
        (into / name).write_text(yaml.safe_dump(tree, sort_keys=False, width=200), encoding="utf-8")


def place(names: Iterable[str], written: Path, into: Path) -> None:
    """Move what `write` wrote to where Envoy reads it, file by file: it reloads what is renamed."""
    for folder in _FOLDERS:
        (into / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in names:
        for file in _files(written / name):
            os.replace(file, into / file.relative_to(written))


def keep(placed: Path, at: Path) -> None:
    """Copy what a starting Envoy reads, whichever it is, to put it back by `put_back`."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(placed, at)


def put_back(at: Path, placed: Path) -> None:
    place(_STARTING, at, placed)


def waiting(written: Path, placed: Path, number: int) -> bool:
    """Whether `write` made something that a running Envoy does not take up."""
    kept = set(starting(number)) - set(RELOADING)
    return any(
        _differ(file, placed / file.relative_to(written))
        for name in kept
        for file in _files(written / name)
    )


def close_listeners(folder: Path, number: int | None = None) -> None:
    """
    Make Envoys close every connection; what they log about them is still sent.

    Of all that run, but for the one of this `number`.
    """
    kept = _LISTENERS.format(number)
    for path in folder.glob(_LISTENERS.format("*")):
        if path.name != kept:
            fresh = path.with_suffix(".new")
            fresh.write_text("resources: []\n", encoding="utf-8")
            os.replace(fresh, path)


def remove_listeners(folder: Path, number: int) -> None:
    """What no Envoy reads any more, now that the one of this `number` is the only one."""
    kept = _LISTENERS.format(number)
    for path in folder.glob(_LISTENERS.format("*")):
        if path.name != kept:
            path.unlink()


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise ParallamaError(f"{path} is not YAML: {error}") from error


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ParallamaError(f"{path} is not UTF-8 text: {error}") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ParallamaError(f"cannot read {path}: {error.strerror}") from error


def _differ(file: Path, other: Path) -> bool:
    return not other.is_file() or file.read_bytes() != other.read_bytes()


def _files(path: Path) -> list[Path]:
    """Itself, or what lies in it."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _gateway(bootstrap: Any) -> tuple[Any, Any]:
    """The listener of that name, and its HTTP connection manager."""
    listener = _named("gateway", bootstrap["static_resources"]["listeners"])
    return listener, _named(_HCM, listener["filter_chains"][0]["filters"])["typed_config"]


def _named(name: str, things: Any) -> Any:
    found = [thing for thing in things if thing["name"] == name]
    if not found:
        raise LookupError(f"nothing is named {name}")
    return found[0]


def _listen(bootstrap: Any, config: Config) -> None:
    listener, manager = _gateway(bootstrap)
    listener["address"] = _socket(config.server.host, config.server.port)
    manager["xff_num_trusted_hops"] = config.server.trusted_hops


def _move_listeners(bootstrap: Any, name: str) -> Any:
    """
    Take the listeners out of `bootstrap` into a file that Envoy watches.

    Only a listener that is removed closes its connections while Envoy lives on, and only so do the
    usage rows of streams that a stop has to cut reach the sink. One that accepts nothing stays
    behind: it keeps the access log, with what waits there, from going with the last of them.
    """
    _, manager = _gateway(bootstrap)
    nothing = _typed("extensions.filters.network.direct_response.v3.Config")
    keeper = {
        "name": "keeps-the-access-log",
        "bind_to_port": False,
        "address": _socket("127.0.0.1", 1),
        "access_log": copy.deepcopy(manager.get("access_log", [])),
        "filter_chains": [{"filters": [nothing]}],
    }
    listeners = bootstrap["static_resources"]["listeners"]
    bootstrap["static_resources"]["listeners"] = [keeper]
    watched = {"path": f"envoy/{name}", "watched_directory": {"path": "envoy"}}
    bootstrap.setdefault("dynamic_resources", {})["lds_config"] = {"path_config_source": watched}
    kind = {"@type": f"{_TYPES}.config.listener.v3.Listener"}
    return {"resources": [kind | listener for listener in listeners]}


def _whole(bootstrap: Any, clusters: Any, routes: Any) -> Any:
    """One file that holds what the others say, and in which Envoy checks names between them."""
    whole = copy.deepcopy(bootstrap)
    whole.pop("dynamic_resources", None)
    whole["static_resources"]["clusters"] += _untyped(clusters)
    _, manager = _gateway(whole)
    if (rds := manager.pop("rds", None)) is not None:
        manager["route_config"] = _named(rds["route_config_name"], _untyped(routes))
        manager["route_config"]["validate_clusters"] = True
    return whole


def _trial(whole: Any) -> Any:
    trial = copy.deepcopy(whole)
    trial.pop("admin", None)
    listener, _ = _gateway(trial)
    listener["address"] = {"pipe": {"path": TRIAL_SOCKET, "mode": 0o600}}
    trial["static_resources"]["listeners"] = [listener]
    return trial


def _untyped(resources: Any) -> list[Any]:
    return [
        {name: value for name, value in resource.items() if name != "@type"}
        for resource in resources["resources"]
    ]


def _send_to(clusters: Any, upstream: Upstream) -> None:
    scheme, host, port = upstream
    cluster = _named("upstream", clusters["resources"])
    endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    endpoint["address"] = _socket(host, port)
    if scheme == "https":
        cluster["transport_socket"] = _tls(host)


def _socket(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _tls(host: str) -> dict[str, Any]:
    """A verified TLS connection to `host`. SSL_CERT_FILE means what it means to OpenSSL."""
    trusted = {"filename": os.environ.get("SSL_CERT_FILE", _CA_BUNDLE)}
    kind = "IP_ADDRESS" if _is_address(host) else "DNS"
    expected = [{"san_type": kind, "matcher": {"exact": host}}]
    validation = {"trusted_ca": trusted, "match_typed_subject_alt_names": expected}
    return _typed(
        "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        common_tls_context={"validation_context": validation},
        **({} if _is_address(host) else {"sni": host}),
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _typed(kind: str, **fields: Any) -> dict[str, Any]:
    return {"name": kind, "typed_config": {"@type": f"{_TYPES}.{kind}", **fields}}
