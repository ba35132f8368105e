"""Credentials: how they are made and checked, and which roles there are."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from parallama.checking import AfterValidator, Field
from parallama.errors import UsageError
from parallama.roles import BUILT_IN, Role, check_name, permissions
from parallama.sections import Section
from parallama.values import ExistingFile, FilePath, KeysUrl, Secret, SecretText

JwtAlgorithm = Literal["RS256", "ES256", "EdDSA", "HS256"]
PublicKeyAlgorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]

_AN_ISSUER = {
    "issuer": "https://sso.example.org",
    "audience": "parallama",
    "jwks_url": "https://sso.example.org/jwks",
}


def _role_name(name: str) -> str:
    try:
        return check_name(name)
    except UsageError as error:
        raise ValueError(str(error)) from None


def _new_role(name: str) -> str:
    if name in BUILT_IN:
        raise ValueError(f"the role {name} is built in and cannot be changed")
    return _role_name(name)


def _known_permission(text: str) -> str:
    try:
        permissions([text])
    except UsageError as error:
        raise ValueError(str(error)) from None
    return text


RoleName = Annotated[str, AfterValidator(_new_role)]
Granted = Annotated[str, AfterValidator(_known_permission)]


class Issuer(Section):
    """Somebody else whose access tokens are good for calls: an OpenID provider."""

    issuer: str = Field(min_length=1, max_length=255)
    audience: str = Field(min_length=1, max_length=255)
    jwks_url: KeysUrl | None = None
    jwks_file: ExistingFile | None = None
    algorithms: tuple[PublicKeyAlgorithm, ...] = Field(default=("RS256",), min_length=1)
    user_claim: str = Field(default="preferred_username", min_length=1, max_length=255)
    role_claim: str | None = Field(default=None, min_length=1, max_length=255)
    roles: dict[str, Annotated[str, AfterValidator(_role_name)]] = Field(default={})
    default_role: Annotated[str, AfterValidator(_role_name)] | None = Role.USER.value
    create_users: bool = False

    @property
    def keys_at(self) -> str | Path:
        """A URL, or a file."""
        return self.jwks_url or self.jwks_file or ""

    def rule(self) -> None:
        if (self.jwks_url is None) == (self.jwks_file is None):
            raise ValueError("needs jwks_url or jwks_file, and not both: where its keys come from")
        if self.roles and self.role_claim is None:
            raise ValueError("needs role_claim: the claim in which `roles` are looked up")


class Authentication(Section):
    """How credentials are made, kept and checked."""

    jwt_algorithm: JwtAlgorithm = Field(
        default="RS256",
        description="How access tokens are signed: `RS256`, `ES256`, `EdDSA`, or `HS256`, with "
        "which whoever can check a token can also make one. No other one is accepted: a change "
        "ends all access tokens, and clients get new ones with their refresh tokens.",
    )
    jwt_secret_key_file: Secret | None = Field(
        default=None,
        description="File with the secret that HS256 signs with, 32 bytes or more. The others have "
        "`signing_keys_dir`.",
    )
    signing_keys_dir: FilePath | None = Field(
        default=None,
        examples=["/etc/parallama/signing"],
        description="Folder with the private keys that sign access tokens, which `parallama "
        "signing-keys` keeps. Not set: `signing` in `state_dir`.",
    )
    signing_key_publish_minutes: int = Field(
        default=60,
        ge=0,
        le=43_200,
        description="How long a new key is published before it signs, so that whoever keeps a copy "
        "of our public keys has it by then.",
    )
    token_issuer: str = Field(
        default="parallama",
        min_length=1,
        max_length=255,
        examples=["https://ai.example.org"],
        description="Who issues our access tokens (`iss`): such as the URL that clients use.",
    )
    token_audience: str = Field(
        default="parallama",
        min_length=1,
        max_length=255,
        description="Whom our access tokens are for (`aud`).",
    )
    clock_skew_seconds: int = Field(
        default=30,
        ge=0,
        le=300,
        description="How far the clocks of our machines may differ: times in tokens are judged so "
        "much more kindly.",
    )
    access_token_expire_minutes: int = Field(
        default=30, ge=1, le=1440, description="Life of an access token."
    )
    refresh_token_expire_days: int = Field(
        default=30,
        ge=1,
        le=3650,
        description="Life of a refresh token. Each use gives another one, with a life of its own.",
    )
    refresh_grace_seconds: int = Field(
        default=10,
        ge=0,
        le=300,
        description="How long a refresh token is good once more after its use, for clients that "
        "use it twice at a time or never saw the answer. Later use of it ends the session.",
    )
    password_min_length: int = Field(
        default=12, ge=8, le=64, description="Fewest characters of a password."
    )
    password_hash_rounds: int = Field(
        default=12,
        ge=10,
        le=16,
        description="bcrypt cost of passwords. People choose them, so guessing has to be slow; "
        "each step doubles the time.",
    )
    login_threads: int = Field(
        default=2,
        ge=1,
        le=64,
        description="How many passwords are checked at a time. Each keeps a core busy for a "
        "quarter of a second; a few more wait, and all others are told to come back.",
    )
    login_attempts: int = Field(
        default=5,
        ge=1,
        le=1000,
        description="Wrong passwords for one user name in a day until it has to wait. The wait "
        "doubles each time.",
    )
    login_attempts_per_address: int = Field(
        default=20,
        ge=1,
        le=100_000,
        description="The same for one address (of IPv6, one /64) in an hour, whatever the names.",
    )
    lockout_first_seconds: float = Field(default=1, gt=0, le=3600, description="The first wait.")
    lockout_max_seconds: float = Field(
        default=900, gt=0, le=86_400, description="The longest wait."
    )
    key_hash_rounds: int = Field(
        default=4,
        ge=4,
        le=12,
        description="bcrypt cost of API keys. They carry 256 random bits that nobody can guess, so "
        "a low cost is as strong and keeps a key's first request quick.",
    )
    key_cache_size: int = Field(
        default=10_000,
        ge=1,
        description="How many checked keys a process remembers, so that later requests pay no "
        "bcrypt.",
    )
    without_database_seconds: float = Field(
        default=3600,
        ge=0,
        description="How long keys that a process remembers go on to work while the database is "
        "away; then every request is refused with 503 until it is back.",
    )
    signature_window_seconds: int = Field(
        default=60,
        ge=5,
        le=3600,
        description="How far the clock of who signs requests (the `ollama` command) may be from "
        "ours. For twice as long it is remembered what was signed: nothing is accepted twice.",
    )
    issuers: Annotated[
        tuple[Issuer, ...],
        Field(examples=[[_AN_ISSUER]]),
    ] = Field(
        default=(),
        description="Others whose access tokens are good for calls, such as OpenID providers: see "
        "[tokens of others](security.md#tokens-of-other-issuers).",
    )

    @property
    def jwt_secret_key(self) -> SecretText | None:
        return self.jwt_secret_key_file.secret if self.jwt_secret_key_file else None


def wrong_in_authentication(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong between these settings, by name. `given` is as it stands in the file."""
    listed = given.get("issuers")
    others = [
        each.get("issuer")
        for each in (listed if isinstance(listed, list) else ())
        if isinstance(each, dict)
    ]
    if given.get("token_issuer", "parallama") in others:
        yield "issuers", "must not name authentication.token_issuer: that is who we are"
    if any(others.count(each) > 1 for each in others):
        yield "issuers", "names an issuer twice: write one of them, with all that it needs"
    if given.get("jwt_algorithm") == "HS256" and "jwt_secret_key_file" not in given:
        yield "jwt_secret_key_file", "is missing: authentication.jwt_algorithm HS256 needs it"
