"""`parallama restart`."""

import asyncio
import json
import socket
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama.cli import running
from parallama.cli.desk import load_config
from parallama.cli.options import ConfigPath
from parallama.errors import ParallamaError

if TYPE_CHECKING:
    from parallama.config import Config


class Service(StrEnum):
    AUTHZ = "authz"
    RATELIMIT = "ratelimit"
    USAGE_SINK = "usage_sink"
    ENVOY = "envoy"


Services = Annotated[
    list[Service] | None,
    typer.Argument(metavar="SERVICE", help="authz, ratelimit, usage_sink, envoy; or all."),
]


def restart(services: Services = None, config: ConfigPath = None) -> None:
    """
    Put new processes in the place of running ones, without a pause: one after the other.

    The new ones read the configuration and the installed version anew. Requests that run end on
    the old Envoy, within shutdown.drain_seconds. One that does not come up changes nothing.
    """
    from parallama.cli.up import check_database

    loaded = load_config(config)
    if running.pid_of_up(loaded.state_dir) is None:
        raise ParallamaError(
            f"nothing runs on {loaded.state_dir}: start it with `parallama up`, or name the"
            " configuration that it was started with"
        )
    if not {*(services or running.children(loaded.run_dir))} <= {Service.ENVOY}:
        asyncio.run(check_database(loaded))  # Envoy has none, nor where it runs alone
    _ask(loaded, services or [])


def _ask(config: "Config", services: list[Service]) -> None:
    from parallama.stores import socket_path
    from parallama.supervisor.control import NAME

    path = config.run_dir / NAME
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(socket_path(path))
            connection.sendall(json.dumps({"restart": services}).encode() + b"\n")
            for line in connection.makefile():
                if _told(json.loads(line)):
                    return
    except OSError as error:
        raise ParallamaError(f"`parallama up` does not answer on {path}: {error}") from error
    raise ParallamaError("`parallama up` ended in the middle of it")


def _told(answer: dict[str, Any]) -> bool:
    """Whether this was the last word, and a good one."""
    if "error" in answer:
        raise ParallamaError(str(answer["error"]))
    if "done" in answer:
        print(f"{answer['done']} restarted", flush=True)
    return "ok" in answer
