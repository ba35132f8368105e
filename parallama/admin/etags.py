"""ETags: what a thing was when somebody looked at it (pure)."""

import hashlib
import json
from dataclasses import replace
from typing import Any

from parallama.db.manage.credentials import ApiKey
from parallama.desk import plain

_LENGTH = 22


def etag(thing: Any) -> str:
    """The same as long as nobody changes it: that a key was used is no change."""
    if isinstance(thing, ApiKey):
        thing = replace(thing, last_used_at=None)
    text = json.dumps(plain(thing), sort_keys=True)
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]}"'


def matches(if_match: str, thing: Any) -> bool:
    """Whether a list of ETags, or `*`, names what is there. A weak one names nothing."""
    named = {part.strip() for part in if_match.split(",")}
    return "*" in named or etag(thing) in named
