"""Where the keys of an outside issuer come from: a URL or a file."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from authz import jws
from authz.jws import Key
from authz.keysets import Load

_LARGEST = 1 << 20
_SECONDS = 5.0
_CHUNK = 1 << 16


def from_url(url: str) -> Load:
    """Of https, or http on this machine. Where it sends us elsewhere we do not go."""
    return _loader(lambda: _fetch(url))


def from_file(path: Path) -> Load:
    def read() -> bytes:
        with path.open("rb") as file:
            return file.read(_LARGEST + 1)

    return _loader(read)


def _loader(read: Callable[[], bytes]) -> Load:
    def keys() -> dict[str, Key]:
        raw = read()
        if len(raw) > _LARGEST:
            raise ValueError(f"a set of keys of more than {_LARGEST} bytes")
        return jws.parse_jwks(raw)

    async def load() -> dict[str, Key]:
        return await asyncio.to_thread(keys)

    return load


def _fetch(url: str) -> bytes:
    """Raises OSError. Each wait is bounded, and so is their sum."""
    # Some MB, for those who have such an issuer.
    from http.client import HTTPException
    from urllib import request
    from urllib.error import HTTPError

    class Nowhere(request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    asked = request.Request(url, headers={"accept": "application/json"})  # noqa: S310 - checked
    deadline = time.monotonic() + _SECONDS
    found = bytearray()
    try:
        with request.build_opener(Nowhere).open(asked, timeout=_SECONDS) as answer:
            while chunk := answer.read1(_CHUNK):
                found += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {_SECONDS:g} s")
                if len(found) > _LARGEST:
                    break
    except HTTPError as error:
        error.close()
        raise OSError(f"it answers with status {error.code}") from error
    except HTTPException as error:
        raise OSError(f"no HTTP answer: {type(error).__name__}") from error
    return bytes(found)
