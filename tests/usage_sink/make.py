"""Access-log entries as Envoy writes them: valid by default, override what a test is about."""

from typing import Any

from envoy.data.accesslog.v3 import accesslog_pb2 as pb

from parallama import contract as c

START = 1_772_366_400  # 2026-03-01 12:00:00 UTC

WHO: dict[str, Any] = {
    c.USER: "user-1",
    c.USERNAME: "anna",
    c.KEY: "key-1",
    c.ROLE: "user",
    c.GATEWAY: "ollama",
    c.DIALECT: "openai",
    c.ENDPOINT: "/v1/chat/completions",
    c.METERED: "1",
    c.READ_BODY: True,
}
STREAM: dict[str, Any] = {
    c.MODEL: "llama3",
    c.STREAM: True,
    c.BODY_BYTES: "120",
    c.MAX_TOKENS: "100",
    c.STREAM_USAGE: "ours",
    c.PROMPT_TOKENS: 11,
    c.COMPLETION_TOKENS: 20,
    c.TOTAL_TOKENS: 31,
    c.USAGE_SOURCE: "reported",
    c.FINISHED: True,
    c.RESPONSE_MODEL: "llama3:8b",
    c.FIRST_TOKEN_AT: (START + 0.75) * 1000,
    c.COMPUTE_MS: 812.5,
}


def an_entry(
    request_id: str = "r1",
    *,
    who: dict[str, Any] | None = WHO,
    lua: dict[str, Any] | None = STREAM,
    limits: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    status: int = 200,
    flags: tuple[str, ...] = (),
    details: str = "via_upstream",
    intermediate: bool = False,
    first_byte: float | None = 0.2,
    nanos: int = 500_000_000,
    upstream: str = "127.0.0.1",
) -> pb.HTTPAccessLogEntry:
    """It began at START and half a second, unless `nanos` says otherwise, and took 1.5 s."""
    entry = pb.HTTPAccessLogEntry(protocol_version=pb.HTTPAccessLogEntry.HTTP11)
    common = entry.common_properties
    common.start_time.seconds, common.start_time.nanos = START, nanos
    common.duration.seconds, common.duration.nanos = 1, 500_000_000
    if first_byte is not None:
        common.time_to_first_upstream_rx_byte.FromNanoseconds(round(first_byte * 1e9))
    if upstream:
        common.upstream_remote_address.socket_address.address = upstream
        common.upstream_remote_address.socket_address.port_value = 11434
        common.upstream_request_attempt_count = 1
    common.upstream_cluster = "upstream"
    common.intermediate_log_entry = intermediate
    for flag in flags:
        field = getattr(common.response_flags, flag)
        if isinstance(field, bool):
            setattr(common.response_flags, flag, True)
        else:
            field.SetInParent()
    for namespace, facts in ((c.AUTHZ, who), (c.LUA, lua), (c.RATELIMIT, limits), (c.TEXT, text)):
        if facts is not None:
            common.metadata.filter_metadata[namespace].update(facts)
    entry.request.request_id = request_id
    entry.request.path = "/v1/chat/completions"
    entry.response.response_code.value = status
    entry.response.response_code_details = details
    return entry
