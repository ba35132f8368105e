"""`parallama config`."""

import typer

from parallama.cli.desk import load_config
from parallama.cli.options import ConfigPath
from parallama.cli.show import note

app = typer.Typer(name="config", help="The configuration file.", no_args_is_help=True)


@app.command()
def check(config: ConfigPath = None) -> None:
    """Report every mistake in the configuration, and every setting without effect."""
    from parallama.config import warnings

    loaded = load_config(config)
    for warning in warnings(loaded):
        note(f"warning: {warning}")
    print(f"{loaded.source}: no mistakes")
