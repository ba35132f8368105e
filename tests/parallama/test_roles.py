"""Permissions and roles: what is meant, what is granted, what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama.endpoints import Action
from parallama.errors import UsageError
from parallama.roles import (
    BUILT_IN,
    GATEWAYS,
    OWN,
    RESOURCES,
    Role,
    check_name,
    covers,
    permissions,
    permits,
    within,
)

EVERY = [f"{resource}:{action}" for resource, actions in RESOURCES.items() for action in actions]
SCOPED = [
    f"{each}:{scope}"
    for each in EVERY
    for scope in (GATEWAYS if each.startswith("models:") else (OWN,))
]
SETS = st.frozensets(st.sampled_from(EVERY + SCOPED), max_size=6)
QUESTIONS = st.sampled_from([(*each.split(":"), None)[:3] for each in EVERY + SCOPED])


@pytest.mark.parametrize(
    ("role", "actions"),
    [
        (Role.ADMIN, {Action.READ, Action.INFER, Action.MANAGE}),
        (Role.OPERATOR, {Action.READ, Action.INFER, Action.MANAGE}),
        (Role.USER, {Action.READ, Action.INFER}),
        (Role.READONLY, {Action.READ}),
    ],
)
def test_roles_grant_these_actions_on_models(role: Role, actions: set[Action]) -> None:
    assert {each for each in Action if permits(BUILT_IN[role], "models", each)} == actions


def test_an_admin_may_all_and_others_change_nobody() -> None:
    assert permissions(EVERY) == BUILT_IN[Role.ADMIN]
    for role in (Role.OPERATOR, Role.USER, Role.READONLY):
        for resource, action in (("users", "create"), ("roles", "write"), ("limits", "write")):
            assert not permits(BUILT_IN[role], resource, action, OWN)


def test_stars_stand_for_all_there_is() -> None:
    assert permissions(["models:*"]) == {"models:read", "models:infer", "models:manage"}
    assert "audit:read" in permissions(["*:read"])
    assert permissions(["models:*:ollama"]) == {f"models:{a}:ollama" for a in Action}


def test_a_scope_is_a_part() -> None:
    here = permissions(["models:infer:ollama"])
    assert permits(here, "models", "infer", "ollama")
    assert not permits(here, "models", "infer", "openai")
    assert not permits(here, "models", "infer")
    assert permits(permissions(["models:infer"]), "models", "infer", "openai")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "resource:action"),
        ("models", "models has read, infer, manage"),
        ("models:fly", "models has read, infer, manage"),
        ("planes:fly", "the resources are models, users"),
        ("models:infer:mars", "the scope of models is ollama or openai"),
        ("models:infer:", "the scope of models is ollama or openai"),
        ("keys:read:ollama", "the scope of keys is own"),
        ("*:read:own", "the scope of * is none"),
        ("models:infer:ollama:x", "the scope of models is"),
        ("Models:read", "the resources are"),
        ("models:read ", "models has"),
    ],
)
def test_what_is_no_permission_is_refused_and_told_apart(text: str, told: str) -> None:
    with pytest.raises(UsageError, match="there is no permission") as error:
        permissions([text])
    assert told in str(error.value)


@given(SETS, SETS, QUESTIONS)
def test_within_is_what_both_permit(
    one: frozenset[str], other: frozenset[str], asked: tuple[str, str, str | None]
) -> None:
    assert permits(within(one, other), *asked) == (permits(one, *asked) and permits(other, *asked))
    assert covers(one, within(one, other))


@given(SETS, SETS, QUESTIONS)
def test_who_covers_permits_all_of_it(
    one: frozenset[str], other: frozenset[str], asked: tuple[str, str, str | None]
) -> None:
    if covers(one, other) and permits(other, *asked):
        assert permits(one, *asked)


@pytest.mark.parametrize("name", ["", "Admin", "9lives", "a b", "x" * 51, "a:b", "é"])
def test_names_of_roles_are_plain(name: str) -> None:
    with pytest.raises(UsageError, match="a role is named"):
        check_name(name)
