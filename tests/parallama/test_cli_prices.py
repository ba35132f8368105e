"""`parallama prices`, and what is shown of cost."""

from decimal import Decimal

import pytest

from tests.parallama.commands import Parallama
from tests.parallama.db_on_disk import a_record

PRICE = ("--prompt", "0.15", "--completion", "0.60")


def test_prices_are_set_listed_and_unset(cli: Parallama) -> None:
    made = cli.json("prices", "set", "llama3", *PRICE, "--cached", "0.075")
    assert made == {
        "model": "llama3", "prompt_per_million": "0.15", "completion_per_million": "0.6",
        "cached_per_million": "0.075", "compute_per_second": None, "updated_at": made["updated_at"],
    }  # fmt: skip
    cli.json(
        "prices", "set", "*", "--prompt", "0", "--completion", "0", "--compute-second", ".0001"
    )
    every, llama = cli.json("prices", "list")
    assert llama == made
    assert (every["model"], every["prompt_per_million"], every["compute_per_second"]) == (
        "*", "0", "0.0001",
    )  # fmt: skip
    header, first, _ = cli.table("prices", "list").splitlines()
    assert header.split("  ")[0] == "MODEL"
    assert first.split()[:5] == ["*", "0", "0", "-", "0.0001"]
    assert [row["prompt_per_million"] for row in cli.csv("prices", "list")] == ["0", "0.15"]
    assert cli.json("prices", "unset", "llama3:latest") == {"removed": 1}
    assert [row["model"] for row in cli.json("prices", "list")] == ["*"]


def test_setting_a_price_again_replaces_all_of_it(cli: Parallama) -> None:
    cli.json("prices", "set", "llama3", *PRICE, "--cached", "0.075")
    again = cli.json("prices", "set", "llama3", "--prompt", "1", "--completion", "2")
    assert cli.json("prices", "list") == [again]
    assert again["cached_per_million"] is None


@pytest.mark.parametrize(
    ("code", "words", "complaint"),
    [
        (2, ("set", "llama3"), "Missing option '--prompt'"),
        (2, ("set", "llama3", "--prompt", "1"), "Missing option '--completion'"),
        (2, ("set", "llama3", "--prompt", "-1", "--completion", "1"), "not an amount: '-1'"),
        (2, ("set", "llama3", "--prompt", "NaN", "--completion", "1"), "not an amount: 'NaN'"),
        (2, ("set", "llama3", "--prompt", "1,5", "--completion", "1"), "such as 12.50"),
        (2, ("set", "llama3", "--prompt", "0.0000001", "--completion", "1"), "at most 6 decimals"),
        (2, ("set", "llama3", "--prompt", "1000001", "--completion", "1"), "from 0 to 1000000"),
        (2, ("set", "a*b", *PRICE), "only at the end"),
        (3, ("unset", "llama3"), "there is no price of 'llama3': `parallama prices list`"),
    ],
)
def test_what_is_no_price_is_refused(
    cli: Parallama, code: int, words: tuple[str, ...], complaint: str
) -> None:
    assert complaint in cli.refused(code, "prices", *words)
    assert cli.json("prices", "list") == []


def test_the_summary_adds_costs_up_and_says_what_it_leaves_out(cli: Parallama) -> None:
    assert cli.json("usage", "summary") == []
    cli.add(
        a_record("r1", cost=Decimal("0.1")),
        a_record("r2", cost=Decimal("0.200000000001")),
        a_record("r3"),
        a_record("r4", tokens_used=0),
        a_record("r5", model_name="gemma"),
    )
    (anna,) = cli.json("usage", "summary")
    assert (anna["cost"], anna["without_cost"]) == ("0.300000000001", 2)
    gemma, llama = cli.json("usage", "summary", "--by", "model")
    assert (gemma["cost"], gemma["without_cost"]) == (None, 1)
    assert (llama["cost"], llama["without_cost"]) == ("0.300000000001", 1)
    header, *rows = cli.table("usage", "summary", "--by", "model").splitlines()
    assert header.endswith("COST  WITHOUT COST")
    assert [row.split()[-2:] for row in rows] == [["-", "1"], ["0.300000000001", "1"]]


def test_each_row_shows_its_cost_exactly(cli: Parallama) -> None:
    cli.add(a_record("r1", cost=Decimal("0.000000000001")), a_record("r2", cost=Decimal(5)))
    cli.add(a_record("r3"))
    costs = {row["request_id"]: row["cost"] for row in cli.json("usage", "list")}
    assert costs == {"r1": "0.000000000001", "r2": "5", "r3": None}
    assert {row["request_id"]: row["cost"] for row in cli.json("usage", "export")} == costs
    assert {row["request_id"]: row["cost"] for row in cli.csv("usage", "export")} == costs | {
        "r3": ""
    }
    header, *rows = cli.table("usage", "list").splitlines()
    assert header.endswith("  COST")
    assert {row.split()[-1] for row in rows} == {"0.000000000001", "5", "-"}
