"""
How many examples property tests try.

The suite tries the same few each time, so that it says the same of the same code. `make fuzz` tries
others each time, and FUZZ (100) times as many.
"""

import os
from typing import Any

from hypothesis import settings

TIMES = int(os.environ.get("FUZZ", "1"))

settings.register_profile(
    "parallama", derandomize=TIMES == 1, deadline=None, print_blob=True, max_examples=100 * TIMES
)
settings.load_profile("parallama")


def examples(count: int, **options: Any) -> settings:
    """So many in the suite."""
    return settings(max_examples=count * TIMES, **options)
