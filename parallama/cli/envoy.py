"""`parallama envoy`."""

import os
import sys

from parallama.cli.desk import load_config
from parallama.cli.options import ConfigPath


def envoy(config: ConfigPath = None) -> None:
    """
    Start Envoy alone, where each service runs on its own, such as in containers.

    Needs no database and no Redis. Stops and reloads as `up` does.
    """
    loaded = load_config(config)
    sys.stdout.flush()
    supervisor = [sys.executable, "-P", "-m", "parallama.supervisor", str(loaded.source)]
    os.execv(sys.executable, [*supervisor, "--envoy-alone"])  # noqa: S606
