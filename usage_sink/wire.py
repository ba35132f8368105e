"""Envoy's access-log entries in, usage records out."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from envoy.data.accesslog.v3 import accesslog_pb2 as pb

from parallama import contract as c
from parallama.usage import TokenSource, UsageRecord

# Short names as in Envoy's %RESPONSE_FLAGS%.
_FLAGS = {
    "failed_local_healthcheck": "LH",
    "no_healthy_upstream": "UH",
    "upstream_request_timeout": "UT",
    "local_reset": "LR",
    "upstream_remote_reset": "UR",
    "upstream_connection_failure": "UF",
    "upstream_connection_termination": "UC",
    "upstream_overflow": "UO",
    "no_route_found": "NR",
    "delay_injected": "DI",
    "fault_injected": "FI",
    "rate_limited": "RL",
    "unauthorized_details": "UAEX",
    "rate_limit_service_error": "RLSE",
    "downstream_connection_termination": "DC",
    "upstream_retry_limit_exceeded": "URX",
    "stream_idle_timeout": "SI",
    "invalid_envoy_request_headers": "IH",
    "downstream_protocol_error": "DPE",
    "upstream_max_stream_duration_reached": "UMSDR",
    "response_from_cache_filter": "RFCF",
    "no_filter_config_found": "NFCF",
    "duration_timeout": "DT",
    "upstream_protocol_error": "UPE",
    "no_cluster_found": "NC",
    "overload_manager": "OM",
    "dns_resolution_failure": "DF",
    "downstream_remote_reset": "DR",
    "unconditional_drop_overload": "UDO",
}

_UPSTREAM_ANSWERED = "via_upstream"
_CLIENT_CLOSED_REQUEST = 499  # as Ollama and nginx say it; Envoy logs 0 where nothing was sent


@dataclass(frozen=True, slots=True)
class Finished:
    """A usage record, and what the caller's tightest limits had left after it."""

    record: UsageRecord
    tokens_left: int | None
    requests_left: int | None


def parse(entry: pb.HTTPAccessLogEntry) -> Finished | None:
    """None for a request of nobody we know, and for an entry that Envoy writes before the end."""
    common = entry.common_properties
    metadata = common.metadata.filter_metadata
    if c.AUTHZ not in metadata or common.intermediate_log_entry:
        return None
    who = metadata[c.AUTHZ].fields
    if _text(who, c.USER) is None:
        return None
    lua = metadata[c.LUA].fields if c.LUA in metadata else {}
    limits = metadata[c.RATELIMIT].fields if c.RATELIMIT in metadata else {}
    flags = [_FLAGS.get(field.name, field.name) for field, _ in common.response_flags.ListFields()]
    details = entry.response.response_code_details
    aborted = "DC" in flags or "DR" in flags or details.startswith("downstream_remote")
    status = entry.response.response_code.value
    if status == 0 and aborted:
        status = _CLIENT_CLOSED_REQUEST
    total = _count(lua, c.TOTAL_TOKENS) or 0
    source = _text(lua, c.USAGE_SOURCE)
    record = UsageRecord(
        request_id=entry.request.request_id,
        timestamp=_start(common),
        user_id=who[c.USER].string_value,
        username=who[c.USERNAME].string_value,
        key_id=_text(who, c.KEY),
        gateway=who[c.GATEWAY].string_value,
        dialect=who[c.DIALECT].string_value,
        endpoint=who[c.ENDPOINT].string_value,
        model_name=_text(lua, c.MODEL),
        served_model=_text(lua, c.RESPONSE_MODEL),
        prompt_tokens=_count(lua, c.PROMPT_TOKENS),
        completion_tokens=_completion(lua, source, total),
        cached_tokens=_count(lua, c.CACHED_TOKENS),
        tokens_used=total,
        token_source=_source(source),
        streamed=_flag(lua, c.STREAM),
        finished=_flag(lua, c.FINISHED),
        aborted=aborted,
        status_code=status,
        flags=",".join(flags),
        error_message=_error(details, in_answer=_flag(lua, c.UPSTREAM_ERROR)),
        request_duration=_seconds(common.duration),
        time_to_first_token=_first_token(common, lua, status),
        compute_ms=lua[c.COMPUTE_MS].number_value if c.COMPUTE_MS in lua else None,
        upstream_host=_address(common.upstream_remote_address),
    )
    left = _count(limits, c.TOKENS_LEFT)
    if left is not None:
        left += (_count(limits, c.GRANTED) or 0) - total
    return Finished(record, left, _count(limits, c.REQUESTS_LEFT))


def _source(told: str | None) -> TokenSource:
    """Where nothing was told nothing was generated, and that was counted."""
    return "reported" if told == "reported" else "estimated" if told == "estimated" else "counted"


def _completion(lua: Any, source: str | None, total: int) -> int | None:
    """While a stream runs only its total is written, so that is all that one cut short has."""
    told = _count(lua, c.COMPLETION_TOKENS)
    return total if told is None and source == "counted" else told


def _text(fields: Any, name: str) -> str | None:
    return (fields[name].string_value or None) if name in fields else None


def _count(fields: Any, name: str) -> int | None:
    return int(fields[name].number_value) if name in fields else None


def _flag(fields: Any, name: str) -> bool:
    return name in fields and fields[name].bool_value


def _start(common: Any) -> datetime:
    at = common.start_time
    return datetime.fromtimestamp(at.seconds, UTC).replace(microsecond=at.nanos // 1000)


def _seconds(duration: Any) -> float:
    return float(duration.seconds + duration.nanos / 1e9)


def _first_token(common: Any, lua: Any, status: int) -> float | None:
    if c.FIRST_TOKEN_AT in lua:
        start = common.start_time
        at = lua[c.FIRST_TOKEN_AT].number_value / 1000
        return float(max(0.0, at - start.seconds - start.nanos / 1e9))
    if status == 200 and common.HasField("time_to_first_upstream_rx_byte"):
        return _seconds(common.time_to_first_upstream_rx_byte)
    return None


def _address(address: Any) -> str | None:
    socket = address.socket_address
    return f"{socket.address}:{socket.port_value}" if socket.address else None


def _error(details: str, *, in_answer: bool) -> str | None:
    if in_answer:
        return "the upstream reported an error inside its answer"
    return None if details in ("", _UPSTREAM_ANSWERED) else details
