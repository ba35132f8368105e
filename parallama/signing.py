"""The keys that sign access tokens: files in a folder, and the rule by which their names decide."""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallama.clock import Clock
from parallama.config import Config
from parallama.config import JwtAlgorithm as Algorithm
from parallama.errors import ConfigError

if TYPE_CHECKING:
    from parallama.jwa import PrivateKey

SHARED_SECRET = "hs256"  # noqa: S105 - a name
"""The `kid` of tokens that are signed with a secret; there is one."""

_KID = re.compile("[0-9A-Za-z_-]{1,64}")
_MADE = "%Y%m%dT%H%M%SZ"
_SECRET_BYTES = 32
_LARGEST_FILE = 1 << 16
_MAY_CHANGE = 0o022
_MAY_USE = 0o026

# A file that was written over leaves no trace in its folder's time.
_LOOK_AGAIN_SECONDS = 60.0
_LOOK_AGAIN_AFTER_FAILURE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Named:
    """A key as its file's name tells it. `made` is in seconds since the epoch."""

    made: float
    kid: str

    @property
    def file(self) -> str:
        return f"{datetime.fromtimestamp(self.made, UTC).strftime(_MADE)}-{self.kid}.pem"


@dataclass(frozen=True, slots=True)
class Plan:
    """Which of some keys does what at one time. `changes_at` is when another plan is due."""

    signer: Named | None
    accepted: tuple[Named, ...]
    over: tuple[Named, ...]
    changes_at: float


@dataclass(frozen=True, slots=True)
class Timing:
    """
    In seconds. A key is published for `publish_before` before it signs, so that everybody has it
    by then. Once another one signs it is accepted for `accept_after`, while its tokens live.
    """

    publish_before: float
    accept_after: float


def timing(config: Config) -> Timing:
    told = config.authentication
    return Timing(
        publish_before=told.signing_key_publish_minutes * 60,
        accept_after=told.access_token_expire_minutes * 60 + told.clock_skew_seconds,
    )


def plan(keys: Iterable[Named], *, now: float, timing: Timing) -> Plan:
    """
    The newest key that has been published for long enough signs, or the oldest if there is none.
    """
    by_age = sorted(keys, key=lambda key: (key.made, key.kid))
    starts = [key.made + timing.publish_before for key in by_age]
    # Each key but the last is superseded when the one after it starts.
    ends = [start + timing.accept_after for start in starts[1:]]
    until = [*ends, float("inf")][: len(by_age)]
    accepted = [key for key, end in zip(by_age, until, strict=True) if now < end]
    signer = by_age[0] if by_age else None
    for key, start in zip(by_age, starts, strict=True):
        if start <= now:
            signer = key
    return Plan(
        signer=signer,
        accepted=tuple(accepted),
        over=tuple(key for key in by_age if key not in accepted),
        changes_at=min((at for at in (*starts, *ends) if at > now), default=float("inf")),
    )


@dataclass(frozen=True, slots=True)
class Signer:
    """What tokens are signed with now."""

    kid: str
    algorithm: Algorithm
    key: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class Keys:
    """
    What is good until `good_until`, and after that has to be loaded anew.

    `public` has what proves a token by its `kid`; with HS256 that is the secret, and no `jwks`.
    """

    signer: Signer
    public: Mapping[str, Any] = field(repr=False)
    good_until: float

    @property
    def algorithm(self) -> Algorithm:
        return self.signer.algorithm

    @staticmethod
    def load(folder: Path, *, algorithm: Algorithm, now: float, timing: Timing) -> "Keys":
        """
        Those in `folder` that fit `algorithm`. Others are passed over, so that another algorithm
        ends the tokens of the one before. Raises ConfigError, which names the file.
        """
        found = read(folder)
        fitting = {named: key for named, key in found.items() if algorithm_of(key) == algorithm}
        told = plan(fitting, now=now, timing=timing)
        if told.signer is None:
            raise ConfigError(
                f"{folder} has no key for {algorithm}: `parallama signing-keys rotate` makes one"
            )
        return Keys(
            signer=Signer(told.signer.kid, algorithm, fitting[told.signer]),
            public={named.kid: fitting[named].public_key() for named in told.accepted},
            good_until=told.changes_at,
        )

    @staticmethod
    def shared(secret: str) -> "Keys":
        """HS256: whoever can check a token can make one. Raises ConfigError."""
        key = secret.encode()
        if len(key) < _SECRET_BYTES:
            raise ConfigError(
                f"the secret in authentication.jwt_secret_key_file has {len(key)} bytes, and HS256 "
                f"needs {_SECRET_BYTES} or more: such as `openssl rand -base64 48` writes"
            )
        return Keys(Signer(SHARED_SECRET, "HS256", key), {SHARED_SECRET: key}, float("inf"))

    def jwks(self) -> dict[str, Any]:
        """The public keys, for everybody (RFC 7517)."""
        from parallama import jwa

        if self.algorithm == "HS256":
            return {"keys": []}
        return {
            "keys": [
                {**jwa.to_jwk(key), "kid": kid, "use": "sig", "alg": self.algorithm}
                for kid, key in self.public.items()
            ]
        }


class KeyFolder:
    """
    The keys of a folder as they are now: looked at again when the folder changes, and when time
    makes another of them sign.
    """

    def __init__(self, config: Config, *, clock: Clock) -> None:
        told = config.authentication
        self._folder = config.signing_dir
        self._algorithm = told.jwt_algorithm
        self._timing = timing(config)
        self._clock = clock
        self._found: Keys | ConfigError
        self._changed: object = None
        self._look_at = float("-inf")
        self._shared: Keys | None = None
        if told.jwt_algorithm == "HS256" and told.jwt_secret_key is not None:
            self._shared = Keys.shared(told.jwt_secret_key.get_secret_value())

    def keys(self) -> Keys:
        """Raises ConfigError where they cannot be used: then no token can be trusted, either."""
        if self._shared is not None:
            return self._shared
        now = self._clock()
        if now >= self._look_at or self._changed != self._stamp():
            self._load(now)
        if isinstance(self._found, ConfigError):
            raise self._found
        return self._found

    def _load(self, now: float) -> None:
        self._changed = self._stamp()
        try:
            found = Keys.load(self._folder, algorithm=self._algorithm, now=now, timing=self._timing)
        except ConfigError as error:
            self._found = error
            self._look_at = now + _LOOK_AGAIN_AFTER_FAILURE_SECONDS
        else:
            self._found = found
            self._look_at = min(found.good_until, now + _LOOK_AGAIN_SECONDS)

    def _stamp(self) -> object:
        # Its time alone is not enough: it may stand still for some milliseconds.
        try:
            return sorted(os.listdir(self._folder)), os.stat(self._folder).st_mtime_ns
        except OSError:
            return None


def read(folder: Path) -> "dict[Named, PrivateKey]":
    """Every key in it. Raises ConfigError, which names what is wrong and where."""
    try:
        _check_mode(folder, _MAY_CHANGE, "change it: run chmod go-w on it")
        found = {_named(file): file for file in sorted(folder.glob("[!.]*.pem"))}
        _check_names(folder, found)
        return {named: _load(file) for named, file in found.items()}
    except OSError as error:
        if not folder.exists():
            raise ConfigError(
                f"{folder} does not exist: `parallama signing-keys rotate` makes it, with a first "
                "key; on several machines copy it from the one that has it"
            ) from None
        raise ConfigError(f"{error.filename or folder} cannot be read: {error.strerror}") from None


def prepare(config: Config, *, now: float) -> None:
    """
    A first key in the folder in `state_dir`. One that the operator named is the operator's, and may
    have to be the same on several machines.
    """
    told = config.authentication
    if told.signing_keys_dir is None and told.jwt_algorithm != "HS256":
        ensure(config.signing_dir, algorithm=told.jwt_algorithm, now=now)


def ensure(folder: Path, *, algorithm: Algorithm, now: float) -> None:
    """Make the folder, and a first key for `algorithm`, unless they are there."""
    with _alone(folder):
        if not any(algorithm_of(key) == algorithm for key in read(folder).values()):
            _write(folder, algorithm, now)


def rotate(
    folder: Path, *, algorithm: Algorithm, now: float, timing: Timing, at_once: bool = False
) -> tuple[Named, Sequence[Named]]:
    """
    Make a key, and remove those whose time is over: also those for another algorithm.

    `at_once`: remove all others, so that this one signs from now on and their tokens are over.
    Returns the new one and what was removed.
    """
    with _alone(folder):
        known = read(folder)
        new = _write(folder, algorithm, now)
        # Those of another algorithm do not delay these, nor do these take their place.
        kinds = {algorithm_of(key) for key in known.values()}
        over = [
            named
            for kind in kinds
            for named in plan(
                [at for at, key in known.items() if algorithm_of(key) == kind],
                now=now,
                timing=timing,
            ).over
        ]
        removed = sorted(known if at_once else over, key=lambda named: named.file)
        for named in removed:
            (folder / named.file).unlink()
    return new, removed


def algorithm_of(key: "PrivateKey") -> Algorithm:
    from parallama import jwa

    return jwa.algorithm_of(key)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two that make a first key at once make one."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
    except OSError as error:
        where = error.filename or folder
        raise ConfigError(f"{where} cannot be written: {error.strerror}") from None


def _write(folder: Path, algorithm: Algorithm, now: float) -> Named:
    from parallama import jwa

    if algorithm == "HS256":
        raise ConfigError(
            "HS256 has one secret, and no keys: write another into "
            "authentication.jwt_secret_key_file, and restart; it ends all access tokens"
        )
    key = jwa.make(algorithm)
    named = Named(float(int(now)), hashlib.sha256(jwa.public_bytes(key)).hexdigest()[:16])
    pem = jwa.pem(key)
    fresh = folder / f".{named.file}"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(folder / named.file)
    return named


def _named(file: Path) -> Named:
    made, _, kid = file.stem.partition("-")
    try:
        at = datetime.strptime(made, _MADE).replace(tzinfo=UTC)
    except ValueError:
        at = None
    if at is None or not _KID.fullmatch(kid):
        raise ConfigError(
            f"{file} is not named as a key is, <time it was made>-<kid>.pem, such as "
            "20260131T120000Z-1f0c.pem: rename it, or take it away"
        ) from None
    return Named(at.timestamp(), kid)


def _check_names(folder: Path, found: Iterable[Named]) -> None:
    kids = [named.kid for named in found]
    for kid in kids:
        if kids.count(kid) > 1:
            raise ConfigError(f"{folder} has two files for the key {kid}: take one of them away")


def _check_mode(path: Path, mask: int, what: str) -> None:
    if path.stat().st_mode & mask:
        raise ConfigError(f"others may {what} ({path})")


def _load(file: Path) -> "PrivateKey":
    _check_mode(file, _MAY_USE, "read or change a private key: run chmod 600 on it")
    with file.open("rb") as opened:
        pem = opened.read(_LARGEST_FILE)
    from parallama import jwa

    try:
        key = jwa.load(pem)
    except ValueError:
        raise ConfigError(
            f"{file} is not a private key in PEM, without a password: take it away, and see "
            "`parallama signing-keys list`"
        ) from None
    if key is None:
        raise ConfigError(
            f"{file} is a private key of a kind that is not used: RSA with {jwa.LEAST_RSA_BITS} "
            "bits or more, P-256 or Ed25519"
        )
    return key
