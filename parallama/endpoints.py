"""What the upstreams offer, and which permission each of it needs (pure)."""

from dataclasses import dataclass
from enum import StrEnum

from parallama.limits import name_matches


class Action(StrEnum):
    """What a permission for `models` is about."""

    READ = "read"
    INFER = "infer"
    MANAGE = "manage"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """
    One of the upstream's endpoints.

    `names_model`: its body says which model it is about. `lists_models`: its answer does.
    """

    path: str
    action: Action
    reads_body: bool = False
    names_model: bool = False
    lists_models: bool = False


def _infer(path: str) -> Endpoint:
    return Endpoint(path, Action.INFER, reads_body=True, names_model=True)


def _read(path: str) -> Endpoint:
    return Endpoint(path, Action.READ)


def _list(path: str) -> Endpoint:
    return Endpoint(path, Action.READ, lists_models=True)


def _manage(path: str) -> Endpoint:
    return Endpoint(path, Action.MANAGE, reads_body=True, names_model=True)


_OLLAMA = {
    ("POST", "/api/chat"): _infer("/api/chat"),
    ("POST", "/api/generate"): _infer("/api/generate"),
    ("POST", "/api/embed"): _infer("/api/embed"),
    ("POST", "/api/embeddings"): _infer("/api/embeddings"),
    ("GET", "/api/version"): _read("/api/version"),
    ("HEAD", "/api/version"): _read("/api/version"),
    ("GET", "/api/tags"): _list("/api/tags"),
    ("HEAD", "/api/tags"): _list("/api/tags"),
    ("GET", "/api/ps"): _list("/api/ps"),
    ("POST", "/api/show"): Endpoint("/api/show", Action.READ, reads_body=True, names_model=True),
    ("POST", "/api/pull"): _manage("/api/pull"),
    ("POST", "/api/push"): _manage("/api/push"),
    ("POST", "/api/create"): _manage("/api/create"),
    ("POST", "/api/copy"): Endpoint("/api/copy", Action.MANAGE, reads_body=True),
    ("DELETE", "/api/delete"): _manage("/api/delete"),
}
_OPENAI = {
    ("POST", "/v1/chat/completions"): _infer("/v1/chat/completions"),
    ("POST", "/v1/completions"): _infer("/v1/completions"),
    ("POST", "/v1/embeddings"): _infer("/v1/embeddings"),
    ("GET", "/v1/models"): _list("/v1/models"),
}
METERED = frozenset(
    at.path for at in (*_OLLAMA.values(), *_OPENAI.values()) if at.action is Action.INFER
)
"""The endpoints whose calls spend tokens."""

_BLOBS = "/api/blobs/sha256"
_MODELS = "/v1/models/"

ONE_MODEL = "/v1/models/{model}"

ADMIN = "admin"
"""The gateway of our own API: what its paths need, it knows itself (parallama/admin)."""

ADMIN_API = Endpoint("/admin", Action.READ)
"""Stands for all of them."""


def find_endpoint(method: str, path: str) -> Endpoint | None:
    """
    The endpoint behind a request, by method and the upstream's own path without its query.

    None for everything that is not listed: what nobody thought about is refused.
    """
    found = _OLLAMA.get((method, path)) or _OPENAI.get((method, path))
    if found is None and method in ("POST", "HEAD") and path.startswith(_BLOBS):
        return Endpoint("/api/blobs", Action.MANAGE)
    if found is None and method == "GET" and path.startswith(_MODELS) and len(path) > len(_MODELS):
        return Endpoint(ONE_MODEL, Action.READ)
    return found


def knows_path(path: str) -> bool:
    """Whether any method of this path is listed: tells 405 from 404."""
    return any(known == path for _, known in (*_OLLAMA, *_OPENAI))


def model_allowed(patterns: tuple[str, ...], model: str) -> bool:
    """Whether a key restricted to `patterns` (names, or prefixes ending in `*`) may use `model`."""
    return any(name_matches(pattern, model) for pattern in patterns)
