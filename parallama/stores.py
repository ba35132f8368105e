"""Connections to Redis or Valkey."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from parallama.config import Config
from parallama.config import Redis as Settings
from parallama.errors import ParallamaError

if TYPE_CHECKING:
    from redis.asyncio import Redis

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


def connect_redis(config: Config, **options: Any) -> "Redis":
    """
    A client of the embedded Valkey, or of the servers that `redis` names: in a cluster of any node,
    with Sentinel of the master. Connects when used, and finds its server anew each time it does.

    Nothing is tried twice here: whoever calls knows whether a second try is safe.
    """
    # 6 MB, which those that only need the names of sockets do not carry.
    from redis.asyncio import Redis

    from parallama import nodes

    settings = config.redis
    told = {**_told(settings), **options}
    if settings.embedded:
        return Redis(unix_socket_path=socket_path(valkey_socket(config)), **told)
    tls = _tls(settings)
    if settings.host is not None:
        return Redis(host=settings.host, port=settings.port, **told, **tls)

    finder: nodes.Finder
    asked = partial(nodes.Doors, settings.addresses, timeout=settings.timeout_seconds)
    if settings.mode == "sentinel":
        theirs = _login(None, settings.sentinel_password) | _bounds(settings) | tls
        doors = asked(lambda at: Redis(host=at[0], port=at[1], **theirs))
        finder = nodes.Sentinels(settings.sentinel_master or "", doors)
    else:
        doors = asked(lambda at: Redis(host=at[0], port=at[1], **told, **tls))
        finder = nodes.Cluster(settings.addresses, doors)
    # A pool knows by the class of its connections whether they use TLS, a client by an option.
    more = {name: value for name, value in tls.items() if name != "ssl"}
    return Redis.from_pool(nodes.FoundPool(finder, tls=settings.tls, **told, **more))


def _told(settings: Settings) -> dict[str, Any]:
    login = _login(settings.username, settings.password)
    return {"db": settings.db} | login | _bounds(settings)


def _login(username: str | None, password: SecretStr | None) -> dict[str, Any]:
    return {
        "username": username,
        "password": password.get_secret_value() if password else None,
    }


def _bounds(settings: Settings) -> dict[str, Any]:
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    return {
        "socket_timeout": settings.timeout_seconds,
        "socket_connect_timeout": settings.timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
    }


def _tls(settings: Settings) -> dict[str, Any]:
    if not settings.tls:
        return {}
    files = {
        "ssl_ca_certs": settings.tls_ca_file,
        "ssl_certfile": settings.tls_cert_file,
        "ssl_keyfile": settings.tls_key_file.path if settings.tls_key_file else None,
    }
    return {
        "ssl": True,
        "ssl_cert_reqs": "none" if settings.tls_verify == "none" else "required",
        "ssl_check_hostname": settings.tls_verify == "full",
        **{name: str(path) for name, path in files.items() if path is not None},
    }
