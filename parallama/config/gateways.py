"""What is offered to clients, and the servers behind it."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from parallama import mappings
from parallama.checking import AfterValidator, Field
from parallama.errors import UsageError
from parallama.sections import LATER, Section, section
from parallama.values import Upstream, UpstreamAt
from parallama.yamlfile import Place

Gateway = Literal["ollama", "openai"]
CountTokens = Literal["learned", "tiktoken"]


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


def wrong_in_gateways(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong between these settings, by name. `given` is as it stands in the file."""
    ollama = given.get("ollama")
    hosts = ollama.get("hosts") if isinstance(ollama, dict) else None
    if not isinstance(ollama, dict) or not isinstance(hosts, list) or not hosts:
        return
    if ollama.keys() & {"host", "port"}:
        yield "ollama.hosts", "stands instead of `host` and `port`: remove these"
    if len({str(each).startswith("https://") for each in hosts}) > 1:
        yield "ollama.hosts", "must be all http:// or all https://"


def wrong_in_mappings(gateways: Any) -> Iterator[tuple[Place, str]]:
    """The same of the names of models, which are settings themselves: by their whole place."""
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
