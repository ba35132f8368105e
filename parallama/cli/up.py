"""`parallama up`."""

import asyncio
import os
import sys
from typing import TYPE_CHECKING

from parallama.cli.desk import load_config
from parallama.cli.options import ConfigPath

if TYPE_CHECKING:
    from parallama.config import Config


def up(config: ConfigPath = None) -> None:
    """
    Start everything and serve, in the foreground, until Ctrl-C or SIGTERM.

    GET /healthz on the listen address answers 200 once it serves.
    """
    loaded = load_config(config)
    asyncio.run(check_database(loaded))
    sys.stdout.flush()
    # The supervisor lives for months: it need not carry what commands load.
    supervisor = [sys.executable, "-P", "-m", "parallama.supervisor", str(loaded.source)]
    os.execv(sys.executable, supervisor)  # noqa: S606


async def check_database(config: "Config") -> None:
    """Raises ParallamaError where the services could not work with it."""
    from parallama.db import database

    async with database(config.database):
        pass
