"""Connections to Redis or Valkey."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from parallama import nodes, resp
from parallama.config import Config
from parallama.config import Redis as Settings
from parallama.errors import ParallamaError
from parallama.resp import Redis
from parallama.values import SecretText

# sun_path holds 108 bytes with its closing zero.
_LONGEST_SOCKET_PATH = 107


def valkey_socket(config: Config) -> Path:
    """Where the embedded Valkey listens."""
    return config.run_dir / "valkey.sock"


def socket_path(path: Path) -> str:
    """`path` in a spelling short enough for a unix socket."""
    spellings = (str(path), os.path.relpath(path))
    short = min(spellings, key=len)
    if len(os.fsencode(short)) > _LONGEST_SOCKET_PATH:
        raise ParallamaError(
            f"{path} is too long a path for a unix socket: set state_dir to a shorter one"
        )
    return short


def connect_redis(config: Config) -> Redis:
    """
    A client of the embedded Valkey, or of the servers that `redis` names: in a cluster of any node,
    with Sentinel of the master. Connects when used, and finds its server anew each time it does.
    """
    told = config.redis
    options = resp.Options(
        timeout=told.timeout_seconds,
        username=told.username,
        password=_plain(told.password),
        db=told.db,
        tls=_tls(told),
    )
    if told.embedded:
        return resp.at(socket_path(valkey_socket(config)), options)
    if told.host is not None:
        return resp.at((told.host, told.port), options)

    finder: resp.Finder
    asked = partial(nodes.Doors, told.addresses, timeout=told.timeout_seconds)
    if told.mode == "sentinel":
        theirs = replace(options, username=None, password=_plain(told.sentinel_password), db=0)
        finder = nodes.Sentinels(told.sentinel_master or "", asked(partial(_at, theirs)))
    else:
        finder = nodes.Cluster(told.addresses, asked(partial(_at, options)))
    return resp.found(finder, options)


def _at(options: resp.Options, address: resp.Address) -> Redis:
    return resp.at(address, options)


def _plain(secret: SecretText | None) -> str | None:
    return secret.get_secret_value() if secret else None


def _tls(told: Settings) -> resp.Tls | None:
    if not told.tls:
        return None
    key = told.tls_key_file.path if told.tls_key_file else None
    files = (told.tls_ca_file, told.tls_cert_file, key)
    ca, cert, key_file = (None if path is None else str(path) for path in files)
    return resp.Tls(verify=told.tls_verify, ca_file=ca, cert_file=cert, key_file=key_file)
