"""How limits are kept, and how usage is recorded."""

from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from parallama.checking import Field
from parallama.config.gateways import Gateway
from parallama.sections import Section
from parallama.values import Bytes, TimeZone

Away = Literal["deny", "allow", "local"]


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
