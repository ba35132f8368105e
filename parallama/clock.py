"""Time is an argument: whoever needs it is given a `Clock`."""

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since the epoch."""

system_clock: Clock = time.time
