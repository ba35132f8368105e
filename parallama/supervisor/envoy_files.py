"""Envoy's files as `up` runs them: the operator's, with the addresses of config.yaml in them."""

import copy
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

import parallama
from parallama.config import Config
from parallama.errors import ParallamaError
from parallama.supervisor.envoy_fill import Upstream, fill, gateway, named, socket, typed

_HERE = Path(parallama.__file__).parent
_LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"

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


def packaged() -> Path:
    """The Envoy files that come with Parallama: in the package, or beside it in a checkout."""
    inside = _HERE / "share" / "envoy"
    return inside if inside.is_dir() else _HERE.parent / "envoy"


def write(config: Config, upstreams: Sequence[Upstream], into: Path, number: int) -> None:
    """
    Write all files to `into`, which Envoy does not read: see `place`.

    What is set in config.yaml is filled in, and the listeners get a file of their own (see
    `_move_listeners`); all else stays as the operator wrote it.
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
    try:
        fill(bootstrap, clusters, routes, config=config, upstreams=upstreams)
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
        "routes.yaml": routes,
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


def _move_listeners(bootstrap: Any, name: str) -> Any:
    """
    Take the listeners out of `bootstrap` into a file that Envoy watches.

    Only a listener that is removed closes its connections while Envoy lives on, and only so do the
    usage rows of streams that a stop has to cut reach the sink. One that accepts nothing stays
    behind: it keeps the access log, with what waits there, from going with the last of them.
    """
    _, manager = gateway(bootstrap)
    nothing = typed("extensions.filters.network.direct_response.v3.Config")
    keeper = {
        "name": "keeps-the-access-log",
        "bind_to_port": False,
        "address": socket("127.0.0.1", 1),
        "access_log": copy.deepcopy(manager.get("access_log", [])),
        "filter_chains": [{"filters": [nothing]}],
    }
    listeners = bootstrap["static_resources"]["listeners"]
    bootstrap["static_resources"]["listeners"] = [keeper]
    watched = {"path": f"envoy/{name}", "watched_directory": {"path": "envoy"}}
    bootstrap.setdefault("dynamic_resources", {})["lds_config"] = {"path_config_source": watched}
    return {"resources": [{"@type": _LISTENER} | listener for listener in listeners]}


def _whole(bootstrap: Any, clusters: Any, routes: Any) -> Any:
    """One file that holds what the others say, and in which Envoy checks names between them."""
    whole = copy.deepcopy(bootstrap)
    whole.pop("dynamic_resources", None)
    whole["static_resources"]["clusters"] += _untyped(clusters)
    for manager in _managers(whole):
        if (rds := manager.pop("rds", None)) is not None:
            found = named(rds["route_config_name"], _untyped(routes))
            manager["route_config"] = found | {"validate_clusters": True}
    return whole


def _managers(bootstrap: Any) -> list[Any]:
    """What is told to those who pass connections on, of every listener."""
    return [
        each["typed_config"]
        for listener in bootstrap["static_resources"]["listeners"]
        for chain in listener["filter_chains"]
        for each in chain["filters"]
    ]


def _trial(whole: Any) -> Any:
    trial = copy.deepcopy(whole)
    trial.pop("admin", None)
    listener, _ = gateway(trial)
    listener["address"] = {"pipe": {"path": TRIAL_SOCKET, "mode": 0o600}}
    trial["static_resources"]["listeners"] = [listener]
    return trial


def _untyped(resources: Any) -> list[Any]:
    return [
        {name: value for name, value in resource.items() if name != "@type"}
        for resource in resources["resources"]
    ]
