"""Which endpoints there are, and what they ask for."""

import pytest

from parallama.endpoints import METERED, Action, find_endpoint, knows_path, model_allowed


@pytest.mark.parametrize(
    ("method", "path", "action"),
    [
        ("POST", "/v1/chat/completions", Action.INFER),
        ("POST", "/api/generate", Action.INFER),
        ("POST", "/api/embed", Action.INFER),
        ("POST", "/v1/responses", Action.INFER),
        ("POST", "/v1/messages", Action.INFER),
        ("POST", "/v1/messages/count_tokens", Action.READ),
        ("GET", "/api/status", Action.READ),
        ("GET", "/v1/models", Action.READ),
        ("GET", "/v1/models/llama3", Action.READ),
        ("GET", "/api/tags", Action.READ),
        ("HEAD", "/api/version", Action.READ),
        ("POST", "/api/show", Action.READ),
        ("POST", "/api/pull", Action.MANAGE),
        ("DELETE", "/api/delete", Action.MANAGE),
        ("HEAD", "/api/blobs/sha256:abc", Action.MANAGE),
    ],
)
def test_an_endpoint_asks_for_its_action(method: str, path: str, action: Action) -> None:
    endpoint = find_endpoint(method, path)
    assert endpoint is not None
    assert endpoint.action is action


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/models"),
        ("GET", "/v1/models/"),
        ("post", "/api/chat"),
        ("POST", "/api/chat/"),
        ("POST", "/API/chat"),
        ("POST", "//api/chat"),
        ("DELETE", "/api/blobs/sha256:abc"),
        ("POST", "/v1/files"),
        ("POST", "/v1/messages/"),
        ("POST", "/v1/messages/batches"),
        ("GET", "/v1/messages/count_tokens"),
        ("POST", "/v1/audio/transcriptions"),
        ("POST", "/api/me"),
        ("POST", "/api/signout"),
        ("DELETE", "/api/user/keys/x"),
        ("POST", "/api/experimental/web_search"),
        ("GET", "/api/experimental/model-recommendations"),
        ("POST", ""),
    ],
)
def test_what_is_not_listed_is_no_endpoint(method: str, path: str) -> None:
    assert find_endpoint(method, path) is None


def test_every_call_that_spends_tokens_names_its_model_in_a_body_that_is_read() -> None:
    for path in ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings",
                 "/v1/chat/completions", "/v1/completions", "/v1/embeddings",
                 "/v1/responses", "/v1/messages"):  # fmt: skip
        endpoint = find_endpoint("POST", path)
        assert endpoint is not None
        assert endpoint.action is Action.INFER
        assert endpoint.reads_body
        assert endpoint.names_model


def test_a_known_path_is_told_from_an_unknown_one() -> None:
    for path in ("/api/chat", "/api/delete", "/v1/models/x", "/api/blobs/sha256:abc"):
        assert knows_path(path)
    for path in ("/api/chats", "/v1/models/", "/api/blobs/md5:abc"):
        assert not knows_path(path)


def test_counting_tokens_is_free_and_names_its_model() -> None:
    path = "/v1/messages/count_tokens"
    endpoint = find_endpoint("POST", path)
    assert endpoint is not None
    assert endpoint.reads_body
    assert endpoint.names_model
    assert path not in METERED


@pytest.mark.parametrize(
    ("patterns", "model", "allowed"),
    [
        (("llama3",), "llama3", True),
        (("llama3",), "llama3:8b", False),
        (("llama3", "gemma*"), "gemma:2b", True),
        (("gemma*",), "Gemma", False),
        ((), "llama3", False),
    ],
)
def test_a_restricted_key_may_use_its_models(
    patterns: tuple[str, ...], model: str, allowed: bool
) -> None:
    assert model_allowed(patterns, model) is allowed
