"""Nobody gives away what they do not have (pure)."""

from collections.abc import Iterable
from datetime import datetime
from ipaddress import ip_network

from parallama.admin.problems import forbidden
from parallama.db.manage.credentials import ApiKey
from parallama.endpoints import model_allowed
from parallama.roles import Permissions, covers, permissions


def check_gives(held: Permissions, given: Permissions, what: str) -> None:
    """Whoever holds these may give those."""
    if not covers(held, given):
        lacking = sorted(each for each in given if not covers(held, frozenset([each])))
        raise forbidden(f"You may not give away what you do not have: {what} ({lacking[0]}).")


def beyond(before: Permissions, after: Permissions) -> Permissions:
    """What somebody gains."""
    return frozenset(each for each in after if not covers(before, frozenset([each])))


def key_grants(owner: Permissions, scopes: Iterable[str] | None) -> Permissions:
    """What a key of this owner can be used for, now or once its owner may do more."""
    return owner if scopes is None else permissions(scopes)


def check_key(
    own: ApiKey | None,
    *,
    models: Iterable[str] | None,
    networks: Iterable[str] | None,
    expires_at: datetime | None,
) -> None:
    """Whether who comes with `own`, or with no key, may make one that is bounded so."""
    if own is None:
        return
    if own.models is not None and not (
        models is not None and all(model_allowed(own.models, each) for each in models)
    ):
        raise forbidden("Your own key is restricted to some models: this one has to be, too.")
    if own.networks is not None and not (
        networks is not None and all(_inside(each, own.networks) for each in networks)
    ):
        raise forbidden("Your own key is restricted to some networks: this one has to be, too.")
    if own.expires_at is not None and (expires_at is None or expires_at > own.expires_at):
        raise forbidden("Your own key expires: this one may not outlive it.")


def _inside(network: str, others: Iterable[str]) -> bool:
    try:
        inner = ip_network(network)
    except ValueError:
        return False
    for other in others:
        outer = ip_network(other)
        if inner.version == outer.version and inner.subnet_of(outer):  # type: ignore[arg-type]
            return True
    return False
