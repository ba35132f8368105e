"""Request shapes: what may be configured, and what facts.lua is told of it."""

from pathlib import Path

import pytest

from parallama.config import load
from parallama.errors import ConfigError
from parallama.shapes import EVERY, written


def told(folder: Path, text: str) -> list[str]:
    (folder / "config.yaml").write_text(f"request_shapes: {text}\n", encoding="utf-8")
    try:
        load(folder / "config.yaml", {})
    except ConfigError as error:
        return [line.removeprefix("  request_shapes") for line in str(error).splitlines()[1:]]
    return []


def texts(folder: Path, text: str) -> dict[str, str]:
    assert told(folder, text) == []
    return written(load(folder / "config.yaml", {}).request_shapes)


def test_every_kind_of_rule(tmp_path: Path) -> None:
    text = """
  user:
    max_tokens: {max: 4096, default: 1024}
    num_ctx: {max: 8192}
    keep_alive: {max: 1h30m, default: 90}
    num_gpu: {set: -1}
    use_mmap: {default: false}
    numa: {drop: true}
    use_mlock: {}
"""
    assert texts(tmp_path, text) == {
        EVERY: "",
        "user": "\nkeep_alive max=5400 default=90\nmax_tokens max=4096 default=1024"
        "\nnum_ctx max=8192\nnum_gpu set=-1\nnuma drop=true\nuse_mmap default=false",
    }


def test_a_roles_own_rule_counts_in_the_place_of_that_for_all(tmp_path: Path) -> None:
    text = '{"*": {num_ctx: {max: 9}, num_predict: {max: 5}}, admin: {num_ctx: {}}, b: {}}'
    assert texts(tmp_path, text) == {
        EVERY: "\nmax_tokens max=5\nnum_ctx max=9",
        "admin": "\nmax_tokens max=5",
        "b": "\nmax_tokens max=5\nnum_ctx max=9",
    }
    over = '{"*": {num_predict: {max: 5}}, admin: {max_tokens: {max: 7}}}'
    assert texts(tmp_path, over)["admin"] == "\nmax_tokens max=7"


def test_without_shapes_nothing_is_told(tmp_path: Path) -> None:
    assert texts(tmp_path, "{}") == {EVERY: ""}


@pytest.mark.parametrize(
    ("rule", "seconds"),
    [("30m", 1800), ("1h", 3600), ("1h30m5s", 5405), ("90", 90), ("0", 0), ('"0s"', 0)],
)
def test_durations(tmp_path: Path, rule: str, seconds: int) -> None:
    (text,) = [texts(tmp_path, f"{{user: {{keep_alive: {{max: {rule}}}}}}}")["user"]]
    assert text == f"\nkeep_alive max={seconds}"


@pytest.mark.parametrize("forever", ["forever", "-1", '"-1"'])
def test_for_ever(tmp_path: Path, forever: str) -> None:
    text = texts(tmp_path, f"{{user: {{keep_alive: {{set: {forever}}}}}}}")["user"]
    assert text == "\nkeep_alive set=-1"
    assert told(tmp_path, f"{{user: {{keep_alive: {{max: {forever}}}}}}}") == [
        ".user.keep_alive.max (line 1): must be at least 0"
    ]


_DURATION = (
    "must be seconds, or a duration such as 30m or 1h30m, of a year at most; `forever` is one as "
    "well"
)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (
            "{user: {max_tokens: {max: 5, default: 6}}}",
            ".user.max_tokens (line 1): `default` must not be more than `max`",
        ),
        (
            "{user: {keep_alive: {max: 5m, default: forever}}}",
            ".user.keep_alive (line 1): `default` must not be more than `max`",
        ),
        (
            "{user: {num_gpu: {set: 1, max: 2}}}",
            ".user.num_gpu (line 1): `set` and `drop` stand alone: with them, nothing else can "
            "matter",
        ),
        (
            "{user: {num_gpu: {drop: true, default: 2}}}",
            ".user.num_gpu (line 1): `set` and `drop` stand alone: with them, nothing else can "
            "matter",
        ),
        (
            "{user: {max_tokens: {max: 1}, num_predict: {max: 1}}}",
            ".user (line 1): max_tokens and num_predict are two names of one parameter: keep one",
        ),
        ("{user: {max_tokens: {max: 0}}}", ".user.max_tokens.max (line 1): must be at least 1"),
        (
            "{user: {num_ctxx: {max: 1}}}",
            ".user.num_ctxx (line 1): unknown setting; did you mean request_shapes.user.num_ctx?",
        ),
        (
            "{user: {num_ctx: {maximum: 1}}}",
            ".user.num_ctx.maximum (line 1): unknown setting; did you mean "
            "request_shapes.user.num_ctx.max?",
        ),
        ("{user: {keep_alive: {max: 5x}}}", f".user.keep_alive.max (line 1): {_DURATION}"),
        ("{user: {keep_alive: {max: 9000h}}}", f".user.keep_alive.max (line 1): {_DURATION}"),
        ("{user: {keep_alive: {max: true}}}", f".user.keep_alive.max (line 1): {_DURATION}"),
        (
            "{Bad: {}}",
            ".Bad (line 1): a role is named by up to 50 of a-z, 0-9, '_', '.' and '-', and begins "
            "with a letter: 'Bad'; or `*`, for all roles",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, wrong: str) -> None:
    assert told(tmp_path, text) == [wrong]
