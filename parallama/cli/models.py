"""`parallama models`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama.cli.desk import Desk, run
from parallama.cli.options import ConfigPath, Output, OutputFormat
from parallama.cli.show import show, show_rows

if TYPE_CHECKING:
    from parallama.db.manage.mappings import Mapping

app = typer.Typer(name="models", help="Names of models that clients may use.", no_args_is_help=True)

_COLUMNS = ("gateway", "name", "target", "source", "updated_at")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The name that clients use.")]
Gateway = Annotated[str, typer.Option(help="Whose calls: `ollama` or `openai`.")]


@app.command("map")
def map_(
    name: Name,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The model that it means.")],
    gateway: Gateway,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Let NAME mean TARGET in calls of a gateway, in place of what it meant.

    Requests follow it within a second, also where the configuration says otherwise. Limits, prices
    and usage go by TARGET. A key that is bound to some models may use NAME if it may use either.
    """

    async def work(desk: Desk) -> "Mapping":
        from parallama.db.manage import mappings

        told = desk.config.api_gateways
        return await mappings.set_mapping(
            desk,
            gateway,
            name,
            target,
            configured=told.model_mappings.get(gateway, {}),
            default=told.default_models.get(gateway),
        )

    show(_row(run(config, work)), output)


@app.command()
def unmap(
    name: Name,
    gateway: Gateway,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Remove a mapping that `models map` made. NAME means itself then, or what the configuration says
    that it means; what stands there is removed there.
    """

    async def work(desk: Desk) -> None:
        from parallama.db.manage import mappings

        found = await mappings.find_mapping(desk.engine, gateway, name)
        await mappings.unset_mapping(desk, found.id)

    run(config, work)
    show({"removed": 1}, output)


@app.command("list")
def list_(
    gateway: Annotated[str | None, typer.Option(help="Only of this one.")] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    List what names mean, by gateway, and whether the configuration or the database says so. The
    model of calls that name none stands behind an empty name.
    """

    async def work(desk: Desk) -> list[dict[str, Any]]:
        from parallama.db.manage import mappings
        from parallama.mappings import plain

        if gateway is not None:
            mappings.check_gateway(gateway)
        told = desk.config.api_gateways
        stored = await mappings.list_all(desk.engine)
        counting = {(each.gateway, plain(each.external_model)) for each in stored}
        rows = [_row(each) for each in stored]
        for at, table in told.model_mappings.items():
            rows += [
                _configured(at, name, target)
                for name, target in table.items()
                if (at, plain(name)) not in counting
            ]
        rows += [_configured(at, "", target) for at, target in told.default_models.items()]
        rows.sort(key=lambda row: (row["gateway"], row["name"]))
        return [row for row in rows if gateway in (None, row["gateway"])]

    show_rows(run(config, work), output, _COLUMNS)


def _row(mapping: "Mapping") -> dict[str, Any]:
    return {
        "gateway": mapping.gateway,
        "name": mapping.external_model,
        "target": mapping.internal_model,
        "source": "database",
        "updated_at": mapping.updated_at,
    }


def _configured(gateway: str, name: str, target: str) -> dict[str, Any]:
    return {
        "gateway": gateway,
        "name": name,
        "target": target,
        "source": "configuration",
        "updated_at": None,
    }
