"""`parallama db`."""

import asyncio
from typing import TYPE_CHECKING

import typer

from parallama.cli.desk import load_config
from parallama.cli.options import ConfigPath, Output, OutputFormat
from parallama.cli.show import show

if TYPE_CHECKING:
    from parallama.config import Config

app = typer.Typer(name="db", help="The database's schema.", no_args_is_help=True)


@app.command()
def upgrade(config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """Create the database, or bring it to this version's schema. Running it again does no harm."""
    from parallama.db.manage import schema

    before, after = asyncio.run(schema.upgrade(load_config(config).database))
    show({"before": before, "revision": after}, output)


@app.command()
def current(config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """Show which schema the database has, and which one this version works with."""
    from parallama.db.revisions import HEAD

    revision = asyncio.run(_current(load_config(config)))
    show(
        {"revision": revision, "wanted": HEAD, "up_to_date": revision == HEAD},
        output,
    )


async def _current(config: "Config") -> str | None:
    from parallama.db.manage.engine import open_database
    from parallama.db.manage.schema import current_revision

    engine = open_database(config.database)
    try:
        return await current_revision(engine)
    finally:
        await engine.dispose()
