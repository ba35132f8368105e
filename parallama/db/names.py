"""What users, keys, models and networks may be called (pure). Everything here raises UsageError."""

import re
import unicodedata
from collections.abc import Iterable
from ipaddress import ip_network

from parallama.errors import UsageError
from parallama.roles import GATEWAYS

_LONGEST = 255
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)


def looks_like_id(text: str) -> bool:
    """Whether `text` is written as our ids are; nothing that a person named may look like one."""
    return _ID.fullmatch(text) is not None


def check_username(name: str) -> str:
    """`name` as it is stored. No space, no control character, no colon: `role:x` is not a user."""
    name = _checked(normal(name), "a user name")
    if any(character.isspace() or character == ":" for character in name):
        raise UsageError(f"a user name has no spaces and no ':': {name!r}")
    return name


def check_key_name(name: str) -> str:
    return _checked(normal(name), "the name of a key")


def check_model(pattern: str) -> str:
    """A model's name, or the beginning of one with a `*` behind it."""
    pattern = _checked(pattern, "a model")
    if "*" in pattern[:-1]:
        raise UsageError(f"in a model, * stands only at the end: {pattern!r}")
    if "," in pattern or pattern != pattern.strip():
        raise UsageError(f"a model has no comma and no space around it: {pattern!r}")
    return pattern


def check_models(patterns: Iterable[str] | None) -> list[str] | None:
    """None means every model. An empty list would mean none, which is surely a mistake."""
    if patterns is None:
        return None
    checked = list(dict.fromkeys(check_model(pattern) for pattern in patterns))
    if not checked:
        raise UsageError("name at least one model, or leave the option out to allow all")
    return checked


def check_networks(networks: Iterable[str] | None) -> list[str] | None:
    """Networks (or single addresses) in their canonical spelling. None means from everywhere."""
    if networks is None:
        return None
    checked = []
    for network in networks:
        try:
            checked.append(str(ip_network(network)))
        except ValueError as error:
            raise UsageError(
                f"not a network such as 10.1.0.0/16 or 2001:db8::/32: {error}"
            ) from error
    if not checked:
        raise UsageError("name at least one network, or leave the option out to allow all")
    return list(dict.fromkeys(checked))


def check_gateways(gateways: Iterable[str] | None) -> list[str] | None:
    """None means every gateway."""
    if gateways is None:
        return None
    checked = list(dict.fromkeys(gateways))
    unknown = [gateway for gateway in checked if gateway not in GATEWAYS]
    if unknown or not checked:
        raise UsageError(
            f"there is no gateway {unknown[0]!r}: the gateways are {', '.join(GATEWAYS)}"
            if unknown
            else "name at least one gateway, or leave the option out to allow all"
        )
    return checked


def normal(name: str) -> str:
    """One spelling for names that look alike because their accents are written differently."""
    return unicodedata.normalize("NFC", name)


def _checked(name: str, what: str) -> str:
    if not 1 <= len(name) <= _LONGEST:
        raise UsageError(f"{what} has 1 to {_LONGEST} characters, not {len(name)}")
    if not name.isprintable():
        raise UsageError(f"{what} has visible characters only: {name!r}")
    if looks_like_id(name):
        raise UsageError(f"{what} may not look like an id: {name}")
    return name
