"""
Makes calls up from docs/openapi.json and holds the running service to what it says.

`python -m tests.admin.fuzz` asks for longer than the suite does, and other things each time.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from parallama.roles import Role
from tests.e2e.gateway import Gateway, running
from tests.standin import StandIn

ROOT = Path(__file__).parents[2]
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")

# Not among them: what the description cannot say (that a name is taken, that a time is over) is
# refused though it was well-formed; and methods that Envoy does not know are no HTTP to it.
_CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance,negative_data_rejection,"
    "missing_required_header,allow_header_conformance,use_after_free,ignored_auth"
)
_PHASES = "examples,coverage,fuzzing,stateful"

# Envoy refuses these before it knows the path, and so whose words to use.
_HOOKS = """
import schemathesis

@schemathesis.hook
def filter_headers(context, headers):
    return not any("_" in name for name in headers or ())
"""


def fuzz(
    gateway: Gateway,
    *,
    examples: int,
    phases: str = _PHASES,
    seed: int | None = None,
    tags: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """By an admin, through Envoy: all endpoints, or those with one of the tags."""
    gateway.child("admin")  # it may come a little later than Envoy
    admin = gateway.someone(role=Role.ADMIN)
    gateway.someone(role=Role.ADMIN)  # who is still there when the first one took himself away
    config = gateway.folder / "schemathesis.toml"
    hooks = gateway.folder / "hooks.py"
    hooks.write_text(_HOOKS)
    config.write_text(f'hooks = "{hooks}"\n[headers]\nAuthorization = "Bearer {admin.token}"\n')
    return subprocess.run(
        [
            *(SCHEMATHESIS, "--config-file", config, "run", ROOT / "docs" / "openapi.json"),
            *("--url", gateway.url, "--checks", _CHECKS, "--phases", phases),
            *("--max-examples", str(examples), "--continue-on-failure", "--warnings", "off"),
            *("--request-timeout", "30", "--no-color"),
            *(("--seed", str(seed)) if seed is not None else ()),
            *(word for tag in tags for word in ("--include-tag", tag)),
        ],
        cwd=gateway.folder,
        capture_output=True,
        text=True,
        check=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="Most calls of each endpoint.")
    parser.add_argument("--phases", default=_PHASES)
    parser.add_argument("--seed", type=int)
    told = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        StandIn(models=("smollm2",)) as upstream,
        running(Path(folder) / "gw", upstream, complaints=True) as gateway,
    ):
        done = fuzz(gateway, examples=told.examples, phases=told.phases, seed=told.seed)
    print(done.stdout, done.stderr)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
