import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.estimate import Estimate
from ratelimit.rules import MOST_TOKENS, Reserve

ASK = Reserve(
    user="u",
    key="k",
    gateway="openai",
    dialect="openai",
    model="smollm2",
    endpoint="/v1/chat/completions",
    max_tokens=100,
    body_bytes=400,
    request_id="r",
)


def fresh() -> Estimate:
    return Estimate(bytes_per_token=4, default_max_tokens=512)


def prompt(estimate: Estimate, size: int, model: str = "smollm2") -> int:
    return estimate.need(ASK._replace(model=model, body_bytes=size, max_tokens=1)).prompt


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        pytest.param({}, 200, id="prompt by its size, and the maximum named"),
        pytest.param({"max_tokens": None}, 612, id="no maximum named"),
        pytest.param({"body_bytes": 401}, 201, id="a part of a token is one"),
        pytest.param({"endpoint": "/v1/embeddings"}, 100, id="embeddings write nothing"),
        pytest.param({"endpoint": "/api/embed", "body_bytes": 0}, 1, id="never nothing"),
        pytest.param({"max_tokens": 10**18}, MOST_TOKENS, id="no more than can be counted"),
    ],
)
def test_estimate(change, tokens):
    assert fresh().need(ASK._replace(**change)).tokens == tokens


def test_one_answer_teaches_calls_of_its_size() -> None:
    estimate = fresh()
    estimate.learn("smollm2", 90, 31)
    assert prompt(estimate, 90) == 31
    assert prompt(estimate, 90 + 4000) == 31 + 1000  # beyond it, the configured ratio
    assert prompt(estimate, 90, "another") == 23


def test_many_sizes_teach_the_real_line() -> None:
    estimate = fresh()
    for size in (100, 900, 2500, 4000, 400, 3100, 1800) * 5:
        estimate.learn("smollm2", size, 20 + size // 3)
    for size in (150, 1000, 3500, 8000):
        assert prompt(estimate, size) == pytest.approx(20 + size / 3, rel=0.03, abs=5)


def test_it_follows_a_change() -> None:
    estimate = fresh()
    for _ in range(50):
        estimate.learn("smollm2", 400, 100)
    for _ in range(100):
        estimate.learn("smollm2", 400, 200)
    assert prompt(estimate, 400) in (199, 200)


def test_images_and_lies_teach_nothing() -> None:
    estimate = fresh()
    estimate.learn("smollm2", 10_000_000, 800)
    estimate.learn("smollm2", 90, 5000)
    estimate.learn("smollm2", 0, 0)
    assert prompt(estimate, 90) == 23


def test_names_without_end_do_not_grow_it() -> None:
    estimate = fresh()
    for i in range(3000):
        estimate.learn(f"m{i}", 90, 31)
    assert prompt(estimate, 90, "m2999") == 31
    assert prompt(estimate, 90, "m0") == 23


@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20))), st.integers(0, 1 << 30)
)
def test_whatever_it_saw_its_guess_is_sane(lessons: list[tuple[int, int]], size: int) -> None:
    estimate = fresh()
    for body_bytes, tokens in lessons:
        estimate.learn("smollm2", body_bytes, tokens)
    ask = ASK._replace(body_bytes=size)
    assert 1 <= estimate.need(ask).tokens <= MOST_TOKENS
    assert estimate.most_prompt(ask) >= 1


OPEN = ASK._replace(max_tokens=None)


def test_the_usual_length_is_learned_for_calls_that_name_no_maximum() -> None:
    estimate = fresh()
    assert estimate.need(OPEN).answer == 512
    for _ in range(3):
        estimate.learn_answer("smollm2", 137)
    assert estimate.need(OPEN).answer == 137
    assert estimate.need(ASK).answer == 100
    assert estimate.need(OPEN._replace(model="another")).answer == 512
    assert estimate.need(OPEN._replace(endpoint="/v1/embeddings")).answer == 0


def test_nine_of_ten_answers_fit_into_what_is_usual() -> None:
    estimate, draw = fresh(), random.Random(7)  # noqa: S311
    lengths = [round(draw.gauss(200, 30)) for _ in range(400)]
    for length in lengths:
        estimate.learn_answer("smollm2", length)
    usual = estimate.need(OPEN).answer
    assert 0.8 < sum(length <= usual for length in lengths) / len(lengths) < 0.99


def test_what_no_prompt_passes() -> None:
    estimate, draw = fresh(), random.Random(7)  # noqa: S311
    # Of a model that nobody knows: a token takes a byte at least.
    assert estimate.most_prompt(ASK) >= ASK.body_bytes
    sizes = [draw.randrange(100, 4000) for _ in range(200)]
    seen = {size: size // 4 + draw.randrange(20) for size in sizes}
    for size, tokens in seen.items():
        estimate.learn("smollm2", size, tokens)
    for size, tokens in list(seen.items())[-20:]:
        assert estimate.most_prompt(ASK._replace(body_bytes=size)) == tokens
    for size in range(200, 4000, 97):
        if size not in seen:
            assert estimate.most_prompt(ASK._replace(body_bytes=size)) >= size // 4 + 15


def test_how_long_a_call_takes_is_learned() -> None:
    estimate = fresh()
    assert estimate.need(ASK).compute == 0
    estimate.learn_compute("smollm2", 1500.0)
    assert estimate.need(ASK).compute == 1500
