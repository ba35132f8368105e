"""Connections to Redis or Valkey."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallama.config import Config
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
    A client of the embedded Valkey, or of the server that `redis.host` names. Connects when used.

    Nothing is tried twice here: whoever calls knows whether a second try is safe.
    """
    # 6 MB, which those that only need the names of sockets do not carry.
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    settings = config.redis
    password = settings.password
    common: Mapping[str, Any] = {
        "db": settings.db,
        "password": password.get_secret_value() if password else None,
        "socket_timeout": settings.timeout_seconds,
        "socket_connect_timeout": settings.timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
        **options,
    }
    if settings.host is None:
        return Redis(unix_socket_path=socket_path(valkey_socket(config)), **common)
    return Redis(host=settings.host, port=settings.port, **common)
