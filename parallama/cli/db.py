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
    from parallama import db

    before, after = asyncio.run(db.upgrade(load_config(config).database))
    show({"before": before, "revision": after}, output)


@app.command()
def current(config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """Show which schema the database has, and which one this version works with."""
    from parallama import db

    revision = asyncio.run(_current(load_config(config)))
    show(
        {"revision": revision, "wanted": db.HEAD, "up_to_date": revision == db.HEAD},
        output,
    )


async def _current(config: "Config") -> str | None:
    from parallama import db

    engine = db.open_database(config.database)
    try:
        return await db.current_revision(engine)
    finally:
        await engine.dispose()
