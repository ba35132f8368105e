"""`parallama signing-keys`."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallama.cli.desk import Desk, load_config, run
from parallama.cli.options import ConfigPath, Output, OutputFormat
from parallama.cli.show import note, show, show_rows
from parallama.errors import UsageError

if TYPE_CHECKING:
    from parallama.config import Config
    from parallama.signing import Named

app = typer.Typer(
    name="signing-keys", help="The keys that sign access tokens.", no_args_is_help=True
)

_COLUMNS = ("kid", "algorithm", "state", "made_at", "signs_from", "file")


@app.command("list")
def list_(config: ConfigPath = None, output: OutputFormat = Output.TABLE) -> None:
    """
    List the keys by age, with what each does now.

    next: published, and signs from then on. signing. accepted: its tokens still live. over: removed
    by the next rotation. unused: for another algorithm.
    """
    show_rows(_rows(_asymmetric(config), time.time()), output, _COLUMNS)


@app.command()
def rotate(
    at_once: Annotated[
        bool,
        typer.Option(
            "--at-once",
            help="One was stolen: remove all others. Their tokens are refused within seconds.",
        ),
    ] = False,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Make a new key, and remove those whose time is over.

    It is published at once, and signs after authentication.signing_key_publish_minutes; tokens of
    the one before stay good. On several machines copy the folder to all of them.
    """
    loaded = _asymmetric(config)

    async def work(desk: Desk) -> dict[str, Any]:
        from parallama import signing

        new, removed = signing.rotate(
            loaded.signing_dir,
            algorithm=loaded.authentication.jwt_algorithm,
            now=desk.now.timestamp(),
            timing=signing.timing(loaded),
            at_once=at_once,
        )
        kids = [named.kid for named in removed]
        async with desk.writing() as changes:
            after = {"removed": kids, "at_once": at_once}
            await changes.record("signing-keys.rotate", new.kid, after=after)
            if at_once:
                changes.changed("everything")
        return {"kid": new.kid, "file": str(loaded.signing_dir / new.file), "removed": kids}

    show(run(config, work), output)
    if not at_once and output is Output.TABLE:
        minutes = loaded.authentication.signing_key_publish_minutes
        note(f"It signs in {minutes} minutes, or at once where it is the only one.")


def _asymmetric(path: Path | None) -> "Config":
    loaded = load_config(path)
    if loaded.authentication.jwt_algorithm == "HS256":
        raise UsageError(
            "authentication.jwt_algorithm is HS256, which has one secret and no keys: write "
            "another one into jwt_secret_key_file, and restart"
        )
    return loaded


def _rows(config: "Config", now: float) -> list[dict[str, Any]]:
    from parallama import signing

    found = signing.read(config.signing_dir)
    algorithm = config.authentication.jwt_algorithm
    fitting = [named for named, key in found.items() if signing.algorithm_of(key) == algorithm]
    told = signing.plan(fitting, now=now, timing=signing.timing(config))

    def state(named: "Named") -> str:
        if named not in fitting:
            return "unused"
        if named == told.signer:
            return "signing"
        if named in told.over:
            return "over"
        newer = told.signer is not None and (named.made, named.kid) > (
            told.signer.made,
            told.signer.kid,
        )
        return "next" if newer else "accepted"

    return [
        {
            "kid": named.kid,
            "algorithm": signing.algorithm_of(found[named]),
            "state": state(named),
            "made_at": _at(named.made),
            "signs_from": _at(named.made + signing.timing(config).publish_before),
            "file": named.file,
        }
        for named in sorted(found, key=lambda named: (named.made, named.kid))
    ]


def _at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
