"""`parallama prices`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama import money
from parallama.cli.desk import Desk, run
from parallama.cli.options import ConfigPath, Output, OutputFormat
from parallama.cli.show import show, show_rows

if TYPE_CHECKING:
    from parallama.db.manage.prices import Listed

app = typer.Typer(name="prices", help="What models cost.", no_args_is_help=True)

_COLUMNS = (
    "model", "prompt_per_million", "completion_per_million", "cached_per_million",
    "compute_per_second", "updated_at",
)  # fmt: skip

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A name, or the beginning of one with *.")
]


@app.command("set")
def set_(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="AMOUNT", help="A million tokens of prompt.")],
    completion: Annotated[str, typer.Option(metavar="AMOUNT", help="A million tokens of answer.")],
    cached: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="A million tokens of prompt that the upstream remembered; else as --prompt.",
        ),
    ] = None,
    compute_second: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="A second of computing, besides tokens.")
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Set what MODEL costs, in the one currency that all prices are in.

    An exact name counts before a prefix, a longer prefix before a shorter one. It counts for
    requests that end from now on: rows that are written keep their cost. Amounts have up to 6
    decimals. A model without a price has no cost, which is not the same as 0.
    """
    of_prompt, of_completion = money.parse(prompt), money.parse(completion)
    of_cached = None if cached is None else money.parse(cached)
    of_second = None if compute_second is None else money.parse(compute_second)

    async def work(desk: Desk) -> "Listed":
        from parallama.db.manage import prices
        from parallama.prices import Price

        price = Price(model, of_prompt, of_completion, of_cached, of_second)
        listed = await prices.set_price(desk, price)
        return listed

    show(_row(run(config, work)), output)


@app.command("list")
def list_(config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """List the prices, for a million tokens and for a second of computing."""

    async def work(desk: Desk) -> list["Listed"]:
        from parallama.db.manage import prices

        return await prices.list_prices(desk.engine)

    show_rows(map(_row, run(config, work)), output, _COLUMNS)


@app.command()
def unset(model: Model, config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """Remove a price. Requests that end from now on have the next that matches, or no cost."""

    async def work(desk: Desk) -> None:
        from parallama.db.manage import prices

        await prices.unset_price(desk, model)

    run(config, work)
    show({"removed": 1}, output)


def _row(listed: "Listed") -> dict[str, Any]:
    price = listed.price
    return {
        "model": price.model,
        "prompt_per_million": price.prompt,
        "completion_per_million": price.completion,
        "cached_per_million": price.cached,
        "compute_per_second": price.compute_second,
        "updated_at": listed.updated_at,
    }
