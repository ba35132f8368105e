"""gRPC Check: parse, decide, render."""

import logging
from collections.abc import Awaitable, Iterable, Mapping
from math import inf
from types import MappingProxyType
from typing import NamedTuple

from google.protobuf.message import DecodeError

from authz import wire
from authz.decide import (
    Allow,
    Asked,
    Deny,
    ModelAsked,
    Signature,
    credential,
    identify,
    judge_model,
)
from authz.keyring import Keyring
from authz.mapped import Mapped, Tables
from authz.signed import UNACCEPTED, Signatures, told
from parallama import rpc
from parallama.clock import Clock
from parallama.db.accounts import Credential
from parallama.endpoints import Action
from parallama.errors import Unavailable
from parallama.shapes import EVERY

log = logging.getLogger(__name__)

CHECK = "/envoy.service.auth.v3.Authorization/Check"

_NO_STORE = Deny(
    503, "service_unavailable", "API keys cannot be checked right now: try again soon."
)
_MOST_SAID = 4096
_BROKEN = Deny(500, "internal_error", "The request could not be checked: tell your administrator.")


class _Said(NamedTuple):
    """
    What was answered to a credential, as the keyring remembers it, until it expires: once that
    forgets it, there is another one.
    """

    found: Credential
    tables: Tables
    until: float
    answer: bytes


class Authz:
    """Answers Envoy. Whatever goes wrong inside is a refusal: auth fails closed."""

    def __init__(
        self,
        keyring: Keyring,
        signatures: Signatures,
        mapped: Mapped,
        *,
        gateways: Iterable[str],
        text_counted: Iterable[str] = (),
        shapes: Mapping[str, str] = MappingProxyType({}),
        clock: Clock,
    ) -> None:
        self._keyring = keyring
        self._signatures = signatures
        self._mapped = mapped
        self._gateways = frozenset(gateways)
        self._text_counted = frozenset(text_counted)
        self._shapes = shapes
        self._clock = clock
        self._said: dict[tuple[str, str, str, str, str], _Said] = {}

    def check(self, request: bytes) -> bytes | Awaitable[bytes]:
        """CheckRequest in, CheckResponse out; at once for a key that was verified before."""
        try:
            message = wire.CheckRequest.FromString(request)
        except DecodeError as error:
            raise rpc.RpcError(rpc.Status.INVALID_ARGUMENT, "not a CheckRequest") from error
        try:
            asked = wire.parse(message)
            if isinstance(asked, ModelAsked):
                return self._model(asked)
            token = credential(asked)
            if isinstance(token, Deny):
                return self._refuse(token, asked)
            if isinstance(token, Signature):
                return self._check_signature(asked, token)
            found = self._keyring.at_once(token)
            if isinstance(found, Deny):
                return self._refuse(found, asked)
            tables = self._mapped.at_once()
            if found is None or tables is None:
                return self._look_up(asked, token)
            return self._identity(asked, found, tables)
        except Exception:
            log.exception("check failed")
            return wire.render_deny(_BROKEN, wire.dialect_of(message))

    async def _check_signature(self, asked: Asked, signature: Signature) -> bytes:
        try:
            key = await self._signatures.find(asked, signature)
            if key is None:
                return self._refuse(UNACCEPTED, asked)
            decision = identify(asked, key, gateways=self._gateways, now=self._clock())
            return self._answer(told(decision), asked, await self._mapped.find())
        except Unavailable as error:
            log.warning("signatures not checked", extra={"cause": str(error)})
            return wire.render_deny(_NO_STORE, asked.dialect)
        except Exception:
            log.exception("check failed")
            return wire.render_deny(_BROKEN, asked.dialect)

    async def _look_up(self, asked: Asked, token: str) -> bytes:
        try:
            found = await self._keyring.find(token)
            if isinstance(found, Deny):
                return self._refuse(found, asked)
            return self._identity(asked, found, await self._mapped.find())
        except Unavailable as error:
            log.warning("keys not checked", extra={"cause": str(error)})
            return wire.render_deny(_NO_STORE, asked.dialect)
        except Exception:
            log.exception("check failed")
            return wire.render_deny(_BROKEN, asked.dialect)

    def _identity(self, asked: Asked, found: Credential, tables: Tables) -> bytes:
        now = self._clock()
        question = (found.id, asked.method, asked.path, asked.gateway, asked.dialect)
        said = self._said.get(question)
        if said is not None and said.found is found and said.tables is tables and now < said.until:
            return said.answer
        decision = identify(asked, found, gateways=self._gateways, now=now)
        answer = self._answer(decision, asked, tables)
        if isinstance(decision, Allow) and found.networks is None:
            if len(self._said) >= _MOST_SAID:
                self._said.clear()
            until = inf if found.expires_at is None else found.expires_at
            self._said[question] = _Said(found, tables, until, answer)
        return answer

    def _answer(self, decision: Allow | Deny, asked: Asked, tables: Tables) -> bytes:
        if isinstance(decision, Deny):
            return self._refuse(decision, asked)
        caller, endpoint = decision.caller, decision.endpoint
        count_text = caller.gateway in self._text_counted
        answer = wire.render_allow(decision, count_text=count_text)
        aliases = tables.get(caller.gateway, "") if endpoint.follows_mappings else ""
        shape = ""
        if self._shapes and endpoint.action is Action.INFER:
            shape = self._shapes.get(caller.role, self._shapes[EVERY])
        return answer + wire.render_edits(aliases, shape) if aliases or shape else answer

    def _model(self, asked: ModelAsked) -> bytes:
        refused = judge_model(asked)
        return self._refuse(refused, asked) if refused else wire.MODEL_ALLOWED

    def _refuse(self, deny: Deny, asked: Asked | ModelAsked) -> bytes:
        user = deny.caller.username if deny.caller else None
        log.info(
            "request refused",
            extra={"status": deny.status, "code": deny.code, "user": user},
        )
        return wire.render_deny(deny, asked.dialect, asked.told_id)
