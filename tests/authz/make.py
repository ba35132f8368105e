"""Keys and questions for the tests of authz: valid by default, override one field."""

from dataclasses import replace
from typing import Any

from envoy.service.auth.v3 import external_auth_pb2 as pb

from authz.bearers import Bearers
from authz.decide import Asked
from authz.mapped import Mapped
from authz.signed import SEEN, Signatures
from parallama import contract as c
from parallama import keys
from parallama.db.accounts import Account, KeyRecord
from parallama.pipeline import Pipeline
from parallama.roles import BUILT_IN, Role
from tests.valkey import Client

NOW = 1_772_366_400.0
MINTED = keys.mint(lambda count: bytes([7]) * count, rounds=4)
TOKEN = MINTED.token
# The same id and a right checksum, but another secret.
_WRONG_BODY = TOKEN[:17] + "A" * 43
WRONG = _WRONG_BODY + keys._checksum(_WRONG_BODY)

ACCOUNT = Account("user-1", "anna", Role.USER, BUILT_IN[Role.USER])
_KEY = KeyRecord(
    id="key-1",
    public_id=MINTED.public_id,
    secret_hash=MINTED.secret_hash,
    name="laptop",
    account=ACCOUNT,
)
_ASKED = Asked(
    method="POST",
    path="/v1/chat/completions",
    query="",
    gateway="openai",
    dialect="openai",
    address="10.1.2.3",
    credentials=(TOKEN,),
)


def a_key(
    *, role: str = Role.USER, disabled: bool = False, user_id: str = "user-1", **fields: Any
) -> KeyRecord:
    account = replace(
        ACCOUNT,
        id=user_id,
        role=role,
        permissions=BUILT_IN.get(role, frozenset()),
        disabled=disabled,
    )
    return replace(_KEY, **{"account": account, **fields})


def no_signatures() -> Signatures:
    """Knows no public key, and has no Redis either."""

    async def find(public_id: str) -> KeyRecord | None:
        return None

    memory = Pipeline(Client("nowhere.sock"), SEEN, timeout=0.1)
    return Signatures(find, memory, window=60, size=1, clock=lambda: NOW)


def no_mappings() -> Mapped:
    """Nothing is mapped."""

    async def find() -> dict[str, dict[str, str]]:
        return {}

    return Mapped(find)


def no_tokens() -> Bearers:
    """Trusts nobody's tokens."""
    return Bearers({}, size=1, skew=0, clock=lambda: NOW)


def an_ask(**fields: Any) -> Asked:
    return replace(_ASKED, **fields)


def a_check(
    *,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    headers: dict[str, str] | None = None,
    route: dict[str, str] | None = None,
    address: str = "10.1.2.3",
) -> pb.CheckRequest:
    """What Envoy's filter `identity` asks."""
    check = pb.CheckRequest()
    at = check.attributes
    at.source.address.socket_address.address = address
    at.source.address.socket_address.port_value = 40000
    at.request.http.method = method
    at.request.http.path = path
    if headers is None:
        headers = {"authorization": f"Bearer {TOKEN}"}
    at.request.http.headers.update({":authority": "gateway", **headers})
    if route is None:
        route = {c.ROUTE_GATEWAY: "openai", c.ROUTE_DIALECT: "openai", c.ROUTE_BASE: ""}
    at.context_extensions.update(route)
    return check


def a_model_check(
    authz: dict[str, Any] | None = None, lua: dict[str, Any] | None = None
) -> pb.CheckRequest:
    """What Envoy's filter `model` asks, with the metadata of the two namespaces."""
    check = a_check(headers={})
    metadata = check.attributes.metadata_context.filter_metadata
    if authz is None:
        authz = {
            c.USER: "user-1",
            c.DIALECT: "openai",
            c.CHECK_MODEL: True,
            c.MODELS: "llama3,gemma*",
        }
    metadata[c.AUTHZ].update(authz)
    if lua is not None:
        metadata[c.LUA].update(lua)
    return check
