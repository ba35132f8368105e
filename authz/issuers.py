"""Whose access tokens are believed: ours, and those of the issuers that are configured."""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from authz import jwks
from authz.bearers import Trusted
from authz.jws import Key
from authz.keysets import KeySet
from authz.outsiders import Outsiders, roles_of
from parallama.clock import Clock
from parallama.config import Config, Issuer
from parallama.db.accounts import Holder, find_holder
from parallama.db.store import Store
from parallama.signing import KeyFolder
from parallama.tokens import TYPE

OnWithdrawn = Callable[[str], None]
"""Told the issuer of which a key is gone."""

# Ours are files: looking whether they changed costs next to nothing.
_OWN_FRESH_SECONDS = 1.0
_OWN_COOLDOWN_SECONDS = 0.05

# OpenID providers call their access tokens so; and many do not say what their tokens are.
_THEIR_TYPES = frozenset({"", "jwt", TYPE})


def trusted(
    config: Config, store: Store, *, clock: Clock, on_withdrawn: OnWithdrawn
) -> dict[str, Trusted]:
    """By name. Somebody has to `run` the keys of each."""
    others = (
        _other(each, config, store, clock, on_withdrawn) for each in config.authentication.issuers
    )
    return {issuer.name: issuer for issuer in (_own(config, store, clock, on_withdrawn), *others)}


def _own(config: Config, store: Store, clock: Clock, on_withdrawn: OnWithdrawn) -> Trusted:
    told = config.authentication
    folder = KeyFolder(config, clock=clock)
    algorithms = frozenset({told.jwt_algorithm})

    def read() -> dict[str, Key]:
        if told.jwt_algorithm != "HS256" and not any(config.signing_dir.glob("[!.]*.pem")):
            return {}  # the first one is on its way, or nobody is to log in here
        return {kid: Key(algorithms, known) for kid, known in folder.keys().public.items()}

    async def find(subject: str, _: Mapping[str, Any]) -> Holder | None:
        return await find_holder(store, subject, told.token_issuer, roles=config.known_roles)

    return Trusted(
        name=told.token_issuer,
        audience=told.token_audience,
        algorithms=algorithms,
        types=frozenset({TYPE}),
        keys=KeySet(
            partial(asyncio.to_thread, read),
            name=told.token_issuer,
            monotonic=time.monotonic,
            on_withdrawn=partial(on_withdrawn, told.token_issuer),
            fresh=_OWN_FRESH_SECONDS,
            cooldown=_OWN_COOLDOWN_SECONDS,
            keep=0.0,
            at_once=False,  # reading them takes 10 MB, and many have keys alone
        ),
        find_holder=find,
    )


def _other(
    settings: Issuer, config: Config, store: Store, clock: Clock, on_withdrawn: OnWithdrawn
) -> Trusted:
    place = settings.keys_at
    load = jwks.from_file(place) if isinstance(place, Path) else jwks.from_url(place)
    outsiders = Outsiders(settings, store, roles=config.known_roles, clock=clock)
    return Trusted(
        name=settings.issuer,
        audience=settings.audience,
        algorithms=frozenset(settings.algorithms),
        types=_THEIR_TYPES,
        keys=KeySet(
            load,
            name=settings.issuer,
            monotonic=time.monotonic,
            on_withdrawn=partial(on_withdrawn, settings.issuer),
        ),
        find_holder=outsiders.find,
        roles_of=partial(roles_of, settings),
        outside=True,
    )
