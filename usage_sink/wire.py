"""Envoy's access-log entries in, finished requests out."""

from base64 import b64decode
from collections.abc import Iterator
from typing import Any

from envoy.data.accesslog.v3 import accesslog_pb2 as pb

from parallama import contract as c
from parallama.finished import MOST, Facts, Finished, finished
from usage_sink.counting import Text

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

_TEXT, _NUMBER, _FLAG = "string_value", "number_value", "bool_value"
_KINDS = {
    c.AUTHZ: (
        *(
            (name, _TEXT)
            for name in (
                c.USER, c.USERNAME, c.KEY, c.GATEWAY, c.DIALECT, c.ENDPOINT, c.RULE,
            )
        ),
        (c.KNOWN_AT, _NUMBER),
    ),
    c.LUA: (
        *((name, _TEXT) for name in (c.MODEL, c.REQUESTED_MODEL, c.RESPONSE_MODEL, c.USAGE_SOURCE)),
        *(
            (name, _NUMBER)
            for name in (
                c.PROMPT_TOKENS, c.COMPLETION_TOKENS, c.CACHED_TOKENS, c.REASONING_TOKENS,
                c.TOTAL_TOKENS, c.COMPUTE_MS, c.FIRST_TOKEN_AT,
            )
        ),
        *(
            (name, _FLAG)
            for name in (c.STREAM, c.FINISHED, c.UPSTREAM_ERROR, c.NO_END, c.USAGE_ODD)
        ),
    ),
    c.RATELIMIT: (
        *((name, _NUMBER) for name in (c.GRANTED, c.TOKENS_LEFT, c.REQUESTS_LEFT)),
        (c.GRANTS, _TEXT),
        (c.DECISION, _TEXT),
    ),
}  # fmt: skip


def parse(entry: pb.HTTPAccessLogEntry) -> Finished | None:
    """None for a request of nobody we know, and for an entry that Envoy writes before the end."""
    common = entry.common_properties
    metadata = common.metadata.filter_metadata
    if c.AUTHZ not in metadata or common.intermediate_log_entry:
        return None
    start = common.start_time
    first_byte = None
    if common.HasField("time_to_first_upstream_rx_byte"):
        first_byte = _seconds(common.time_to_first_upstream_rx_byte)
    flags = [_FLAGS.get(field.name, field.name) for field, _ in common.response_flags.ListFields()]
    return finished(
        request_id=entry.request.request_id,
        start=start.seconds * 1_000_000 + start.nanos // 1000,
        duration=_seconds(common.duration),
        first_byte=first_byte,
        status=entry.response.response_code.value,
        flags=",".join(flags),
        details=entry.response.response_code_details,
        upstream=_address(common.upstream_remote_address),
        who=_facts(metadata, c.AUTHZ),
        lua=_facts(metadata, c.LUA),
        limits=_facts(metadata, c.RATELIMIT),
        attempts=common.upstream_request_attempt_count,
    )


def text_of(entry: pb.HTTPAccessLogEntry) -> Text | None:
    """What is to be counted: text of an answer that began, and whose upstream reported nothing."""
    metadata = entry.common_properties.metadata.filter_metadata
    if c.TEXT not in metadata or c.LUA not in metadata:
        return None
    if metadata[c.LUA].fields[c.USAGE_SOURCE].string_value not in ("counted", "estimated"):
        return None
    fields = metadata[c.TEXT].fields
    prompt, answer = fields[c.PROMPT].string_value, list(_pieces(fields))
    if not prompt and not answer:
        return None
    return Text(
        prompt=_opened(prompt) if prompt else None,
        answer=b"".join(map(_opened, answer)) if answer else None,
        prompt_more=_size(fields[c.PROMPT_MORE].number_value),
        answer_more=_size(fields[c.ANSWER_MORE].number_value),
    )


def _pieces(fields: Any) -> Iterator[str]:
    number = 1
    while piece := fields[str(number)].string_value:
        yield piece
        number += 1


def _opened(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except ValueError:
        return b""


def _size(number: float) -> int:
    return int(number) if 0 < number <= MOST else 0


def _facts(metadata: Any, namespace: str) -> Facts:
    if namespace not in metadata:
        return {}
    fields = metadata[namespace].fields
    # Where a fact is of another kind than the contract says, this is the kind's own zero.
    return {name: getattr(fields[name], kind) for name, kind in _KINDS[namespace] if name in fields}


def _seconds(duration: Any) -> float:
    return float(duration.seconds + duration.nanos / 1e9)


def _address(address: Any) -> str | None:
    """As Envoy writes it."""
    socket = address.socket_address
    host = f"[{socket.address}]" if ":" in socket.address else socket.address
    return f"{host}:{socket.port_value}" if host else None
