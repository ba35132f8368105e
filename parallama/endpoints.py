"""What the upstreams offer, and which permission each of it needs (pure)."""

from dataclasses import dataclass, replace
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

    `names_model`: its body says which model it is about. `catalogued`: parallama.admin answers it,
    from what it keeps of the upstream's own answers (parallama/admin/catalog).
    """

    path: str
    action: Action
    reads_body: bool = False
    names_model: bool = False
    catalogued: bool = False

    @property
    def follows_mappings(self) -> bool:
        """Whether the model that its body names may be a name that is mapped."""
        return self.names_model and self.action is not Action.MANAGE


def _infer(path: str) -> Endpoint:
    return Endpoint(path, Action.INFER, reads_body=True, names_model=True)


def _read(path: str) -> Endpoint:
    return Endpoint(path, Action.READ)


def _list(path: str) -> Endpoint:
    return Endpoint(path, Action.READ, catalogued=True)


def _look_at(path: str) -> Endpoint:
    return Endpoint(path, Action.READ, reads_body=True, names_model=True)


def _manage(path: str) -> Endpoint:
    return Endpoint(path, Action.MANAGE, reads_body=True, names_model=True)


_OLLAMA = {
    ("POST", "/api/chat"): _infer("/api/chat"),
    ("POST", "/api/generate"): _infer("/api/generate"),
    ("POST", "/api/embed"): _infer("/api/embed"),
    ("POST", "/api/embeddings"): _infer("/api/embeddings"),
    ("GET", "/api/version"): _list("/api/version"),
    ("HEAD", "/api/version"): _list("/api/version"),
    ("GET", "/api/tags"): _list("/api/tags"),
    ("HEAD", "/api/tags"): _list("/api/tags"),
    ("GET", "/api/ps"): _list("/api/ps"),
    ("GET", "/api/status"): _read("/api/status"),
    ("POST", "/api/show"): replace(_look_at("/api/show"), catalogued=True),
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
    ("POST", "/v1/responses"): _infer("/v1/responses"),
    ("POST", "/v1/messages"): _infer("/v1/messages"),
    ("POST", "/v1/messages/count_tokens"): _look_at("/v1/messages/count_tokens"),
    ("GET", "/v1/models"): _list("/v1/models"),
}
METERED = frozenset(
    at.path for at in (*_OLLAMA.values(), *_OPENAI.values()) if at.action is Action.INFER
)
"""The endpoints whose calls spend tokens."""

_METHODS = ("GET", "POST", "DELETE")
_BLOBS = "/api/blobs/sha256"
_MODELS = "/v1/models/"

ONE_MODEL = "/v1/models/{model}"

ADMIN = "admin"
"""The gateway of our own API: what its paths need, it knows itself (parallama/admin)."""

ADMIN_API = Endpoint("/admin", Action.READ)
"""Stands for all of them."""

DISCOVERY = "discovery"
"""The gateway of one page that says what the others are; whoever is known may read it."""

DISCOVERY_PAGE = Endpoint("/gateway/discovery", Action.READ)


def find_endpoint(method: str, path: str) -> Endpoint | None:
    """
    The endpoint behind a request, by method and the upstream's own path without its query.

    None for everything that is not listed: what nobody thought about is refused.
    """
    found = _OLLAMA.get((method, path)) or _OPENAI.get((method, path))
    if found is None and method in ("POST", "HEAD") and path.startswith(_BLOBS):
        return Endpoint("/api/blobs", Action.MANAGE)
    if found is None and method == "GET" and path.startswith(_MODELS) and len(path) > len(_MODELS):
        return _list(ONE_MODEL)
    return found


def knows_path(path: str) -> bool:
    """Whether any method of this path is listed: tells 405 from 404."""
    return any(find_endpoint(method, path) for method in _METHODS)


def model_allowed(patterns: tuple[str, ...], model: str) -> bool:
    """Whether a key restricted to `patterns` (names, or prefixes ending in `*`) may use `model`."""
    return any(name_matches(pattern, model) for pattern in patterns)
