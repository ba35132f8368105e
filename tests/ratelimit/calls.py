"""Calls as Envoy makes them: valid by default, override what a test is about."""

from envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest


def reserve_call(id: str, **entries: str) -> RateLimitRequest:
    known = {
        "user": "u1", "gateway": "openai", "dialect": "openai", "model": "smollm2",
        "endpoint": "/v1/chat/completions", "max_tokens": "100", "body_bytes": "400",
    }  # fmt: skip
    return call({**known, "request_id": id, **entries})


def settle_call(id: str, used: int, **entries: str) -> RateLimitRequest:
    known = {"user": "u1", "gateway": "openai", "model": "smollm2", "reservation": id}
    settle = call({**known, **entries})
    settle.descriptors[0].hits_addend.value = used
    return settle


def call(entries: dict[str, str]) -> RateLimitRequest:
    request = RateLimitRequest(domain="parallama")
    descriptor = request.descriptors.add()
    for key, value in entries.items():
        descriptor.entries.add(key=key, value=value)
    return request
