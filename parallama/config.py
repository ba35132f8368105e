"""One frozen tree of settings, from a YAML file, the environment and secret files."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args
from zoneinfo import ZoneInfo

from parallama import mappings, yamlfile
from parallama.checking import AfterValidator, BeforeValidator, Field, Invalid
from parallama.errors import ConfigError, UsageError
from parallama.roles import BUILT_IN, Permissions, Role, check_name, permissions
from parallama.sections import (
    LATER,
    Section,
    dotted,
    explain,
    kind,
    leaves,
    nearest,
    section,
    subsections,
    written,
)
from parallama.shapes import Role as ShapedRole
from parallama.shapes import Shape
from parallama.values import (
    Address,
    Bytes,
    ExistingFile,
    FilePath,
    HeaderName,
    Host,
    HostPort,
    KeysUrl,
    Origin,
    Secret,
    SecretText,
    TimeZone,
    Upstream,
    UpstreamAt,
    lower,
    upper,
)
from parallama.yamlfile import Place

PREFIX = "PARALLAMA_"
CONFIG_VARIABLE = "PARALLAMA_CONFIG"
"""Names the file itself, so it is no setting."""

_LARGEST_FILE = 1 << 20

Gateway = Literal["ollama", "openai"]
CountTokens = Literal["learned", "tiktoken"]
Away = Literal["deny", "allow", "local"]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
JwtAlgorithm = Literal["RS256", "ES256", "EdDSA", "HS256"]
PublicKeyAlgorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]
EnvoyLevel = Literal["trace", "debug", "info", "warning", "error", "critical", "off"]


class Cors(Section):
    """
    Web pages that call the gateway from a browser. Without origins no page but the gateway's own
    can read what it answers.
    """

    origins: Annotated[
        tuple[Origin, ...], Field(examples=[["https://chat.example.org", "http://localhost:*"]])
    ] = Field(
        default=(),
        description="Where such pages come from: `https://chat.example.org`; with `*` in its "
        "host for letters, digits, dots and dashes, or as its port; or `*` alone for every page.",
    )
    headers: Annotated[tuple[HeaderName, ...], Field(examples=[["x-my-header"]])] = Field(
        default=(),
        description="Request headers that they may send beside those that the SDKs of OpenAI, "
        "Ollama and Anthropic do.",
    )
    max_age: int = Field(
        default=600, ge=0, description="Seconds for which a browser need not ask again."
    )


class Server(Section):
    """Where clients connect: Envoy's listener."""

    host: Address = Field(
        default="127.0.0.1", description="Address to listen on; `0.0.0.0` for every interface."
    )
    port: int = Field(default=8000, ge=1, le=65535, description="Port to listen on.")
    workers: int = Field(
        default=2,
        ge=1,
        le=1024,
        description="Envoy's worker threads. One passes thousands of tokens a second; a second one "
        "halves the wait of many calls that come at one instant.",
    )
    trusted_hops: int = Field(
        default=0,
        ge=0,
        le=32,
        description="How many proxies in front of Envoy are trusted to say who the client is "
        "(`x-forwarded-for`). With 0 nobody is.",
    )
    cors: Cors = section()


class Database(Section):
    """Users, keys, limits and usage: in SQLite (`path`) or PostgreSQL (`host` and the rest)."""

    path: FilePath = Field(
        default=Path("parallama.db"), description="The SQLite file. Not together with `host`."
    )
    host: Host | None = Field(
        default=None,
        examples=["127.0.0.1"],
        description="PostgreSQL's host; needs `name` and `user`.",
    )
    port: int = Field(default=5432, ge=1, le=65535, description="PostgreSQL's port.")
    name: str | None = Field(
        default=None, min_length=1, examples=["parallama"], description="PostgreSQL's database."
    )
    user: str | None = Field(
        default=None, min_length=1, examples=["parallama"], description="PostgreSQL's user."
    )
    password_file: Secret | None = Field(
        default=None, description="File with the password of PostgreSQL's user."
    )
    pool_size: int = Field(
        default=5,
        ge=1,
        le=1000,
        description="Most connections of each process to PostgreSQL.",
    )
    ssl_mode: SslMode = Field(
        default="prefer",
        description="TLS to PostgreSQL, in libpq's words: `disable`, `allow`, `prefer`, `require`, "
        "`verify-ca` or `verify-full`. Only the last one makes sure who answers.",
    )
    ssl_root_cert_file: ExistingFile | None = Field(
        default=None,
        examples=["/etc/parallama/postgresql-ca.pem"],
        description="File with the certificates of the authorities that may have signed "
        "PostgreSQL's.",
    )
    timeout_seconds: float = Field(
        default=5,
        gt=0,
        description="How long to wait for a connection, for a lock, and for PostgreSQL's answer to "
        "a service.",
    )

    @property
    def sqlite(self) -> bool:
        """Whether `path` is the database; otherwise PostgreSQL at `host` is."""
        return self.host is None

    @property
    def password(self) -> SecretText | None:
        return self.password_file.secret if self.password_file else None


class Redis(Section):
    """Counters and signals: the embedded Valkey, or a Redis or Valkey of yours."""

    host: Host | None = Field(
        default=None,
        examples=["127.0.0.1"],
        description="Host of your Redis or Valkey. Not set: `parallama up` starts its own Valkey, "
        "on a unix socket in `state_dir`.",
    )
    port: int = Field(default=6379, ge=1, le=65535, description="Its port. Needs `host`.")
    mode: Literal["standalone", "sentinel", "cluster"] = Field(
        default="standalone",
        description="`standalone`: one server, at `host`. `sentinel`: the master that the "
        "sentinels in `nodes` name. `cluster`: a Redis Cluster that `nodes` belong to.",
    )
    nodes: Annotated[
        tuple[HostPort, ...],
        Field(examples=[["10.0.0.1:26379", "10.0.0.2:26379"]]),
    ] = Field(
        default=(),
        description="`host:port` of the sentinels, or of some nodes of the cluster: the others are "
        "learnt from them.",
    )
    sentinel_master: str | None = Field(
        default=None,
        min_length=1,
        examples=["mymaster"],
        description="Name of the master that the sentinels watch.",
    )
    sentinel_password_file: Secret | None = Field(
        default=None, description="File with the password of the sentinels themselves."
    )
    db: int = Field(default=0, ge=0, description="Number of the database in it; 0 in a cluster.")
    username: str | None = Field(
        default=None,
        min_length=1,
        examples=["parallama"],
        description="User of its access list (ACL). Needs `password_file`.",
    )
    password_file: Secret | None = Field(
        default=None, description="File with its password. The embedded Valkey uses it too."
    )
    tls: bool = Field(
        default=False, description="Speak TLS with it, and with the sentinels. Not when embedded."
    )
    tls_ca_file: ExistingFile | None = Field(
        default=None,
        description="File with certificates of authorities (PEM) that are trusted beside those of "
        "the system.",
    )
    tls_cert_file: ExistingFile | None = Field(
        default=None, description="File with our own certificate (PEM), where it asks for one."
    )
    tls_key_file: Secret | None = Field(
        default=None, description="File with the key of that certificate (PEM)."
    )
    tls_verify: Literal["full", "ca", "none"] = Field(
        default="full",
        description="`full`: its certificate must be trusted and name the host. `ca`: the name is "
        "not looked at, for nodes known by address only. `none`: whoever answers is believed.",
    )
    timeout_seconds: float = Field(
        default=1.0,
        gt=0,
        description="How long to wait for an answer before Redis counts as being away.",
    )

    @property
    def embedded(self) -> bool:
        return self.host is None and not self.nodes

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """`nodes`, each as host (IPv6 without brackets) and port."""
        split = (node.rpartition(":") for node in self.nodes)
        return [(host.strip("[]"), int(port)) for host, _, port in split]

    @property
    def sentinel_password(self) -> SecretText | None:
        return self.sentinel_password_file.secret if self.sentinel_password_file else None

    @property
    def password(self) -> SecretText | None:
        return self.password_file.secret if self.password_file else None


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


class Discovery(Section):
    """`GET /gateway/discovery`: what each gateway offers, to whom, and whether it is well."""

    enabled: bool = Field(default=True, description="Serve the page.")
    cache_ttl: int = Field(
        default=300,
        ge=0,
        description="Seconds after which servers are asked for their lists of models though nobody "
        "wants to know, so that there is something to show should one go away. `0`: never.",
    )
    include_metrics: bool = Field(
        default=True,
        description="Calls of the last five minutes on the page, and their median time to the "
        "first token.",
    )


def _envoys(default: str) -> Any:
    """A path that the plans made a setting, and that is Envoy's to decide."""

    def check(value: str) -> str:
        if value != default:
            raise ValueError(
                f"must stay {default}: routes are Envoy's; add yours in envoy/routes.yaml"
            )
        return value

    return AfterValidator(check)


def _count_tokens() -> Any:
    return Field(
        default="learned",
        description="Tokens of an answer whose server reports none. `learned`: by the chunks that "
        "passed, or by size. `tiktoken`: `usage_sink` is sent the text, counts it with OpenAI's "
        "vocabulary `o200k_base`, and keeps none of it.",
    )


def _model_name(name: str) -> str:
    try:
        return mappings.check_name(name)
    except UsageError:
        raise ValueError(
            f"must be a model's name: up to {mappings.LONGEST_NAME} bytes, visible characters, "
            "without * and without space around it"
        ) from None


ModelName = Annotated[str, AfterValidator(_model_name)]
ModelMappings = Annotated[dict[ModelName, ModelName], Field(examples=[{"gpt-4": "llama2:70b"}])]


def _model_mappings() -> Any:
    return Field(
        default={},
        description="Names that clients may use, and the models they mean; `parallama models map` "
        "adds others without a restart: see [models](models.md).",
    )


class Ollama(Section):
    """The upstream: an Ollama, or anything that speaks the same dialects."""

    host: Upstream = Field(
        default="http://127.0.0.1",
        description="`http://` or `https://` and a host, without port or path.",
    )
    port: int = Field(default=11434, ge=1, le=65535, description="The upstream's port.")
    hosts: Annotated[
        tuple[UpstreamAt, ...],
        Field(examples=[["http://10.0.0.1:11434", "http://10.0.0.2:11434"]]),
    ] = Field(
        default=(),
        description="Several upstreams that share the calls, instead of `host` and `port`: with "
        "the same models, all by `http://` or all by `https://`.",
    )
    max_parallel: int = Field(
        default=1024,
        ge=1,
        le=10_000,
        description="Most calls that the upstream is given at once, all hosts together; more are "
        "503, with `retry-after`. An upstream keeps a queue of its own, so set it well above what "
        "it works on at once.",
    )
    silence_seconds: int | None = Field(
        default=None,
        ge=1,
        examples=[1800],
        description="How long a call may be silent, before its answer begins (504) or within it "
        "(it is cut). Not set: what `stream_idle_timeout` in `envoy/envoy.yaml` says, 30 minutes.",
    )
    base_path: Annotated[str, _envoys("/ollama/v1")] = Field(
        default="/ollama/v1",
        description="Fixed here; routes are Envoy's: add yours in `envoy/routes.yaml`.",
    )
    default_model: ModelName | None = Field(
        default=None, examples=["llama2"], description="Model of a request that names none."
    )
    model_mappings: ModelMappings = _model_mappings()
    count_tokens: CountTokens = _count_tokens()

    @property
    def url(self) -> str:
        return f"{self.host}:{self.port}"

    def upstream(self) -> tuple[str, str, int]:
        """Scheme, host (IPv6 without brackets) and port: of the first one, where there are more."""
        return self.upstreams()[0]

    def upstreams(self) -> list[tuple[str, str, int]]:
        """All that share the calls."""
        split = (each.rpartition(":") for each in self.hosts or (self.url,))
        named = ((*url.partition("://"), port) for url, _, port in split)
        return [(scheme, host.strip("[]"), int(port)) for scheme, _, host, port in named]


class OpenAI(Section):
    """The gateway for OpenAI's dialect."""

    base_path: Annotated[str, _envoys("/openai/v1")] = Field(
        default="/openai/v1",
        description="Fixed here; routes are Envoy's: add yours in `envoy/routes.yaml`.",
    )
    compatibility_mode: bool = Field(
        default=True, description="Serve OpenAI's paths.", json_schema_extra=LATER
    )
    model_mappings: ModelMappings = _model_mappings()
    count_tokens: CountTokens = _count_tokens()


class ApiGateways(Section):
    """What is offered to clients, and the upstream behind it."""

    enabled: tuple[Gateway, ...] = Field(
        default=("ollama", "openai"),
        min_length=1,
        description="Gateways that are served: `ollama`, `openai`.",
    )
    discovery: Discovery = section()
    ollama: Ollama = section()
    openai: OpenAI = section()

    @property
    def text_counted(self) -> frozenset[str]:
        """Gateways whose text usage_sink counts where the upstream reports no tokens."""
        both = (("ollama", self.ollama), ("openai", self.openai))
        return frozenset(name for name, at in both if at.count_tokens == "tiktoken")

    @property
    def model_mappings(self) -> dict[str, mappings.Table]:
        """By gateway, as they stand here; the database has others."""
        return {"ollama": self.ollama.model_mappings, "openai": self.openai.model_mappings}

    @property
    def default_models(self) -> dict[str, str]:
        """By gateway, where it has one."""
        default = self.ollama.default_model
        return {} if default is None else {"ollama": default}


class RateLimiting(Section):
    """How limits are kept. Which limits there are is in the database: `parallama limits`."""

    time_zone: TimeZone = Field(
        default="UTC",
        examples=["Europe/Berlin"],
        description="Where hours, days and months begin, by its IANA name; daylight saving "
        "included.",
    )
    bytes_per_token: float = Field(
        default=4.0,
        gt=0,
        description="How many bytes of a request's body are taken for one token when tokens are "
        "reserved.",
    )
    default_max_tokens: int = Field(
        default=512,
        ge=1,
        description="Tokens reserved for the answer to a request that names no maximum.",
    )
    reservation_seconds: int = Field(
        default=900,
        ge=1,
        description="When a reservation that nobody settled expires, and its request becomes a row "
        "marked `unknown`. Set it longer than your longest answer takes.",
    )
    enforcement: Literal["soft", "hard"] = Field(
        default="soft",
        description="`soft`: a request may cross a token limit that has room for no other. `hard`: "
        "answers are cut at what the limit has left (`max_tokens` is set in the request).",
    )
    when_redis_is_away: Away = Field(
        default="deny",
        description="`deny` refuses requests until Redis answers again, `allow` lets them pass "
        "unlimited, `local` gives out what was left when Redis was last seen.",
    )
    when_redis_is_away_by_gateway: Annotated[
        dict[Gateway, Away], Field(examples=[{"ollama": "local"}])
    ] = Field(default={}, description="The same for one gateway.")
    processes: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="How many `ratelimit` processes share these limits: with `local` each gives "
        "out its part.",
    )
    cache_size: int = Field(
        default=50_000,
        ge=1,
        description="How many users' limits a process remembers; 200 to 500 bytes each.",
    )

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.time_zone)


class Usage(Section):
    """How usage is recorded."""

    batch_rows: int = Field(default=500, ge=1, le=10_000, description="Most rows per insert.")
    flush_seconds: float = Field(
        default=0.2, gt=0, le=60, description="Longest wait of a row for others to join its insert."
    )
    trail_file_size: Bytes = Field(
        default="64M",
        ge=1024,
        description="Size at which Envoy begins a new file of the trail, in which each finished "
        "request is a line until its row is stored: bytes, or with K, M or G.",
    )
    trail_max_size: Bytes = Field(
        default="4G",
        ge=4096,
        description="Most that all files of the trail may take: the rows that wait while the "
        "database is away, about a million in a gigabyte. Beyond it no lines are written; the log "
        "and `parallama status` say so.",
    )
    retention_days: int | None = Field(
        default=None,
        ge=1,
        le=36_500,
        examples=[400],
        description="Rows older than this are removed; `usage_sink` looks once a day. Not set: "
        "they stay until `parallama usage prune`.",
    )


class Envoy(Section):
    """Envoy, which does the routing."""

    dir: FilePath | None = Field(
        default=None,
        examples=["envoy"],
        description="Folder with your `envoy.yaml` and the files beside it. Not set: the files "
        "that come with Parallama.",
    )
    log_level: Annotated[EnvoyLevel, BeforeValidator(lower)] = Field(
        default="warning",
        description='`trace`, `debug`, `info`, `warning`, `error`, `critical` or `"off"`.',
    )


class Model(Section):
    """The small bundled model, for a try-out without an Ollama."""

    bundled: bool = Field(
        default=False, description="`parallama up` also starts the bundled model with llama.cpp."
    )
    port: int = Field(default=0, ge=0, le=65535, description="Its port; 0 takes a free one.")
    context_tokens: int = Field(
        default=8192, ge=256, description="Size of its context, shared by all slots."
    )
    parallel: int = Field(default=4, ge=1, le=256, description="Requests it works on at once.")
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        examples=[4],
        description="Its threads. Not set: as many as there are cores.",
    )


class Admin(Section):
    """The admin API: users, keys, roles, limits and log-ins over HTTP."""

    enabled: bool = Field(
        default=True, description="Serve it. Without it, people are managed by commands alone."
    )
    timeout_seconds: float = Field(
        default=30, gt=0, le=55, description="How long one of its calls may take."
    )


class Shutdown(Section):
    """How Parallama leaves."""

    drain_seconds: float = Field(
        default=30, ge=0, description="How long running requests may take to end after SIGTERM."
    )


class Logging(Section):
    """What our processes say about themselves. Never a key, a prompt or an answer."""

    level: Annotated[Level, BeforeValidator(upper)] = Field(
        default="INFO", description="`DEBUG`, `INFO`, `WARNING`, `ERROR` or `CRITICAL`."
    )
    dir: FilePath | None = Field(
        default=None,
        examples=["/var/log/parallama"],
        description="Folder for one log file per service. Not set: standard error.",
    )
    max_size: Bytes = Field(
        default="100M",
        ge=1024,
        description="Size at which a log file is put aside: bytes, or with K, M or G.",
    )
    backup_count: int = Field(
        default=10, ge=1, le=1000, description="How many files put aside are kept."
    )
    format: Literal["auto", "json", "text"] = Field(
        default="auto", description="`json`, `text`, or `auto`: text on a terminal, else JSON."
    )
    requests: bool = Field(default=True, description="One line for each finished request.")


class Config(Section):
    """Everything that can be set. Made by `load`."""

    server: Server = section()
    state_dir: FilePath = Field(
        default=Path("state"),
        description="Folder for sockets, counters and the files that Envoy is given.",
    )
    database: Database = section()
    redis: Redis = section()
    authentication: Authentication = section()
    roles: Annotated[
        dict[RoleName, tuple[Granted, ...]],
        Field(examples=[{"auditor": ["audit:read", "usage:read"]}]),
    ] = Field(
        default={},
        description="Roles beside the built-in ones, with what each grants as "
        "`resource:action[:scope]`.",
    )
    api_gateways: ApiGateways = section()
    request_shapes: Annotated[
        dict[ShapedRole, Shape],
        Field(examples=[{"user": {"num_ctx": {"max": 8192}, "keep_alive": {"max": "30m"}}}]),
    ] = Field(
        default={},
        description="What becomes of parameters that requests of a role send, such as `max_tokens` "
        "and `num_ctx`; `*` is for all roles: see [shapes](models.md#shapes).",
    )
    rate_limiting: RateLimiting = section()
    usage: Usage = section()
    envoy: Envoy = section()
    model: Model = section()
    admin: Admin = section()
    shutdown: Shutdown = section()
    logging: Logging = section()

    _source: Path | None = None

    @property
    def source(self) -> Path:
        """The file this came from."""
        return self._source or Path.cwd() / "config.yaml"

    @property
    def dir(self) -> Path:
        """The file's folder, where relative paths start."""
        return self.source.parent

    @property
    def known_roles(self) -> Mapping[str, Permissions]:
        """Those that are built in, and those set here."""
        return {**BUILT_IN, **{name: permissions(each) for name, each in self.roles.items()}}

    @property
    def run_dir(self) -> Path:
        return self.state_dir / "run"

    @property
    def signing_dir(self) -> Path:
        return self.authentication.signing_keys_dir or self.state_dir / "signing"


# Loading


@dataclass(frozen=True, slots=True)
class _Mistake:
    place: Place
    origin: str  # "line 3", or the name of an environment variable
    text: str

    def __str__(self) -> str:
        name = dotted(self.place)
        where = f"{name} ({self.origin})" if name and self.origin else name or self.origin
        return f"{where}: {self.text}" if where else self.text


Origins = dict[Place, str]


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """
    Read the configuration, once for the life of a process.

    Raises ConfigError with every mistake in one message, a line each. No line holds a value.
    """
    source = path.absolute()
    document = yamlfile.parse(_read(source))
    origins: Origins = {place: f"line {line}" for place, line in document.lines.items()}
    mistakes = [_Mistake(m.place, f"line {m.line}", m.text) for m in document.mistakes]
    if document.broken:
        # What cannot be read may hold anything: of the rest only the names can be judged.
        mistakes += _overlay(environ, {}, origins)
        raise ConfigError(_report(source, mistakes))
    if not isinstance(document.data, dict) and document.data is not yamlfile.UNREAD:
        mistakes.append(_Mistake((), "", _not_a_mapping(document.data)))
    data = document.data if isinstance(document.data, dict) else {}
    mistakes += _overlay(environ, data, origins)
    mistakes += _contradictions(data, origins)
    try:
        config = Config.model_validate(_filled(data, Config), source.parent)
    except Invalid as error:
        mistakes += _invalid(error, origins)
        raise ConfigError(_report(source, mistakes)) from None
    if mistakes:
        raise ConfigError(_report(source, mistakes))
    return config.model_copy(update={"_source": source})


def _read(source: Path) -> str:
    try:
        with source.open("rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such file; `parallama init` writes a first one") from None
    except IsADirectoryError:
        raise ConfigError(f"{source}: is a folder; name the file in it") from None
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
    if len(raw) > _LARGEST_FILE:
        raise ConfigError(f"{source}: is larger than {_LARGEST_FILE} bytes; is it the right file?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}: line {line} is not UTF-8 text: save it as UTF-8") from None


def _not_a_mapping(data: object) -> str:
    if data is None:
        return "the file is empty: copy config.example.yaml, or write {} for the defaults"
    return f"the file is {kind(data)}; it must be settings by name, such as server: {{port: 8000}}"


def _overlay(environ: Mapping[str, str], data: dict[str, Any], origins: Origins) -> list[_Mistake]:
    """Put what the environment sets into `data`. Returns what is wrong with it."""
    places = {"__".join(leaf.place).upper(): leaf.place for leaf in leaves(Config)}
    mistakes = []
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name == CONFIG_VARIABLE:
            continue
        place = places.get(name.removeprefix(PREFIX))
        if place is None:
            mistakes.append(_Mistake((), name, _unknown_variable(name, places)))
            continue
        value = yamlfile.parse(environ[name])
        origins[place] = name
        if value.mistakes:
            text = "is not a YAML value: if it is text, put it in double quotes of its own"
            mistakes.append(_Mistake(place, name, text))
        else:
            _put(value.data, place, data)
    return mistakes


def _put(value: object, place: tuple[str, ...], data: dict[str, Any]) -> None:
    for step in place[:-1]:
        if data.get(step) is None:
            data[step] = {}
        if not isinstance(data[step], dict):
            return  # the file has a plain value where a section belongs, and validation says so
        data = data[step]
    data[place[-1]] = value


def _unknown_variable(name: str, known: Iterable[str]) -> str:
    if near := nearest(name.removeprefix(PREFIX).upper(), known):
        return f"unknown setting; did you mean {PREFIX}{near}?"
    return f"unknown setting; names look like {PREFIX}SERVER__PORT, for server.port"


def _filled(data: Mapping[str, Any], model: type[Section]) -> dict[str, Any]:
    """With {} for sections whose settings are all commented out: in YAML they are null."""
    filled = dict(data)
    for name, inner in subsections(model):
        if name in filled and filled[name] is None:
            filled[name] = {}
        elif isinstance(filled.get(name), dict):
            filled[name] = _filled(filled[name], inner)
    return filled


def _contradictions(data: Mapping[str, Any], origins: Origins) -> Iterator[_Mistake]:
    """What is wrong between settings. Asked of plain data: it is told beside other mistakes."""
    for name, wrong in (
        ("database", _wrong_in_database),
        ("redis", _wrong_in_redis),
        ("authentication", _wrong_in_authentication),
        ("api_gateways", _wrong_in_gateways),
    ):
        section = data.get(name)
        if not isinstance(section, dict):
            continue
        given = {setting: value for setting, value in section.items() if value is not None}
        for setting, text in wrong(given):
            place = (name, *setting.split("."))
            yield _Mistake(place, _origin(place, origins), text)
    for deep, text in _wrong_in_mappings(data.get("api_gateways")):
        yield _Mistake(deep, _origin(deep, origins), text)


def _wrong_in_mappings(gateways: Any) -> Iterator[tuple[Place, str]]:
    for gateway in get_args(Gateway) if isinstance(gateways, dict) else ():
        given = gateways.get(gateway)
        given = given if isinstance(given, dict) else {}
        listed, default = given.get("model_mappings"), given.get("default_model")
        table = {
            name: model
            for name, model in (listed if isinstance(listed, dict) else {}).items()
            if isinstance(name, str) and isinstance(model, str)
        }
        place = ("api_gateways", gateway, "model_mappings")
        if len(table) > mappings.MOST:
            yield place, f"must have at most {mappings.MOST}: remove those that nobody uses"
            continue
        first: dict[str, str] = {}
        for name, model in table.items():
            other = first.setdefault(mappings.plain(name), name)
            if other is not name:
                yield (*place, name), f"is another spelling of {other}: write one of the two"
            elif text := mappings.wrong_with(table, name, model):
                yield (*place, name), text
        if isinstance(default, str) and mappings.plain(default) in first:
            yield (
                (*place[:2], "default_model"),
                ("is itself mapped, and a mapping is one step: write the model that it means"),
            )


def _wrong_in_database(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if {"path", "host"} <= given.keys():
        yield "path", "is SQLite's and database.host is PostgreSQL's: remove one of the two"
    for name in ("name", "user"):
        if "host" in given and name not in given:
            yield name, "is missing: PostgreSQL (database.host) needs it, such as parallama"
    for name in ("name", "user", "password_file", "ssl_mode", "ssl_root_cert_file"):
        if "host" not in given and name in given:
            yield name, "belongs to PostgreSQL: set database.host too, or remove it"


def _wrong_in_redis(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    match given.get("mode", "standalone"):
        case "standalone":
            if given.get("nodes"):
                yield "nodes", "belongs to redis.mode sentinel or cluster: set it, or use host"
        case "sentinel" | "cluster" as mode:
            if not given.get("nodes"):
                such = "[10.0.0.1:26379]" if mode == "sentinel" else "[10.0.0.1:6379]"
                yield "nodes", f"is missing: redis.mode {mode} needs it, such as {such}"
            for name in given.keys() & {"host", "port"}:
                yield name, f"is not used with redis.mode {mode}: write host:port into redis.nodes"
    if given.get("mode") == "sentinel" and "sentinel_master" not in given:
        yield "sentinel_master", "is missing: the sentinels need it, such as mymaster"
    if given.get("mode") != "sentinel":
        for name in given.keys() & {"sentinel_master", "sentinel_password_file"}:
            yield name, "belongs to redis.mode sentinel: set it, or remove this"
    if given.get("mode") == "cluster" and given.get("db"):
        yield "db", "must be 0: a cluster has one database only"
    if given.get("mode", "standalone") == "standalone" and "host" not in given:
        for name in ("username", "tls"):
            if given.get(name):
                yield name, "belongs to a server of yours: set redis.host too, or remove it"
    if "username" in given and "password_file" not in given:
        yield "password_file", "is missing: redis.username needs it"
    if not given.get("tls"):
        for name in given.keys() & {"tls_ca_file", "tls_cert_file", "tls_key_file", "tls_verify"}:
            yield name, "has no effect without redis.tls: true"
    if "tls_key_file" in given and "tls_cert_file" not in given:
        yield "tls_cert_file", "is missing: redis.tls_key_file belongs to it"


def _wrong_in_gateways(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ollama = given.get("ollama")
    if not isinstance(ollama, dict):
        return
    hosts = ollama.get("hosts")
    if not isinstance(ollama, dict) or not isinstance(hosts, list) or not hosts:
        return
    if ollama.keys() & {"host", "port"}:
        yield "ollama.hosts", "stands instead of `host` and `port`: remove these"
    if len({str(each).startswith("https://") for each in hosts}) > 1:
        yield "ollama.hosts", "must be all http:// or all https://"


def _wrong_in_authentication(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
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


def _invalid(error: Invalid, origins: Origins) -> Iterator[_Mistake]:
    for each in error.wrong:
        told = each.value is yamlfile.UNREAD and each.kind != "unknown"
        if not told:
            yield _Mistake(each.place, _origin(each.place, origins), explain(each, Config))


def _origin(place: Place, origins: Origins) -> str:
    while place and place not in origins:
        place = place[:-1]
    return origins.get(place, "")


def _report(source: Path, mistakes: Iterable[_Mistake]) -> str:
    def by_line(mistake: _Mistake) -> tuple[int, str]:
        line = mistake.origin.removeprefix("line ")
        return (int(line) if line.isdecimal() else sys.maxsize, str(mistake))

    lines = [f"  {mistake}" for mistake in sorted(mistakes, key=by_line)]
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    return "\n".join([f"{source}: {count}", *lines])


class Setting(NamedTuple):
    path: str
    default: Any
    description: str


def settings(model: type[Section] = Config) -> Iterator[Setting]:
    """Every setting by its dotted path, with its default as one would write it."""
    for place, field in leaves(model):
        default = str(field.default) if isinstance(field.default, Path) else field.default
        default = list(default) if isinstance(default, tuple) else default
        later = " Not used yet." if field.json_schema_extra == LATER else ""
        yield Setting(dotted(place), default, f"{field.description}{later}")


def warnings(config: Config) -> list[str]:
    """What was set and has no effect: nobody is left believing that it had."""
    found = [
        f"{dotted(place)} has no effect yet: it belongs to a later release"
        for place, field in leaves(Config)
        if field.json_schema_extra == LATER and _is_set(config, place)
    ]
    for name, store in (("database", config.database), ("redis", config.redis)):
        if store.host is None and "port" in store.model_fields_set:
            found.append(f"{name}.port has no effect without {name}.host")
    told = config.authentication
    shared = told.jwt_algorithm == "HS256"
    unused = (
        {"signing_keys_dir", "signing_key_publish_minutes"} if shared else {"jwt_secret_key_file"}
    )
    for name in sorted(unused & told.model_fields_set):
        found.append(
            f"authentication.{name} has no effect with authentication.jwt_algorithm "
            f"{told.jwt_algorithm}"
        )
    return found


def _is_set(config: Config, place: tuple[str, ...]) -> bool:
    at: Section = config
    for step in place[:-1]:
        at = getattr(at, step)
    return place[-1] in at.model_fields_set


# docs/configuration.md


def document(text: str) -> str:
    """`text` with the tables of settings between its two markers made anew."""
    before, begin, rest = text.partition("<!-- settings: made by python -m parallama.config -->\n")
    _, end, after = rest.partition("<!-- end of settings -->\n")
    return before + begin + "\n".join(_tables(Config, ())) + end + after


def _tables(model: type[Section], above: tuple[str, ...]) -> Iterator[str]:
    own = [leaf for leaf in leaves(model) if len(leaf.place) == 1]
    yield f"\n### {dotted(above) or 'At the top'}\n"
    if above:
        yield f"{model.__doc__}\n"
    if own:
        yield "| setting | default | what it is |\n|---|---|---|"
    described = {setting.path: setting for setting in settings(model)}
    for leaf in own:
        _, default, description = described[leaf.place[0]]
        shown = "not set" if default is None else f"`{written(default)}`"
        yield f"| `{dotted((*above, *leaf.place))}` | {shown} | {description} |"
    for name, inner in subsections(model):
        yield from _tables(inner, (*above, name))
    if not above:
        yield ""


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(document(Path(name).read_text("utf-8")), "utf-8")
