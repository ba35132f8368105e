"""
Unmodified client libraries, each called as its documentation says: only the address of the server
and the key are ours. What each is told to do stands in drivers/.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from parallama.limits import Window
from parallama.roles import Role
from tests.clients.drivers import LIBRARIES, Driver, Raised, missing
from tests.e2e.gateway import Gateway, Someone, until
from tests.standin import Behaviour

WORDS = [f"w{n} " for n in range(7)]
TEXT = "".join(WORDS)
MODELS = {"smollm2:latest", "secret:latest"}
SHOWN = (["completion", "tools", "vision"], "smollm2")
BUSY = "server busy, please try again.  maximum pending requests exceeded"

OF_CHAT = "chat stream tool json cancel"
DOES = {
    "ollama, Python": f"{OF_CHAT} generate picture embed list running show manage",
    "ollama, npm": f"{OF_CHAT} generate picture embed list running show manage",
    "openai, Python": f"{OF_CHAT} generate picture embed list show respond respond_in_parts"
    " tool_of_responses",
    "openai, npm": f"{OF_CHAT} generate picture embed list show respond respond_in_parts"
    " tool_of_responses",
    "anthropic, Python": "chat stream tool picture cancel list",
    "langchain-ollama": f"{OF_CHAT} generate picture embed",
    "langchain-openai": f"{OF_CHAT} generate picture embed",
    "llm, its Ollama plugin": OF_CHAT,
    "llm, as OpenAI's client": OF_CHAT,
    "litellm, of Ollama": f"{OF_CHAT} picture",  # embeddings it asks for without the key
    "litellm, of OpenAI": f"{OF_CHAT} picture embed",
}

REFUSALS = {
    "expired key": "This API key has expired",
    "forbidden": "The role readonly may not do this",
    "hidden model": "secret",
    "too large": "The request is too large for this gateway",
    "too fast": "You have reached your limit of 1 request per minute. It resets in ",
    "quota gone": "You have used up your limit of 1 request per day.",
    "busy": BUSY,
}
"""What each is about, and what a reader of the message learns."""

OLLAMA = dict.fromkeys(REFUSALS, "ResponseError")
OPENAI = {
    "expired key": "AuthenticationError",
    "forbidden": "PermissionDeniedError",
    "hidden model": "NotFoundError",
    "too large": "APIError",  # it has no class for this one
    "too fast": "RateLimitError",
    "quota gone": "RateLimitError",
    "busy": "InternalServerError",
}


def but(kinds: dict[str, str], *missing: str) -> dict[str, str]:
    return {what: kind for what, kind in kinds.items() if what not in missing}


# What is large is sent by the libraries below: those of Ollama and OpenAI.
RAISES = {
    "ollama, Python": OLLAMA,
    "ollama, npm": OLLAMA,
    "openai, Python": OPENAI,
    "openai, npm": OPENAI,
    "anthropic, Python": {**OPENAI, "too large": "APIStatusError"},
    "langchain-ollama": but(OLLAMA, "too large"),
    "langchain-openai": but(OPENAI, "too large"),
    # It knows the models that are listed, and says the same of a list that is refused.
    "llm, its Ollama plugin": {
        **but(OLLAMA, "too large"),
        "expired key": "UnknownModelError",
        "hidden model": "UnknownModelError",
    },
    # It asks again when the minute is over.
    "llm, as OpenAI's client": but(OPENAI, "too large", "too fast"),
    # It has one class for all errors of Ollama.
    "litellm, of Ollama": dict.fromkeys(REFUSALS, "APIConnectionError"),
    "litellm, of OpenAI": {**OPENAI, "forbidden": "APIError", "busy": "ServiceUnavailableError"},
}


@dataclass(frozen=True)
class Library:
    """One of them, and the gateway that it calls."""

    name: str
    driver: Driver
    gateway: Gateway

    def do(self, what: str, someone: Someone, **more: Any) -> Any:
        ollama = "llama" in self.name
        return self.driver.do(what, url=self.gateway.url, key=someone.token, ollama=ollama, **more)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Driver]]:
    """The process of a library. Their tests stand together, so one at a time is enough."""
    drivers: list[Driver] = []

    def start(name: str) -> Driver:
        script = LIBRARIES[name]
        if not drivers or drivers[-1].script != script:
            if drivers:
                drivers.pop().stop()
            drivers.append(Driver(script, tmp_path_factory.mktemp("client") / "home"))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.stop()


@pytest.fixture
def library(name: str, gateway: Gateway, running: Callable[[str], Driver]) -> Library:
    if reason := missing(name):
        pytest.skip(reason)
    return Library(name, running(name), gateway)


@pytest.fixture(scope="module")
def operator(shared_gateway: Gateway) -> Someone:
    return shared_gateway.someone(role=Role.OPERATOR)


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_table_knows_all_that_is_done(library: Library, name: str) -> None:
    others = {what for other, does in DOES.items() for what in does.split()
              if LIBRARIES[other] == LIBRARIES[name]}  # fmt: skip
    assert library.driver.does == others


@pytest.mark.parametrize(
    ("name", "what"), [(name, what) for name, does in DOES.items() for what in does.split()]
)
def test_use(library: Library, gateway: Gateway, operator: Someone, name: str, what: str) -> None:
    if what == "cancel":
        leave(library, gateway.someone())
    else:
        use(library, operator, what)


@pytest.mark.parametrize(
    ("name", "what"), [(name, what) for name, kinds in RAISES.items() for what in kinds]
)
def test_error(library: Library, gateway: Gateway, name: str, what: str) -> None:
    """The library raises its own exception for this, and its message says what ours says."""
    kind = RAISES[name][what]
    someone = {
        "expired key": lambda: gateway.someone(expired=True),
        "forbidden": lambda: gateway.someone(role=Role.READONLY),
        "hidden model": lambda: gateway.someone(models=["smollm2"]),
        "too fast": lambda: gateway.someone(requests=1, window=Window.MINUTE),
        "quota gone": lambda: gateway.someone(requests=1),
    }.get(what, gateway.someone)()
    more: dict[str, Any] = {
        "hidden model": {"model": "secret"}, "too large": {"megabytes": 33},
    }.get(what, {})  # fmt: skip
    if what == "busy":
        gateway.upstream.default = Behaviour(status=503, error=BUSY)
    with pytest.raises(Raised) as caught:  # where one is let in; and a minute may end in between
        [library.do("chat", someone, **more) for _ in range(3)]
    assert kind in caught.value.kinds
    assert kind == "UnknownModelError" or REFUSALS[what] in caught.value.message
    assert someone.token not in caught.value.message


def use(library: Library, someone: Someone, what: str) -> None:
    gateway = library.gateway
    before = len(inferred(gateway, someone))
    gave = library.do(what, someone)
    if what in ("list", "running"):
        assert set(gave) >= MODELS
    elif what == "show":
        assert gave in SHOWN
    elif what == "manage":
        assert gave[:2] == ["pulling manifest", "success"]
    elif what == "embed":
        assert gave == [[0.125, 0.25, 0.375, 0.5]] * 2
    else:
        assert gave == expected(what, gave)
        (row,) = until(lambda: inferred(gateway, someone)[before:])
        assert (row["prompt_tokens"], row["completion_tokens"]) == (11, 7)
        assert (row["token_source"], row["finished"]) == ("reported", 1)
    if what == "picture":
        assert gateway.upstream.last().images == 1


def expected(what: str, gave: Any) -> Any:
    if what in ("stream", "respond_in_parts"):
        return [*WORDS, *(part for part in gave[7:] if not part)]
    if what in ("tool", "tool_of_responses"):
        return ["weather", {"city": "w0"}]
    if what == "json":
        return {"words": TEXT}
    return TEXT if what == "picture" else {"text": TEXT, "tokens": [11, 7]}


def inferred(gateway: Gateway, someone: Someone) -> list[dict[str, Any]]:
    return [row for row in gateway.rows_of(someone.user_id) if row["completion_tokens"]]


def leave(library: Library, someone: Someone) -> None:
    """The upstream stops within a second, though it would have gone on."""
    upstream = library.gateway.upstream
    upstream.default = Behaviour(tokens=1000, hold_at=9)
    gave = library.do("cancel", someone)
    left = time.monotonic()
    assert gave == WORDS[:2]
    seen = upstream.wait(lambda seen: seen.client_gone, timeout=30)
    assert time.monotonic() - left < 1
    assert seen.emitted < 10
