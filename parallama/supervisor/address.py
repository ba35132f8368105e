"""Where the gateway listens."""

import socket

from parallama.config import Config
from parallama.errors import ParallamaError


def address(config: Config) -> str:
    host = config.server.host
    return f"[{host}]:{config.server.port}" if ":" in host else f"{host}:{config.server.port}"


def check_free(config: Config) -> None:
    """Raises ParallamaError where somebody listens there."""
    family = socket.AF_INET6 if ":" in config.server.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.server.host, config.server.port))
        except OSError as error:
            raise ParallamaError(
                f"cannot listen on {address(config)} ({error.strerror}): stop what uses it, or set"
                " server.host and server.port (PARALLAMA_SERVER__PORT in the environment)"
            ) from error
