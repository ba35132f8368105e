"""Passwords: which are good enough, how they are kept, and a check whose time tells nothing."""

import asyncio
import re
import unicodedata
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

import bcrypt

from parallama.errors import Unavailable, UsageError

T = TypeVar("T")

LONGEST_BYTES = 72
"""All that bcrypt looks at. A longer one is refused: nobody shall believe that the rest counts."""

_FEWEST_LETTERS = 5
_FEWEST_OF_ITS_OWN = 6

# What people put first into a field that wants a long password.
_USUAL = re.compile(
    "parallama|ollama|password|passwort|passw0rd|administrator|admin|welcome|letmein|changeme|"
    "iloveyou|secret|login|qwertyuiop|qwerty|qwertz|asdfghjkl|asdfgh|1q2w3e4r5t|abcdefghijkl|"
    "abcdef|1234567890|0123456789|123456789|12345678|1234567|123456|12345|0987654321|987654321"
)

_HASH = re.compile(r"\$2[aby]\$[0-3][0-9]\$[./A-Za-z0-9]{53}")

# How many may wait for each thread: at a cost of 12, some seconds.
_WAITING = 16


def check(password: str, *, username: str, min_length: int) -> None:
    """Raises UsageError, which says what is wrong and never the password."""
    text = _normal(password)
    if len(text) < min_length:
        raise UsageError(f"a password has {min_length} characters or more: this has {len(text)}")
    if not text.isprintable():
        raise UsageError("a password has visible characters and spaces only: this has others")
    if len(text.encode()) > LONGEST_BYTES:
        raise UsageError(
            f"a password has {LONGEST_BYTES} bytes or less, which are as many plain letters: "
            f"this has {len(text.encode())}"
        )
    if len(set(text.casefold())) < _FEWEST_LETTERS:
        raise UsageError(f"a password has {_FEWEST_LETTERS} different characters or more")
    own = _USUAL.sub("", text.casefold().replace(_normal(username).casefold(), ""))
    if len(own) < _FEWEST_OF_ITS_OWN:
        raise UsageError(
            "this password would be guessed: besides the user's name and words that everybody "
            f"uses, it needs {_FEWEST_OF_ITS_OWN} characters of its own"
        )


def hash(password: str, *, rounds: int) -> str:
    """As it is stored. Takes a quarter of a second at 12 rounds."""
    return bcrypt.hashpw(_bytes(password), bcrypt.gensalt(rounds)).decode()


def verify(password: str, stored: str | None, *, rounds: int) -> bool:
    """
    Whether `password` is the one behind `stored`. It takes as long where there is none, and where
    it was stored when `rounds` were fewer.
    """
    given = _bytes(password)
    fits = len(given) <= LONGEST_BYTES
    given = given if fits else b""
    known = stored is not None and _HASH.fullmatch(stored) is not None
    against = stored if known and stored is not None else _nobodys(rounds)
    good = _matches(given, against)
    # 2^n and then once more 2^n, 2^(n+1), ... up to `rounds`: 2^rounds together.
    for cost in range(cost_of(against), rounds):
        _matches(given, _nobodys(cost))
    return good and known and fits


def cost_of(stored: str) -> int:
    """The rounds with which it was stored."""
    return int(stored.split("$")[2])


class Checker:
    """Runs what takes bcrypt's time beside the event loop: a few at a time, and a few wait."""

    def __init__(self, *, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="passwords")
        self._free = threads * (1 + _WAITING)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Raises Unavailable at once where too many are there: nobody waits for ever."""
        if self._free == 0:
            raise Unavailable("too many log-ins at once: try again in a few seconds")
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1

    async def run(self, work: Callable[[], T]) -> T:
        """In a thread of its own. Only with a `place`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _matches(given: bytes, stored: str) -> bool:
    return bcrypt.checkpw(given, stored.encode())


def _nobodys(rounds: int) -> str:
    """What looks like a hash, and is that of no password that anybody could find."""
    return f"$2b${rounds:02}${'.' * 53}"


def _bytes(password: str) -> bytes:
    # What is no text (half of a pair of surrogates) is no password, and cannot become one here.
    return _normal(password).encode(errors="surrogatepass")


def _normal(text: str) -> str:
    """One spelling: keyboards differ in how they write an accent."""
    return unicodedata.normalize("NFC", text)
