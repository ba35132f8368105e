"""
The same request to the server itself and through the gateway: the same bytes, the same headers.

What may differ is written down in docs/how-it-works.md, and read from there.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama.endpoints import METERED
from parallama.roles import Role
from tests.e2e.gateway import Gateway, Someone, running
from tests.e2e.raw_upstream import Gone, Headers, Message, RawUpstream, ask, chunked, head
from tests.envoy.differential.judge import edits
from tests.examples import examples

MB = 1 << 20
PATHS = sorted(METERED)
SPLICED = ("/v1/chat/completions", "/v1/completions")

JSON, SSE, NDJSON = "application/json", "text/event-stream", "application/x-ndjson"


# What the docs say.


@dataclass(frozen=True)
class Row:
    names: tuple[str, ...]
    prefixes: tuple[str, ...]
    fate: str


def told(table: str) -> list[Row]:
    page = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text("utf-8")
    section = page[page.index("## What passes unchanged") :].split("\n## ")[0]
    lines = section[section.index(f"| {table} |") :].split("\n\n")[0].splitlines()[2:]
    rows = []
    for line in lines:
        names, fate, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        found = re.findall(r"`([a-z-]+)`", names)
        prefixes = tuple(name for name in found if name.endswith("-"))
        rows.append(Row(tuple(n for n in found if n not in prefixes), prefixes, fate))
    return rows


OF_REQUESTS, OF_ANSWERS = told("header of a request"), told("header of an answer")


def kept(headers: Headers, rows: Sequence[Row]) -> dict[str, str | list[str]]:
    """Those that the docs do not speak of."""
    names = {name for row in rows for name in row.names}
    prefixes = tuple(prefix for row in rows for prefix in row.prefixes)
    found: dict[str, list[str]] = {}
    for name, value in headers:
        if name not in names and not name.startswith(prefixes):
            found.setdefault(name, []).append(value)
    # Several of one name mean the same as one with commas (RFC 9110, 5.3), but for this.
    return {n: values if n == "set-cookie" else ",".join(values) for n, values in found.items()}


def test_the_docs_name_what_differs() -> None:
    assert {row.fate for row in OF_REQUESTS} == {"removed", "replaced"}
    assert {row.fate for row in OF_ANSWERS} == {"removed", "replaced", "kept"}
    assert len(OF_REQUESTS) > 8
    assert len(OF_ANSWERS) > 4
    assert tuple(p for row in OF_REQUESTS for p in row.prefixes) == ("x-parallama-", "x-envoy-")


# The gateway, and a server that keeps all bytes.

MAPPED, MEANT = "by/this:name", "m\u00fc:1"
SHAPE = {"num_ctx": {"max": 4096}}


@pytest.fixture(scope="module")
def upstream() -> Iterator[RawUpstream]:
    with RawUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(upstream: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("transparent")
    settings = f"request_shapes: {{'*': {json.dumps(SHAPE)}}}\n"
    mappings = dict.fromkeys(("OLLAMA", "OPENAI"), json.dumps({MAPPED: MEANT}))
    environ = {f"PARALLAMA_API_GATEWAYS__{at}__MODEL_MAPPINGS": v for at, v in mappings.items()}
    with running(
        folder,
        upstream,  # type: ignore[arg-type]
        settings=settings,
        environ=environ,
        complaints=True,
    ) as started:
        yield started


@pytest.fixture(scope="module")
def someone(gateway: Gateway) -> Someone:
    return gateway.someone()


@pytest.fixture(scope="module")
def operator(gateway: Gateway) -> Someone:
    return gateway.someone(role=Role.OPERATOR)


Answer = Sequence[bytes]
_SCRIPTS = count(1)

# It hangs up, and says so: a proxy might ask on this connection before it sees the end of it.
_HEAD = [("content-type", JSON), ("content-length", "2"), ("connection", "close")]
OK: Answer = (head("HTTP/1.1 200 OK", _HEAD), b"{}")


@dataclass(frozen=True)
class Request:
    """As bytes, but for the credential and the script."""

    path: str
    body: bytes = b""
    headers: Headers = ()  # type: ignore[assignment]
    method: str = "POST"
    pieces: tuple[int, ...] | None = None  # sizes of chunks; without any it has a length
    trailers: Headers = ()  # type: ignore[assignment]

    def written(self, more: Headers) -> Iterator[bytes]:
        headers = [("host", "localhost"), *self.headers, *more]
        if self.pieces is None:
            headers.append(("content-length", str(len(self.body))))
        else:
            headers.append(("transfer-encoding", "chunked"))
        yield head(f"{self.method} {self.path} HTTP/1.1", headers)
        if self.pieces is None:
            yield self.body
        else:
            yield from chunked(cut(self.body, self.pieces), self.trailers)


def cut(body: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    for size in sizes:
        yield body[:size]
        body = body[size:]
    yield body


@dataclass(frozen=True)
class Both:
    """What the server and the client saw: first directly, then through the gateway."""

    asked: Message
    asked_through: Message
    answer: Message
    answer_through: Message


def both(someone: Someone, request: Request, answer: Answer = OK) -> Both:
    upstream: RawUpstream = someone.gateway.upstream  # type: ignore[assignment]
    script = str(next(_SCRIPTS))
    upstream.say(script, answer)
    bodyless = request.method == "HEAD"
    mine = [("x-script", script), ("authorization", f"Bearer {someone.token}")]
    direct = ask(upstream.address, request.written(mine), bodyless=bodyless)
    through = ask(someone.gateway.address, request.written(mine), bodyless=bodyless)
    assert upstream.times_asked(script) == 2, through
    asked = upstream.asked(script, 2)
    return Both(*asked, direct, through)


def check_request(found: Both, *, spliced: bool = False) -> None:
    mine, gone = found.asked, found.asked_through
    assert gone.start == mine.start
    assert kept(gone.headers, OF_REQUESTS) == kept(mine.headers, OF_REQUESTS)
    assert not gone.trailers
    if spliced:
        came, sent = mine.body.decode("latin-1"), gone.body.decode("latin-1")
        assert not [*edits(came, sent, {"stream_options", "include_usage"})]
        assert json.loads(sent)["stream_options"]["include_usage"] is True
    else:
        assert gone.body == mine.body


def check_answer(found: Both) -> None:
    said, got = found.answer, found.answer_through
    assert got.status == said.status
    assert kept(got.headers, OF_ANSWERS) == kept(said.headers, OF_ANSWERS)
    assert got.body == said.body
    assert got.whole == said.whole


# Requests.

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)
_WATCHED = {
    *(
        "model",
        "name",
        "stream",
        "stream_options",
        "options",
        "prompt",
        "n",
        "best_of",
        "n_predict",
    ),
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "keep_alive"),
}


_NAMES = ("m", "é/ü:7b", 'q"', "m" * 256)


@st.composite
def bodies(draw: st.DrawFn, *, stream: bool | None = None, names: Sequence[str] = _NAMES) -> bytes:
    """Written as clients write, and as they hardly ever do."""
    others = draw(st.dictionaries(_TEXT, _TREES, max_size=4))
    body = {key: value for key, value in others.items() if key.casefold() not in _WATCHED}
    items = [*body.items(), ("model", draw(st.sampled_from(names)))]
    if stream is not None:
        items.append(("stream", stream))
    items = draw(st.permutations(items))
    return json.dumps(
        dict(items),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 0, 3, "\t"])),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\r\n", "\t:")])),
    ).encode("utf-8", "surrogatepass")


_TOKEN = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789-.!~'", min_size=1, max_size=12)
_VALUE = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=20
).map(lambda text: text.strip(" \t"))


def header_lists(
    rows: Sequence[Row], known: Sequence[tuple[str, str]]
) -> st.SearchStrategy[Headers]:
    """Any headers but those that the docs speak of, and those that say how long a body is."""
    mine = {
        "x-script",
        "content-length",
        "transfer-encoding",
        "trailer",
        "te",
        "age",
        "content-type",
    }

    def ours(pair: tuple[str, str]) -> bool:
        name = pair[0].lower()
        return name not in mine and bool(kept([(name, "")], rows))

    any_pair = st.tuples(_TOKEN, _VALUE).filter(ours)
    return st.lists(st.sampled_from(known) | any_pair, max_size=8)


_OF_CLIENTS = (
    *(("Accept", "*/*"), ("User-Agent", "ollama/0.9"), ("accept", "application/x-ndjson")),
    *(("X-Stainless-Lang", "python"), ("OpenAI-Organization", "o"), ("anthropic-version", "1")),
    *(("traceparent", "00-1-2-03"), ("If-None-Match", '"x"'), ("Range", "bytes=0-1"), ("x-a", "")),
    *(("X-A", "1"), ("x-a", "2"), ("accept-language", "de, en;q=0.5"), ("x-forwarded-host", "h")),
    *(("forwarded", "for=1"), ("via", "1.1 v"), ("referer", "http://x/"), ("dnt", "1")),
)
_PIECES = st.none() | st.lists(st.integers(1, 40), max_size=6).map(tuple)


@examples(60)
@given(st.data())
def test_a_request_arrives_as_it_was_sent(someone: Someone, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(PATHS))
    stream = data.draw(st.sampled_from([None, False, True]))
    request = Request(
        path + data.draw(st.sampled_from(["", "?x=1&y=%20", "?", "?a=b;c/../d"])),
        data.draw(bodies(stream=stream)),
        [*data.draw(header_lists(OF_REQUESTS, _OF_CLIENTS)), ("content-type", JSON)],
        pieces=data.draw(_PIECES),
    )
    found = both(someone, request)
    check_request(found, spliced=stream is True and path in SPLICED)
    assert found.answer_through.status == 200


PREFIXED = [
    *(("/ollama", path) for path in PATHS),
    *(("/openai", path) for path in PATHS if path.startswith("/v1/")),
]


@pytest.mark.parametrize(("prefix", "path"), PREFIXED)
def test_only_the_prefix_goes(someone: Someone, prefix: str, path: str) -> None:
    found = both(someone, Request(f"{prefix}{path}?a=%41", b'{"model":"m"}'))
    assert found.asked_through.start == f"POST {path}?a=%41 HTTP/1.1"
    assert found.asked_through.body == b'{"model":"m"}'


# Or else they would contradict the one that is there.
_THERE_ANYWAY = (
    *("content-length", "transfer-encoding", "host"),
    *("authorization", "x-api-key", "api-key"),
)


@pytest.mark.parametrize("name", [name for row in OF_REQUESTS for name in row.names])
def test_a_header_of_a_request_that_the_docs_speak_of(someone: Someone, name: str) -> None:
    (row,) = (row for row in OF_REQUESTS if name in row.names)
    value = {
        "expect": "100-continue",
        "connection": "keep-alive",
        "x-forwarded-for": "192.0.2.7",
        "content-type": "text/plain; charset=utf-16",
    }.get(name, "something-else")
    said = [(name, value)]
    if name in (
        "content-length",
        "transfer-encoding",
        "authorization",
        "host",
        "x-api-key",
        "api-key",
    ):
        said = []  # is there anyway, or contradicts the one that is
    found = both(someone, Request("/v1/embeddings", b'{"model":"m"}', said))
    gone = dict(found.asked_through.headers)
    if row.fate == "removed":
        assert name not in gone
    elif name not in ("content-length", "transfer-encoding", "expect"):
        assert gone[name] != value
    check_request(found)


def test_a_body_in_chunks_of_a_byte_and_trailers_is_read(someone: Someone) -> None:
    body = b'{"model":"m", "input":[1.0,2e3]}'
    request = Request(
        "/v1/embeddings", body, pieces=(1,) * len(body), trailers=[("x-after", "1"), ("model", "z")]
    )
    found = both(someone, request)
    check_request(found)
    assert found.asked_through.body == body


def test_what_an_operator_uploads_passes_as_it_is(operator: Someone) -> None:
    """Not JSON, not read, not held."""
    blob = bytes(range(256)) * 4096
    path = f"/api/blobs/sha256:{'0' * 64}"
    said: Headers = [("content-type", "application/octet-stream"), ("content-encoding", "zstd")]
    for pieces in (None, (1, 65_536, 7)):
        found = both(operator, Request(path, blob, said, pieces=pieces))
        check_request(found)
        assert dict(found.asked_through.headers)["content-type"] == "application/octet-stream"
        assert found.asked_through.body == blob


# Bodies that do not pass.


def utf16(text: str) -> bytes:
    return text.encode("utf-16-le")


_TEXT_OF_BODY = '{"model":"m","stream":false}'
REFUSED: dict[str, tuple[bytes, Headers, int, str]] = {
    "gzip": (b"\x1f\x8b\x08", [("content-encoding", "gzip")], 415, "uncompressed"),
    "zstd": (b"(\xb5/\xfd", [("content-encoding", "zstd")], 415, "uncompressed"),
    "two encodings": (b"{}", [("content-encoding", "identity, br")], 415, "uncompressed"),
    "gzip, not announced": (b"\x1f\x8b\x08\0", [], 400, "UTF-8"),
    "UTF-16": (utf16("\ufeff" + _TEXT_OF_BODY), [], 400, "UTF-8"),
    "UTF-16, announced": (
        *(utf16(_TEXT_OF_BODY), [("content-type", "application/json; charset=utf-16")]),
        *(400, "valid JSON"),
    ),
    "a byte order mark": (b"\xef\xbb\xbf" + _TEXT_OF_BODY.encode(), [], 400, "UTF-8"),
    "truncated": (_TEXT_OF_BODY[:-3].encode(), [], 400, "ends before"),
    "more than one object": (b'{"model":"m"}{"model":"m"}', [], 400, "goes on after"),
    "two models": (b'{"model":"m","Model":"n"}', [], 400, "another way"),
    "nothing": (b"", [], 400, "missing request body"),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_cannot_pass_is_refused_in_words(someone: Someone, path: str, why: str) -> None:
    body, headers, status, words = REFUSED[why]
    upstream: RawUpstream = someone.gateway.upstream  # type: ignore[assignment]
    script = str(next(_SCRIPTS))
    upstream.say(script, OK)
    mine = [("x-script", script), ("authorization", f"Bearer {someone.token}")]
    answer = ask(someone.gateway.address, Request(path, body, headers).written(mine))
    assert answer.status == status, answer.body
    assert answer.get("content-type") == JSON
    error = json.loads(answer.body)["error"]
    assert words in (error if path.startswith("/api/") else error["message"])
    if path == "/v1/messages":
        assert error["type"] == "invalid_request_error"
        assert json.loads(answer.body)["type"] == "error"
    assert not upstream.times_asked(script)


LYING = {
    "longer than it is": (b"content-length: 100\r\n\r\n" + b'{"model":"m"}', None),
    "shorter than it is": (b"content-length: 5\r\n\r\n" + b'{"model":"m"}', 400),
    "two lengths": (b"content-length: 13\r\ncontent-length: 14\r\n\r\n" + b'{"model":"m"}', 400),
    "no number": (b"content-length: x\r\n\r\n" + b'{"model":"m"}', 400),
    "negative": (b"content-length: -1\r\n\r\n" + b'{"model":"m"}', 400),
    "a length and chunks": (
        *(
            b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
            + b'd\r\n{"model":"m"}\r\n0\r\n\r\n',
        ),
        *(400,),
    ),
    "a chunk that is longer": (b'transfer-encoding: chunked\r\n\r\nff\r\n{"model":"m"}\r\n', None),
    "no chunk": (b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400),
}


@pytest.mark.parametrize("what", LYING)
def test_a_length_that_lies_never_reaches_the_server(someone: Someone, what: str) -> None:
    sent, status = LYING[what]
    upstream: RawUpstream = someone.gateway.upstream  # type: ignore[assignment]
    script = str(next(_SCRIPTS))
    upstream.say(script, OK)
    start = (
        f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nx-script: {script}\r\n"
        f"authorization: Bearer {someone.token}\r\n"
    )
    if status is None:
        with pytest.raises(Gone):
            ask(someone.gateway.address, [start.encode() + sent], hang_up=True)
    else:
        assert ask(someone.gateway.address, [start.encode() + sent]).status == status
    assert not upstream.times_asked(script)


# Answers.

_END = {SSE: b"data: [DONE]\n\n", NDJSON: b'{"done":true}\n', JSON: b""}
_LINES = st.sampled_from(
    [
        b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n', b": a comment\n\n", b"\n",
        b"\r\n\r\n",
        b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\r\n\r\n',
        b'data:{"usage":{"prompt_tokens":1,"completion_tokens":2},"usage":null}\n\n', b"event: x\n",
        b"data: {\n", b"data\n\n", b"id: 1\nretry: 5\n\n",
        b'data: {"x":"' + b"y" * 3000 + b'"}\n\n', b"not json\n", b"\xff\n",
        b'{"message":{"content":"x"},"done":false}\n', b'{"model":"n"}\r\n',
        b'{"choices":[{"text":"x"}],"usage":{"prompt_tokens":-5}}', b"data: x", b"\0",
    ]
)  # fmt: skip
_OF_SERVERS = (
    *(("Server", "stand-in"), ("Set-Cookie", "a=1"), ("set-cookie", "b=2"), ("ETag", '"e"')),
    *(("OpenAI-Processing-Ms", "5"), ("Vary", "Origin"), ("cache-control", "no-cache")),
    *(("x-should-retry", "false"), ("retry-after", "7"), ("location", "http://127.0.0.1/x")),
    *(
        ("www-authenticate", "Bearer"),
        ("x-empty", ""),
        ("content-language", "de"),
        ("alt-svc", "h3"),
    ),
    *(("strict-transport-security", "x"), ("anthropic-ratelimit-requests-limit", "5")),
)
# One that is busy may be asked again, or another one: tests/e2e/test_resilience.py. What is not
# found may be no Ollama API: below.
_FAILURES = (400, 401, 403, 409, 422, 429, 499, 500, 502)
_STATUSES = st.sampled_from((*[200] * 5, 201, 202, *_FAILURES))


def framed(body: bytes, how: str, headers: Headers, status: int, sizes: Iterable[int]) -> Answer:
    if how == "length":
        headers = [*headers, ("Content-Length", str(len(body)))]
        return head(f"HTTP/1.1 {status} Somehow", headers), *cut(body, sizes)
    if how == "chunked":
        headers = [*headers, ("Transfer-Encoding", "chunked")]
        return head(f"HTTP/1.1 {status} ", headers), *chunked(cut(body, sizes))
    return head(f"HTTP/1.1 {status} OK", [*headers, ("connection", "close")]), *cut(body, sizes)


@examples(80)
@given(st.data())
def test_an_answer_arrives_as_it_was_sent(someone: Someone, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([JSON, SSE, NDJSON, "text/plain", "image/png", None]))
    status = data.draw(_STATUSES)
    body = b"".join(data.draw(st.lists(_LINES, max_size=6)))
    if kind in _END and status < 300:  # or else it gets an event that says that it has no end
        body += b"\n" + _END[kind]
    headers = data.draw(header_lists(OF_ANSWERS, _OF_SERVERS))
    if kind:
        written = data.draw(st.sampled_from([kind, f"{kind}; charset=utf-8", kind.upper()]))
        headers.append(("Content-Type", written))
    how = data.draw(st.sampled_from(["length", "chunked", "until it closes"]))
    sizes = data.draw(st.lists(st.integers(1, 30), max_size=8))
    path = data.draw(st.sampled_from([path for path in PATHS if path not in _OWN_ENDS]))
    found = both(
        someone, Request(path, b'{"model":"m"}'), framed(body, how, headers, status, sizes)
    )
    check_answer(found)
    assert found.answer.body == body


# Their streams end with an event of their own: below.
_OWN_ENDS = ("/v1/responses", "/v1/messages")


@pytest.mark.parametrize("name", [name for row in OF_ANSWERS for name in row.names])
def test_a_header_of_an_answer_that_the_docs_speak_of(limited: Someone, name: str) -> None:
    (row,) = (row for row in OF_ANSWERS if name in row.names)
    value = {"date": "Sat, 01 Jan 2000 00:00:00 GMT", "connection": "keep-alive"}.get(name, "other")
    said = [] if name in ("transfer-encoding", "content-length", "upgrade") else [(name, value)]
    path = "/v1/messages" if name == "request-id" else "/v1/embeddings"
    request = Request(path, b'{"model":"m"}')
    body = b'{"usage":{"prompt_tokens":1,"total_tokens":1}}'
    answers = [
        framed(body, "chunked", [("content-type", JSON), *more], 200, ()) for more in ((), said)
    ]
    without, got = (both(limited, request, answer).answer_through for answer in answers)
    values = [found for key, found in got.headers if key == name]
    if row.fate == "kept":
        assert values == [value]
        assert without.get(name)
    elif row.fate == "replaced":
        assert (len(values), value in values) == (1 if without.get(name) else 0, False)
    else:
        assert value not in values


@pytest.fixture(scope="module")
def limited(gateway: Gateway) -> Someone:
    return gateway.someone(requests=1000, tokens=1_000_000)


def framed_events(body: bytes, sizes: Iterable[int] = ()) -> Answer:
    return framed(body, "chunked", [("content-type", SSE)], 200, sizes)


_TOKEN_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
_USAGE_EVENT = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n'
_DONE = b"data: [DONE]\n\n"
STREAM = b'{"model":"m","stream":true}'
ASKED = b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}'

EVENTS = {
    "usual": (_TOKEN_EVENT, _USAGE_EVENT, _DONE),
    "CRLF": tuple(e.replace(b"\n", b"\r\n") for e in (_TOKEN_EVENT, _USAGE_EVENT, _DONE)),
    "comments": (b": ping\n\n", _TOKEN_EVENT, b":\n", _USAGE_EVENT, b": bye\n\n", _DONE),
    "two usages": (_TOKEN_EVENT, _USAGE_EVENT, _USAGE_EVENT, _DONE),
    "no usage": (_TOKEN_EVENT, _DONE),
    "a line of 5 MB": (
        *(b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"y" * (5 * MB)),),
        *(_TOKEN_EVENT, _USAGE_EVENT, _DONE),
    ),
    "no line end at the end": (_TOKEN_EVENT, _USAGE_EVENT, b"data: [DONE]"),
    "a usage in an event with text": (
        b'data: {"choices":[{"delta":{"content":"x"}}],"usage":{"prompt_tokens":1}}\n\n',
        _DONE,
    ),
}


@pytest.mark.parametrize("size", [1, 7, 1 << 20], ids=lambda size: f"chunks of {size}")
@pytest.mark.parametrize("what", EVENTS)
def test_of_a_stream_only_the_event_that_nobody_asked_for_goes(
    someone: Someone, what: str, size: int
) -> None:
    body = b"".join(EVENTS[what])
    sizes = [size] * min(len(body) // size, 500)
    hidden = {_USAGE_EVENT, _USAGE_EVENT.replace(b"\n", b"\r\n")}
    left = b"".join(event for event in EVENTS[what] if event not in hidden)
    for sent, expected in ((ASKED, body), (STREAM, left)):
        request = Request("/v1/chat/completions", sent)
        found = both(someone, request, framed_events(body, sizes))
        check_request(found, spliced=sent == STREAM)
        assert found.answer.body == body
        assert found.answer_through.body == expected


@pytest.mark.parametrize("path", PATHS)
def test_a_line_of_5_mb_passes(someone: Someone, path: str) -> None:
    body = b'{"response":"%b","done":true}' % (b"y" * (5 * MB))
    for kind in (JSON, NDJSON, "text/plain"):
        found = both(
            someone,
            Request(path, b'{"model":"m"}'),
            framed(body, "length", [("content-type", kind)], 200, (1, 100_000)),
        )
        assert found.answer_through.status == 200
        assert found.answer_through.body.startswith(body)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_found_is_said_as_the_server_said_it(someone: Someone, path: str) -> None:
    body = b'{ "error" : "model \\"m\\" not found"}' if "/api/" in path else b"<h1>nothing</h1>"
    answer = framed(body, "length", [("content-type", "text/html")], 404, ())
    check_answer(both(someone, Request(path, b'{"model":"m"}'), answer))


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_passes(someone: Someone, status: int) -> None:
    answer = (head(f"HTTP/1.1 {status} Nothing", [("etag", '"x"')]),)
    check_answer(both(someone, Request("/v1/embeddings", b'{"model":"m"}'), answer))


def test_an_answer_to_head_passes(operator: Someone) -> None:
    answer = (head("HTTP/1.1 200 OK", [("content-length", "123456"), ("x-a", "b")]),)
    path = f"/api/blobs/sha256:{'0' * 64}"
    found = both(operator, Request(path, method="HEAD"), answer)
    check_answer(found)
    assert found.answer_through.get("content-length") == "123456"


@pytest.mark.parametrize(("kind", "how"), [(JSON, "length"), (SSE, "chunked"), (NDJSON, "chunked")])
def test_an_answer_that_ends_too_early_ends_too_early(
    someone: Someone, kind: str, how: str
) -> None:
    """The client can tell, as it could without us."""
    headers: Headers = [("content-type", kind)]
    if how == "length":
        answer = [head("HTTP/1.1 200 OK", [*headers, ("content-length", "100")]), b"data: 1\n\n"]
    else:
        headers.append(("transfer-encoding", "chunked"))
        answer = [head("HTTP/1.1 200 OK", headers), b"9\r\ndata: 1\n\n\r\n"]
    found = both(someone, Request("/api/chat", b'{"model":"m"}'), answer)
    assert not found.answer.whole
    assert not found.answer_through.whole
    assert found.answer.body.startswith(found.answer_through.body)


NO_HTTP: dict[str, Answer] = {
    "nothing": (),
    "not HTTP": (b"hello\r\n\r\n",),
    "half a head": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n",),
    "a length and chunks": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",
        b"2\r\n{}\r\n0\r\n\r\n",
    ),
    "two lengths": (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",),
    "a header with a null": (b"HTTP/1.1 200 OK\r\nx-a: \0\r\ncontent-length: 2\r\n\r\n{}",),
    "a header too large": (b"HTTP/1.1 200 OK\r\nx-a: " + b"y" * 100_000 + b"\r\n\r\n",),
}


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("what", NO_HTTP)
def test_an_answer_that_is_no_http_is_an_error_in_words(
    someone: Someone, path: str, what: str
) -> None:
    upstream: RawUpstream = someone.gateway.upstream  # type: ignore[assignment]
    script = str(next(_SCRIPTS))
    upstream.say(script, NO_HTTP[what])
    mine = [("x-script", script), ("authorization", f"Bearer {someone.token}")]
    answer = ask(someone.gateway.address, Request(path, b'{"model":"m"}').written(mine))
    assert answer.status == 503
    assert "model server" in str(json.loads(answer.body)["error"])
    assert upstream.times_asked(script) == 1


# With all edits at once.


@examples(40)
@given(st.data())
def test_of_a_mapped_model_only_the_name_differs(someone: Someone, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(PATHS))
    name = data.draw(st.sampled_from([MAPPED, f"{MAPPED}:latest", MAPPED.upper()]))
    stream = data.draw(st.booleans())
    body = data.draw(bodies(stream=stream, names=(name,)))
    found = both(someone, Request(path, body, pieces=data.draw(_PIECES)))
    came, sent = body.decode("latin-1"), found.asked_through.body.decode("latin-1")
    spliced = {"stream_options", "include_usage"} if stream and path in SPLICED else set()
    assert not [*edits(came, sent, {"model", *spliced})]
    assert json.loads(found.asked_through.body)["model"] == MEANT
    assert kept(found.asked_through.headers, OF_REQUESTS) == kept(found.asked.headers, OF_REQUESTS)


ANSWERS_WITH_NAMES = {
    JSON: '{"id":1.0, "model" : %s,"x":{"model":"MEANT"},"usage":{"total_tokens":2}}',
    SSE: 'data: {"model":%s,"choices":[{"delta":{"content":"MEANT"}}]}\n\ndata: [DONE]\n\n',
    NDJSON: '{"model":%s,"message":{"content":"\\"MEANT"}}\r\n{"model":%s,"done":true}\n',
}


@pytest.mark.parametrize("size", [1, 10_000], ids=lambda size: f"chunks of {size}")
@pytest.mark.parametrize("kind", ANSWERS_WITH_NAMES)
def test_the_answer_says_the_name_that_was_asked_for(
    someone: Someone, kind: str, size: int
) -> None:
    text = ANSWERS_WITH_NAMES[kind].replace("MEANT", MEANT)
    said, expected = (
        text.replace("%s", json.dumps(name, ensure_ascii=False)).encode()
        for name in (MEANT, MAPPED)
    )
    answer = framed(said, "chunked", [("content-type", kind)], 200, [size] * (len(said) // size))
    path = "/api/chat" if kind == NDJSON else "/v1/chat/completions"
    asked = json.dumps({"model": MAPPED, "stream": kind != JSON}).encode()
    found = both(someone, Request(path, asked), answer)
    assert found.answer.body == said
    assert found.answer_through.body == expected
    assert kept(found.answer_through.headers, OF_ANSWERS) == kept(found.answer.headers, OF_ANSWERS)


def test_what_a_shape_changes_is_told_and_nothing_else_changes(someone: Someone) -> None:
    body = b'{"model":"m",  "options":{"num_ctx" : 9999999 , "seed":1.0},"x":1e2}'
    found = both(someone, Request("/api/chat", body))
    assert found.asked_through.body == body.replace(b"9999999", b"4096")
    assert found.answer_through.get("x-parallama-changed") == "num_ctx=4096"
