"""What runs, and how: Envoy and where it listens, the services, the bundled model."""

from typing import Annotated, Literal

from parallama.checking import BeforeValidator, Field
from parallama.sections import Section, section
from parallama.values import Address, Bytes, FilePath, HeaderName, Origin, lower, upper

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
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
