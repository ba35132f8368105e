"""gRPC Check: parse, decide, render."""

import logging
from collections.abc import Iterable
from typing import Any

import grpc
from envoy.service.auth.v3 import external_auth_pb2 as pb

from authz import wire
from authz.decide import Asked, Deny, ModelAsked, credential, identify, judge_model
from authz.keyring import Keyring
from parallama.clock import Clock
from parallama.errors import Unavailable

log = logging.getLogger(__name__)

_NO_STORE = Deny(
    503, "service_unavailable", "API keys cannot be checked right now: try again soon."
)
_BROKEN = Deny(500, "internal_error", "The request could not be checked: tell your administrator.")


class Authz:
    """Answers Envoy. Whatever goes wrong inside is a refusal: auth fails closed."""

    def __init__(self, keyring: Keyring, *, gateways: Iterable[str], clock: Clock) -> None:
        self._keyring = keyring
        self._gateways = frozenset(gateways)
        self._clock = clock

    async def check(self, request: pb.CheckRequest, context: Any) -> bytes:
        """The serialised CheckResponse."""
        try:
            asked = wire.parse(request)
            if isinstance(asked, ModelAsked):
                return self._model(asked)
            return await self._identity(asked)
        except Unavailable as error:
            log.warning("keys not checked", extra={"cause": str(error)})
            return wire.render_deny(_NO_STORE, wire.dialect_of(request))
        except Exception:
            log.exception("check failed")
            return wire.render_deny(_BROKEN, wire.dialect_of(request))

    async def _identity(self, asked: Asked) -> bytes:
        token = credential(asked)
        if isinstance(token, Deny):
            return self._refuse(token, asked.dialect)
        key = self._keyring.peek(token) or await self._keyring.find(token)
        decision = identify(asked, key, gateways=self._gateways, now=self._clock())
        if isinstance(decision, Deny):
            return self._refuse(decision, asked.dialect)
        return wire.render_allow(decision)

    def _model(self, asked: ModelAsked) -> bytes:
        refused = judge_model(asked)
        return self._refuse(refused, asked.dialect) if refused else wire.MODEL_ALLOWED

    def _refuse(self, deny: Deny, dialect: str) -> bytes:
        user = deny.caller.username if deny.caller else None
        log.info(
            "request refused",
            extra={"status": deny.status, "code": deny.code, "user": user},
        )
        return wire.render_deny(deny, dialect)


def register(authz: Authz, server: grpc.aio.Server) -> None:
    """Like the generated function, but the answer is bytes already."""
    handler = grpc.unary_unary_rpc_method_handler(
        authz.check, request_deserializer=pb.CheckRequest.FromString, response_serializer=bytes
    )
    name = "envoy.service.auth.v3.Authorization"
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(name, {"Check": handler}),)
    )
