"""What containers need before they start: passwords, a signing key, folders that they share."""

import argparse
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

from parallama import signing
from parallama.errors import ParallamaError

# The servers that read them run as users of their own, in the group of ours.
_SECRET_MODE = 0o440


def make(passwords: Path, state: Path, signing_keys: Path) -> None:
    """
    Each file appears with what belongs into it, once and for all.

    `valkey.conf` says the password of `redis_password` in Valkey's own words. Another algorithm
    than RS256 for tokens needs a key of its own: `parallama signing-keys rotate`.
    """
    for name in ("db_password", "redis_password"):
        _write(passwords / name, lambda: secrets.token_urlsafe(32))
    password = (passwords / "redis_password").read_text(encoding="ascii").strip()
    _write(passwords / "valkey.conf", lambda: f"requirepass {password}")
    for folder in (state, state / "run", state / "trail"):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    signing.ensure(signing_keys, algorithm="RS256", now=time.time())


def _write(path: Path, text: Callable[[], str]) -> None:
    if path.exists():
        return
    fresh = path.with_name(f".{path.name}")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _SECRET_MODE), "w") as file:
        file.write(text() + "\n")
    fresh.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m parallama.setup", description=make.__doc__)
    parser.add_argument("passwords", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("signing_keys", type=Path)
    told = parser.parse_args()
    try:
        make(told.passwords, told.state, told.signing_keys)
    except ParallamaError as error:
        sys.exit(str(error))
    except OSError as error:
        at = f"{error.filename}: {error.strerror}"
        sys.exit(f"cannot write {at}: it has to belong to the user {os.geteuid()}")


if __name__ == "__main__":
    main()
