"""Keys of an issuer are fetched seldom, kept while it is away, and let go when it says so."""

import asyncio
import http.server
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from authz import jwks as source
from authz.jws import Key, parse_jwks
from authz.keysets import KeySet
from parallama.errors import ConfigError
from tests.authz.tokens import jwk, jwks


class Provider:
    """Says which keys there are, or is away; `looks` counts how often it was asked."""

    def __init__(self, *seeds: int) -> None:
        self.seeds = seeds
        self.error: Exception | None = None
        self.looks = 0
        self.asked = asyncio.Event()
        self.now = 1000.0
        self.withdrawn = 0

    async def load(self) -> Mapping[str, Key]:
        self.looks += 1
        self.asked.set()
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return parse_jwks(jwks(*(jwk(seed=seed) for seed in self.seeds)))

    def take_back(self) -> None:
        self.withdrawn += 1


@asynccontextmanager
async def running(
    provider: Provider, *, fresh: float = 300, at_once: bool = True
) -> AsyncIterator[KeySet]:
    keys = KeySet(
        provider.load,
        name="https://sso.test",
        monotonic=lambda: provider.now,
        on_withdrawn=provider.take_back,
        fresh=fresh,
        cooldown=10,
        keep=100,
        at_once=at_once,
    )
    task = asyncio.create_task(keys.run())
    try:
        yield keys
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def told(story: Callable[[Provider], Awaitable[None]], *seeds: int) -> None:
    async def inside() -> None:
        async with asyncio.timeout(20):
            await story(Provider(*seeds))

    asyncio.run(inside())


async def look(provider: Provider, keys: KeySet) -> None:
    """Make it look, and wait for the end of that."""
    provider.now += 10
    await keys.find("one that is not there")


@pytest.mark.parametrize("at_once", [True, False])
def test_whoever_comes_before_the_first_answer_waits_for_it(at_once: bool) -> None:
    async def story(provider: Provider) -> None:
        async with running(provider, at_once=at_once) as keys:
            assert keys.get("RS256-0") is None
            found = await asyncio.gather(*(keys.find("RS256-0") for _ in range(5)))
            assert None not in found
            assert keys.get("RS256-0") == found[0]
            assert provider.looks == 1

    told(story, 0)


def test_keys_that_nobody_wants_are_not_loaded() -> None:
    async def story(provider: Provider) -> None:
        async with running(provider, at_once=False) as keys:
            for _ in range(50):
                await asyncio.sleep(0)
            assert keys.get("RS256-0") is None
            assert provider.looks == 0
            found = await asyncio.gather(keys.find("unknown"), keys.find("RS256-0"))
            assert (found[0], found[1] is None, provider.looks) == (None, False, 1)

    told(story, 0)


def test_unknown_keys_make_it_look_once_in_a_while_however_many_there_are() -> None:
    async def story(provider: Provider) -> None:
        async with running(provider) as keys:
            await keys.find("RS256-0")
            for number in range(50):
                assert await keys.find(f"unknown-{number}") is None
            assert provider.looks == 1
            provider.now += 10
            await asyncio.gather(*(keys.find(f"unknown-{number}") for number in range(50)))
            assert provider.looks == 2

    told(story, 0)


def test_a_new_key_is_found_when_a_token_comes_with_it() -> None:
    async def story(provider: Provider) -> None:
        async with running(provider) as keys:
            await keys.find("RS256-0")
            provider.seeds = (0, 1)
            provider.now += 10
            assert await keys.find("RS256-1") is not None
            assert provider.withdrawn == 0

    told(story, 0)


def test_it_looks_again_when_the_keys_are_no_longer_fresh() -> None:
    async def story(provider: Provider) -> None:
        async with running(provider, fresh=0.01) as keys:
            await keys.find("RS256-0")
            provider.seeds = (1,)
            while keys.get("RS256-1") is None:
                provider.asked.clear()
                await provider.asked.wait()
            assert keys.get("RS256-0") is None
            assert provider.withdrawn == 1

    told(story, 0)


def test_another_key_with_the_same_name_takes_the_first_one_back() -> None:
    async def story(provider: Provider) -> None:
        async with running(provider) as keys:
            first = await keys.find("RS256-0")

            async def other() -> Mapping[str, Key]:
                return parse_jwks(jwks(jwk(seed=1, kid="RS256-0")))

            keys._load = other
            await look(provider, keys)
            assert keys.get("RS256-0") not in (None, first)
            assert provider.withdrawn == 1

    told(story, 0)


@pytest.mark.parametrize(
    "error", [OSError("away"), ValueError("no keys"), ConfigError("no folder")], ids=repr
)
def test_the_last_keys_are_good_for_a_while_when_the_issuer_is_away(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(provider: Provider) -> None:
        async with running(provider) as keys:
            await keys.find("RS256-0")
            provider.error = error
            for _ in range(9):
                await look(provider, keys)
                assert keys.get("RS256-0") is not None
            await look(provider, keys)
            assert keys.get("RS256-0") is None
            assert provider.withdrawn == 1
            provider.error = None
            await look(provider, keys)
            assert keys.get("RS256-0") is not None

    told(story, 0)
    said = [at.message for at in caplog.records if at.name == "authz.keysets"]
    assert said.count("keys of an issuer not found") == 1
    assert said.count("keys of an issuer too old") == 1


# Where they come from.


def test_a_file_is_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    load = source.from_file(file)
    with pytest.raises(OSError, match="jwks"):
        asyncio.run(load())  # type: ignore[arg-type]
    file.write_bytes(jwks())
    assert asyncio.run(load()).keys() == {"RS256-0"}  # type: ignore[arg-type]
    file.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(ValueError, match="more than"):
        asyncio.run(load())  # type: ignore[arg-type]


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextmanager
def served(answer: Answer) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/jwks"
        finally:
            server.shutdown()
            thread.join()


def fetched(answer: Answer) -> Mapping[str, Key]:
    with served(answer) as url:
        return asyncio.run(source.from_url(url)())  # type: ignore[arg-type]


def says(status: int, body: bytes, **headers: str) -> Answer:
    def answer(to: http.server.BaseHTTPRequestHandler) -> None:
        to.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            to.send_header(name, value)
        to.end_headers()
        to.wfile.write(body)

    return answer


def test_keys_come_from_a_url() -> None:
    assert fetched(says(200, jwks())).keys() == {"RS256-0"}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(says(404, jwks()), id="not there"),
        pytest.param(says(500, b""), id="broken"),
        pytest.param(says(302, b"", location="http://127.0.0.1:9/"), id="sends elsewhere"),
        pytest.param(says(200, b"<html>"), id="a page"),
        pytest.param(says(200, b" " * ((1 << 20) + 1)), id="too large"),
        pytest.param(lambda to: to.wfile.write(b"\0\1\2\r\n\r\n"), id="no HTTP"),
        pytest.param(lambda to: None, id="hangs up"),
        pytest.param(
            lambda to: to.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"), id="cut"
        ),
    ],
)
def test_anything_else_is_an_error(answer: Answer) -> None:
    with pytest.raises((OSError, ValueError)):
        fetched(answer)


def test_an_issuer_that_does_not_come_to_an_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_SECONDS", 0.1)
    left = threading.Event()

    def drips(to: http.server.BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.end_headers()
        while not left.wait(0.02):
            try:
                to.wfile.write(b" ")
            except OSError:
                return

    with pytest.raises(OSError, match=r"within|timed out"):
        fetched(drips)
    left.set()


def test_https_is_checked(tmp_path: Path) -> None:
    """A certificate that nobody vouches for."""
    with pytest.raises(OSError, match="certificate"), tls(tmp_path) as url:
        asyncio.run(source.from_url(url)())  # type: ignore[arg-type]


@contextmanager
def tls(folder: Path) -> Iterator[str]:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    from tests.authz.tokens import private

    key = private("ES256")
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    start = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(pem)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "key.pem")

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass

    with Quiet(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"https://localhost:{server.server_port}/jwks"
        finally:
            server.shutdown()
            thread.join()
