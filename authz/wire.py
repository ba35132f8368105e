"""Envoy's ext_authz messages: CheckRequest in, CheckResponse out."""

from functools import lru_cache
from typing import Any

from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.service.auth.v3 import external_auth_pb2 as pb
from google.rpc import code_pb2

from authz import signed
from authz.decide import Allow, Asked, Caller, Deny, ModelAsked, Signature
from parallama import contract as c
from parallama.dialects import content_type, refusal
from parallama.endpoints import ADMIN, DISCOVERY, Action

CheckRequest = pb.CheckRequest

_REQUEST_ID = "x-request-id"
_GRPC_CODES = {401: code_pb2.UNAUTHENTICATED, 404: code_pb2.NOT_FOUND}


def parse(check: pb.CheckRequest) -> Asked | ModelAsked:
    """Which of the two questions this is, told by the metadata that only the second one carries."""
    attributes = check.attributes
    metadata = attributes.metadata_context.filter_metadata
    if c.AUTHZ in metadata:
        return _parse_model(metadata, attributes.request.http.headers.get(_REQUEST_ID, ""))
    http = attributes.request.http
    route = attributes.context_extensions
    path, _, query = http.path.partition("?")
    return Asked(
        method=http.method,
        path=path.removeprefix(route.get(c.ROUTE_BASE, "")),
        query=query,
        gateway=route[c.ROUTE_GATEWAY],
        dialect=route[c.ROUTE_DIALECT],
        address=attributes.source.address.socket_address.address,
        credentials=tuple(_credentials(http.headers)),
        request_id=http.id,
        told_id=http.headers.get(_REQUEST_ID, ""),
    )


def dialect_of(check: pb.CheckRequest) -> str:
    """The caller's dialect, for an answer to a question that could not be read or decided."""
    metadata = check.attributes.metadata_context.filter_metadata
    if c.AUTHZ in metadata:
        return str(metadata[c.AUTHZ].fields[c.DIALECT].string_value)
    return str(check.attributes.context_extensions.get(c.ROUTE_DIALECT, ""))


def _parse_model(metadata: Any, told_id: str) -> ModelAsked:
    known = metadata[c.AUTHZ].fields
    facts = metadata[c.LUA].fields if c.LUA in metadata else {}
    return ModelAsked(
        dialect=known[c.DIALECT].string_value,
        models=tuple(filter(None, known[c.MODELS].string_value.split(","))),
        model=_name(facts, c.MODEL),
        requested=_name(facts, c.REQUESTED_MODEL),
        told_id=told_id,
    )


def _name(facts: Any, key: str) -> str | None:
    return (facts[key].string_value or None) if key in facts else None


def _credentials(headers: Any) -> list[str | Signature]:
    found: list[str | Signature] = []
    authorization = headers.get("authorization")
    if authorization is not None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "bearer":
            found.append(token.strip(" "))
        else:  # a signature names no scheme
            found.append(Signature(scheme) if ":" in scheme and not token else "")
    for name in ("x-api-key", "api-key"):
        if name in headers:
            found.append(headers[name].strip(" "))
    return found


def render_allow(allow: Allow, *, count_text: bool = False) -> bytes:
    """The serialised answer."""
    answer = _render_allow(allow, count_text)
    return answer + _render_watch(allow.watch) if allow.watch else answer


@lru_cache(maxsize=16384)
def _render_allow(allow: Allow, count_text: bool) -> bytes:
    """All but the watch word: the same for every call of one key, or user, to one endpoint."""
    response = pb.CheckResponse()
    response.ok_response.SetInParent()
    if allow.signed:
        response.ok_response.query_parameters_to_remove.append(signed.STAMP)
    for name, value in allow.headers:
        _add_header(response.ok_response, name, value)
    if not _is_admin(allow.caller):  # what has a user in its metadata becomes a usage row
        told = _metadata(allow.caller) | _instructions(allow)
        if count_text and c.METERED in told:
            told[c.COUNT_TEXT] = True
        response.dynamic_metadata.update(told)
    return bytes(response.SerializeToString())


@lru_cache(maxsize=16384)
def _render_watch(word: str) -> bytes:
    """What follows an answer, as in `render_edits`: of each token it is another one."""
    response = pb.CheckResponse()
    response.dynamic_metadata.fields[c.WATCH].string_value = word
    return bytes(response.SerializeToString())


@lru_cache(maxsize=64)
def render_edits(aliases: str, shape: str) -> bytes:
    """
    What follows an answer of `render_allow` where facts.lua is to edit the body. Messages that are
    written one after the other are read as one, so what is long is not kept with every answer.
    """
    told = {c.ALIASES: aliases, c.SHAPE: shape}
    response = pb.CheckResponse()
    response.dynamic_metadata.update({name: text for name, text in told.items() if text})
    return bytes(response.SerializeToString())


def render_deny(deny: Deny, dialect: str, told_id: str = "") -> bytes:
    """`told_id`: see `Asked`."""
    response = pb.CheckResponse()
    response.status.code = _GRPC_CODES.get(deny.status, code_pb2.PERMISSION_DENIED)
    denied = response.denied_response
    denied.status.code = deny.status
    body = refusal(dialect, deny.status, deny.code, deny.message, request_id=told_id)
    denied.body = body.decode()
    _add_header(denied, "content-type", content_type(dialect))
    if deny.status == 401:
        _add_header(denied, "www-authenticate", 'Bearer realm="parallama"')
    if deny.caller is not None and not _is_admin(deny.caller):
        response.dynamic_metadata.update(_metadata(deny.caller))
    if deny.rule:
        response.dynamic_metadata[c.RULE] = deny.rule
    return bytes(response.SerializeToString())


MODEL_ALLOWED = bytes(
    pb.CheckResponse(ok_response=pb.OkHttpResponse()).SerializeToString()
)  # says nothing: what the first answer set stays


def _is_admin(caller: Caller) -> bool:
    return caller.gateway in (ADMIN, DISCOVERY)


def _metadata(caller: Caller) -> dict[str, Any]:
    told = {
        c.USER: caller.user,
        c.USERNAME: caller.username,
        c.ROLE: caller.role,
        c.GATEWAY: caller.gateway,
        c.DIALECT: caller.dialect,
        c.ENDPOINT: caller.endpoint,
        c.KNOWN_AT: caller.known_at,
    }
    return told | {c.KEY: caller.key} if caller.key else told


def _instructions(allow: Allow) -> dict[str, Any]:
    """What Envoy's later filters shall do with the request."""
    told: dict[str, Any] = {}
    if allow.endpoint.action is Action.INFER:
        told[c.METERED] = "1"
    if allow.endpoint.reads_body:
        told[c.READ_BODY] = True
    if allow.models is not None:
        models = ",".join(allow.models)
        if allow.endpoint.names_model:
            told |= {c.CHECK_MODEL: True, c.MODELS: models}
    return told


def _add_header(answer: pb.DeniedHttpResponse | pb.OkHttpResponse, name: str, value: str) -> None:
    """In the place of one that the client may have sent."""
    option = answer.headers.add()
    option.append_action = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    option.header.key = name
    option.header.value = value
