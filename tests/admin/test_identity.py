"""What authz tells of a caller, and what the service understands."""

from hypothesis import given
from hypothesis import strategies as st

from parallama import identity
from parallama.roles import BUILT_IN, Role
from tests.examples import examples

PATTERNS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=50)
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=255)


@given(NAMES)
@examples(50)
def test_a_name_arrives_as_it_is_and_passes_for_a_header(name: str) -> None:
    told = identity.headers(
        user="u", username=name, permissions=BUILT_IN[Role.ADMIN], kind="key", id="k"
    )
    assert all(value.isascii() and value.isprintable() for value in told.values())
    assert identity.username(told[identity.USERNAME]) == name


@given(st.none() | st.lists(PATTERNS, max_size=3))
@examples(100)
def test_the_models_that_may_be_seen_arrive_as_they_are(models: list[str] | None) -> None:
    told = identity.viewer_headers(
        endpoint="/api/tags", gateways=["ollama", "openai"], dialect="problem", models=models
    )
    assert all(value.isascii() and value.isprintable() for value in told.values())
    seen = identity.viewer(told)
    assert seen is not None
    assert seen.models == (("*",) if models is None else tuple(models))
    assert (seen.gateways, seen.dialect) == (("ollama", "openai"), "problem")
    for name in told:
        assert identity.viewer({k: v for k, v in told.items() if k != name}) is None


def test_all_are_told_each_time() -> None:
    """So that each is set in the place of one that a client may have sent."""
    told = identity.headers(user="u", username="n", permissions=frozenset(), kind="token", id="j")
    assert told == {
        identity.USER: "u",
        identity.USERNAME: "n",
        identity.PERMISSIONS: "",
        identity.CREDENTIAL: "token:j",
    }
