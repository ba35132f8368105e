"""
A client of Redis: connections that log in, and one command at a time.

redis-py does all that and more, and takes 7 MB of each process and a fifth of its start-up
(docs/decisions/0025). What has to be quick goes through a Pipeline.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import hiredis

if TYPE_CHECKING:
    import ssl

Address = tuple[str, int]

# Its stub knows tuples of one only.
pack: Callable[[tuple[str | bytes | int, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]

_CHUNK = 1 << 16
_LOGIN_REFUSED = ("WRONGPASS", "NOAUTH", "ERR AUTH", "ERR invalid password", "ERR Client sent AUTH")


class RedisError(Exception):
    """Redis did not do it."""


class Unreachable(RedisError):
    """No connection, or none any more: whether it was done is not known."""


class Late(RedisError):
    """No answer in time."""


class Refused(RedisError):
    """It answered that it will not."""


class LoginRefused(Refused):
    """It wants another user or password."""


class Finder(Protocol):
    """Knows where to connect, however often that changes."""

    async def find(self) -> Address: ...

    async def astray(self, at: Address) -> bool:
        """Whether who is connected to `at` should go elsewhere. Raises where nobody can tell."""
        ...

    async def check(self, connection: "Connection") -> None:
        """Raise RedisError where a connection that was made leads to the wrong server."""
        ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """`full`, `ca` or `none`: see redis.tls_verify. The files are paths."""

    verify: str
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def context(self) -> "ssl.SSLContext":
        import ssl

        made = ssl.create_default_context()
        made.check_hostname = self.verify == "full"
        made.verify_mode = ssl.CERT_NONE if self.verify == "none" else ssl.CERT_REQUIRED
        if self.cert_file is not None:
            made.load_cert_chain(self.cert_file, self.key_file)
        if self.ca_file is not None:
            made.load_verify_locations(self.ca_file)
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What holds for every connection. `timeout` bounds each step of it, in seconds."""

    timeout: float
    username: str | None = None
    password: str | None = None
    db: int = 0
    tls: Tls | None = None


Where = Callable[[], Awaitable[Address | str]]
"""Host and port, or the path of a unix socket."""


class Connection:
    """One connection, made by `connect`. It is for one task at a time."""

    def __init__(self, where: Where, options: Options, finder: Finder | None = None) -> None:
        self.finder = finder
        self.at: Address | str = ""
        self._where = where
        self._options = options
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._replies = hiredis.Reader()

    @property
    def transport(self) -> Any:
        """For who takes over all that comes and goes."""
        assert self._streams is not None  # noqa: S101  connect() comes first
        return self._streams[1].transport

    async def connect(self) -> None:
        """Anew, where there was a connection. Raises RedisError."""
        self.close()
        told = self._options
        self.at = await self._where()
        try:
            async with asyncio.timeout(told.timeout):
                self._streams = await _open(self.at, told.tls)
        except TimeoutError:
            raise Late(f"{_named(self.at)} does not answer") from None
        except OSError as error:  # an SSLError is one, too
            why = str(error) if told.tls else error.strerror or type(error).__name__
            raise Unreachable(f"cannot connect to {_named(self.at)}: {why}") from None
        try:
            await self._introduce()
        except BaseException:
            self.close()
            raise

    async def run(self, *words: str | bytes | int) -> Any:
        """What a command returns. After any other error than Refused the connection is closed."""
        self.send(*words)
        try:
            reply = await self.read(self._options.timeout)
        except BaseException:
            self.close()  # the answer may come yet, and would be taken for that of the next command
            raise
        if isinstance(reply, hiredis.ReplyError):
            text = str(reply)
            raise (LoginRefused if text.startswith(_LOGIN_REFUSED) else Refused)(text)
        return reply

    def send(self, *words: str | bytes | int) -> None:
        """A command whose answer `read` will return. Raises Unreachable."""
        if self._streams is None:
            raise Unreachable("the connection is closed")
        self._streams[1].write(pack(words))

    async def read(self, seconds: float) -> Any:
        """The next answer, errors as values. Raises Unreachable, and Late after so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                while (reply := self._replies.gets()) is False:
                    self._replies.feed(await self._more())
        except TimeoutError:
            raise Late(f"{_named(self.at)} does not answer") from None
        return reply

    def close(self) -> None:
        streams, self._streams = self._streams, None
        self._replies = hiredis.Reader()
        if streams is not None:
            with suppress(RuntimeError):  # its event loop ended
                streams[1].transport.abort()

    async def _introduce(self) -> None:
        told = self._options
        if told.password is not None:
            await self.run("AUTH", told.username or "default", told.password)
        if told.db:
            await self.run("SELECT", told.db)
        if self.finder is not None:
            await self.finder.check(self)

    async def _more(self) -> bytes:
        if self._streams is None:
            raise Unreachable("the connection is closed")
        try:
            data = await self._streams[0].read(_CHUNK)
        except OSError as error:
            self.close()
            raise Unreachable(f"{_named(self.at)}: {error.strerror or error}") from None
        if not data:
            self.close()
            raise Unreachable(f"{_named(self.at)} closed the connection")
        return data


class Redis:
    """A server, or the one that `finder` finds. Connects when used."""

    def __init__(self, where: Where, options: Options, finder: Finder | None = None) -> None:
        self.finder = finder
        self._where = where
        self._options = options
        self._own = self.new_connection()
        self._free = asyncio.Lock()
        self._connected = False

    def new_connection(self) -> Connection:
        """A connection of its own, not yet made."""
        return Connection(self._where, self._options, self.finder)

    async def run(self, *words: str | bytes | int) -> Any:
        """
        What one command returns, on a connection that is kept. Raises RedisError.

        Nothing is tried twice: whoever calls knows whether that is safe.
        """
        async with self._free:
            if not self._connected:
                await self._own.connect()
            self._connected = False
            try:
                answer = await self._own.run(*words)
            except Refused:
                self._connected = True
                raise
            self._connected = True
            return answer

    async def ping(self) -> bool:
        return bool(await self.run("PING") == b"PONG")

    async def publish(self, channel: str, message: str | bytes) -> int:
        return int(await self.run("PUBLISH", channel, message))

    async def aclose(self) -> None:
        self._own.close()
        self._connected = False
        if self.finder is not None:
            await self.finder.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


def at(address: Address | str, options: Options) -> Redis:
    """The server that is always there."""

    async def where() -> Address | str:
        return address

    return Redis(where, options)


def found(finder: Finder, options: Options) -> Redis:
    """The server that `finder` finds, each time a connection is made."""
    return Redis(finder.find, options, finder)


def pairs(reply: Any) -> Mapping[bytes, Any]:
    """A reply of names and values, which an old protocol sends as one list."""
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


async def _open(
    at: Address | str, tls: Tls | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if isinstance(at, str):
        return await asyncio.open_unix_connection(at)
    return await asyncio.open_connection(*at, ssl=tls.context() if tls else None)


def _named(at: Address | str) -> str:
    if isinstance(at, str):
        return at
    host, port = at
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
