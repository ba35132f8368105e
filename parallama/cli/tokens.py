"""`parallama tokens`."""

from typing import Annotated

import typer

from parallama.cli.desk import Desk, run
from parallama.cli.options import ConfigPath, Output, OutputFormat
from parallama.cli.show import show
from parallama.errors import UsageError

app = typer.Typer(name="tokens", help="Access tokens.", no_args_is_help=True)


@app.command()
def revoke(
    jti: Annotated[str, typer.Argument(metavar="JTI", help="The token's id, its claim jti.")],
    issuer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Who issued it, its claim iss; else we did."),
    ] = None,
    config: ConfigPath = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """
    Refuse one access token within a second, though it has not expired.

    Whoever has its refresh token gets another: `users log-out` ends all sessions of a user.
    """
    if jti.count(".") == 2 or jti.startswith(("plr_", "plm_")):
        raise UsageError(
            "that is a whole token, and other users of this machine can see command lines: name it "
            "by its id, the claim jti"
        )

    async def work(desk: Desk) -> None:
        from parallama.db.manage import sessions

        await sessions.revoke_token(desk, jti, desk.config.authentication, issuer=issuer)

    run(config, work)
    show({"jti": jti, "issuer": issuer, "revoked": True}, output)
