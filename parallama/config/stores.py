"""Where things are kept: the database, and Redis."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from parallama.checking import Field
from parallama.sections import Section
from parallama.values import ExistingFile, FilePath, Host, HostPort, Secret, SecretText

SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]


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


def wrong_in_database(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong between these settings, by name. `given` is as it stands in the file."""
    if {"path", "host"} <= given.keys():
        yield "path", "is SQLite's and database.host is PostgreSQL's: remove one of the two"
    for name in ("name", "user"):
        if "host" in given and name not in given:
            yield name, "is missing: PostgreSQL (database.host) needs it, such as parallama"
    for name in ("name", "user", "password_file", "ssl_mode", "ssl_root_cert_file"):
        if "host" not in given and name in given:
            yield name, "belongs to PostgreSQL: set database.host too, or remove it"


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


def wrong_in_redis(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong between these settings, by name. `given` is as it stands in the file."""
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
