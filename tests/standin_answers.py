"""What the stand-in does with one request: its route, then the form and the count of the bytes."""

import base64
import hashlib
import json
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tests import standin_asked as asked
from tests import standin_dialects as dialects
from tests import standin_typed
from tests.standin_dialects import Behaviour, Json, Refused
from tests.standin_wire import ClientGone, Connection, Request

if TYPE_CHECKING:
    from tests.standin import StandIn

JSON = "application/json; charset=utf-8"
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
READ, POST = ("GET", "HEAD"), ("POST",)


@dataclass(slots=True)
class Seen:
    """
    One request and what became of it.

    `emitted` and `chunks` are what the kernel took, not what was meant.
    """

    id: int
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    received: int = 0
    """Bytes of the body; those of a blob are counted and not kept."""
    model: str | None = None
    """The configured model that ran, whatever the request called it."""
    prompt_tokens: int = 0
    images: int = 0
    """Images that came with the prompt."""
    emitted: int = 0
    """Tokens written."""
    chunks: int = 0
    status: int = 0
    held: bool = False
    """Waits at its gate right now."""
    client_gone: bool = False
    """The client left before the answer was complete."""
    finished: bool = False
    """The answer was written to the end."""
    ended: bool = False

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: str) -> str | None:
        """The first header of that name."""
        return next((v for k, v in self.headers if k.lower() == name.lower()), None)

    def json(self) -> Any:
        return json.loads(self.body)

    def as_dict(self) -> Json:
        text = self.body.decode("utf-8", "backslashreplace")
        return {**asdict(self), "body": text, "body_base64": base64.b64encode(self.body).decode()}


class _Cut(Exception):
    """The answer ends here, by order."""


_REASONS = {
    200: "OK",
    201: "Created",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    429: "Too Many Requests",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}


def dump(value: Any, spaces: bool, indent: int | None = None) -> bytes:
    if spaces:
        return json.dumps(value, ensure_ascii=False, indent=indent).encode()
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class Exchange:
    """One request and its answer: routes first, then how the bytes are written."""

    def __init__(
        self,
        server: "StandIn",
        connection: Connection,
        request: Request,
        seen: Seen,
        says: Behaviour,
    ) -> None:
        self._server = server
        self._connection = connection
        self._request = request
        self._seen = seen
        self._says = says
        self._flavour = says.flavour or server.flavour
        self._early_headers = says.early_headers and says.status < 400
        self._api = request.path.startswith("/api/")
        self._ollama = self._flavour == "ollama"
        self._chunked = False
        self._pending: list[tuple[bytes, int]] = []
        self._gzip = None
        if says.gzip and "gzip" in request.get("accept-encoding"):
            self._gzip = zlib.compressobj(wbits=31)
        self.keep_alive = request.keep_alive

    async def run(self) -> None:
        """Raises ClientGone where the client left."""
        try:
            await self._route()
            self._seen.finished = True
        except _Cut:
            if self._says.cut == "clean" and self._chunked:
                await self._end()
            else:
                self.keep_alive = False
                if self._says.cut == "reset":
                    self._connection.reset()
        except ClientGone:
            self._seen.client_gone = True
            raise

    async def _route(self) -> None:
        request = self._request
        if self._ollama and not self._welcome():
            return await self._whole(403, "", b"")
        methods, handle = _ROUTES.get(request.path, ((), None))
        if request.path.startswith("/api/blobs/"):
            methods, handle = ("HEAD", "POST"), Exchange.blob
        elif request.path.startswith("/v1/models/"):
            methods, handle = ("GET",), Exchange.v1_model
        if handle is None or (self._api and not self._ollama) or self._lacks(handle):
            if self._ollama:
                return await self._whole(404, "text/plain", b"404 page not found")
            return await self._error(404, "File Not Found")
        if "GET" in methods and not self._ollama:
            methods = READ
        if request.method not in methods:
            return await self._whole(405, "text/plain", b"405 method not allowed")
        try:
            await handle(self)
        except Refused as refusal:
            await self._error(refusal.status, str(refusal))

    def _lacks(self, handle: Any) -> bool:
        """What the others have and this one has not."""
        if self._flavour == "llamacpp":
            return handle is Exchange.v1_model
        return self._ollama and handle in (Exchange.count_tokens, Exchange.health)

    def _welcome(self) -> bool:
        origin = self._request.get("origin")
        hosts = [self._request.get("host"), *([urlsplit(origin).netloc] if origin else [])]
        return all(dialects.host_allowed(host) for host in hosts)

    async def _error(self, status: int, message: str) -> None:
        value = dialects.error(self._request.path, self._flavour, status, message)
        await self._json(value, status)

    async def _json(self, value: Any, status: int = 200, tokens: int = 0) -> None:
        await self._whole(status, JSON, dump(value, self._says.spaces, indent=2), tokens)

    def _body(self) -> Json:
        if not self._request.body and self._ollama:
            raise Refused(400, "missing request body" if self._api else "EOF")
        try:
            return dialects.parse(self._request.body, go=self._ollama)
        except (ValueError, RecursionError) as error:
            raise Refused(400, str(error)) from None

    def _model(self, found: Json) -> str:
        """The name that the answer calls the model by; the one that runs is noted."""
        name = dialects.typed(found, "model", str) or ""
        if not name and self._ollama and self._request.path in ("/api/show", "/api/delete"):
            name = dialects.typed(found, "name", str) or ""
        if not name and self._request.path in _NAMED:
            raise Refused(400, "model is required")
        self._seen.model = self._server.model(name, self._flavour)
        if self._seen.model is None:
            raise Refused(400 if self._flavour == "llamacpp" else 404, f"model '{name}' not found")
        return name if self._ollama else self._seen.model

    # Calls that generate.

    async def _begin(self) -> None:
        """What every inference call does before its first byte, if it was told to."""
        await self._hold(0)
        await self._connection.pause(self._says.delay)
        if self._says.cut_before:
            raise _Cut
        if self._says.status >= 400:
            raise Refused(self._says.status, self._says.error)

    async def _generate(self, work: dialects.Work) -> None:
        if work.stream:
            return await self._stream(
                SSE if work.kind.startswith("v1/") else NDJSON, self._encoded(work)
            )
        if self._says.hold_at:
            await self._hold(self._says.hold_at)
        await self._connection.pause(self._says.gap * work.tokens)
        self._seen.prompt_tokens = self._says.prompt_tokens
        await self._json(forms(work).answer(work), tokens=work.emitted)

    def _ask(self, work: dialects.Work, found: Json) -> dialects.Work:
        """The same work with what is asked of it beside text."""
        self._seen.images = asked.images(found, ollama=self._ollama)
        if work.kind not in ("generate", "v1/completions"):
            work.call = asked.call(found)
        work.json_text = work.call is None and asked.wants_json(found)
        return work

    async def chat(self) -> None:
        await self._ollama_generation("chat", "messages")

    async def generate(self) -> None:
        await self._ollama_generation("generate", "prompt")

    async def _ollama_generation(self, kind: Any, prompt: str) -> None:
        found = self._body()
        model = self._model(found)
        work = self._ask(dialects.ollama_work(kind, found, self._says, model), found)
        if not work.stream or not self._early_headers:
            await self._begin()
        if found.get(prompt):
            return await self._generate(work)
        unload = found.get("keep_alive") in (0, "0", "0s", "0m")
        await self._json(dialects.ollama_loaded(kind, model, "unload" if unload else "load"))

    async def v1_chat(self) -> None:
        await self._v1_generation("v1/chat")

    async def v1_completions(self) -> None:
        await self._v1_generation("v1/completions")

    async def responses(self) -> None:
        await self._v1_generation("v1/responses")

    async def messages(self) -> None:
        await self._v1_generation("v1/messages")

    async def count_tokens(self) -> None:
        self._model(self._body())
        await self._begin()
        await self._json(standin_typed.count_tokens(self._says))

    async def _v1_generation(self, kind: Any) -> None:
        found = self._body()
        make = standin_typed.work if kind in _TYPED else dialects.v1_work
        work = make(kind, found, self._says, self._model(found), self._flavour)
        self._ask(work, found)
        if not work.stream or not self._early_headers:
            await self._begin()
        await self._generate(work)

    def _encoded(self, work: dialects.Work) -> Iterator[tuple[bytes, int]]:
        says, sse = self._says, work.kind.startswith("v1/")
        line = b"\r\n" if says.crlf else b"\n"
        comment = b": keep-alive" + line * 2 if says.comments and sse else b""
        after = line * 2 if sse else line

        def framed(value: Json, name: str = "") -> bytes:
            event = f"event: {name}".encode() + line if name else b""
            return comment + event + b"data: " * sse + dump(value, says.spaces) + after

        for count, (value, tokens) in enumerate(forms(work).events(work)):
            if count == says.error_after:
                error = forms(work).error_event(work)
                if error is not None:
                    named = "type" in error and work.kind in _TYPED
                    yield framed(error, "error" * named), 0
                return
            yield framed(value, value.get("type", "")), tokens
        if sse and work.kind not in _TYPED:
            yield comment + b"data: [DONE]" + after, 0

    async def embed(self) -> None:
        found, count = await self._embedding("input")
        counts = {"total_duration": 2_000_000, "load_duration": 1_000_000}
        counts["prompt_eval_count"] = self._seen.prompt_tokens
        told = {
            k: v for k, v in {**counts, **self._says.report}.items() if k not in self._says.omit
        }
        await self._json({"model": found["model"], "embeddings": [_vector(found)] * count, **told})

    async def embeddings(self) -> None:
        await self._embedding("prompt")
        await self._json({"embedding": _VECTOR})

    async def v1_embeddings(self) -> None:
        found, count = await self._embedding("input")
        tokens = self._seen.prompt_tokens
        vector: Any = _vector(found)
        if found.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data = [{"object": "embedding", "embedding": vector, "index": n} for n in range(count)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, **self._says.report}
        answer: Json = {"object": "list", "data": data, "model": found["model"]}
        if self._flavour != "bare" and "usage" not in self._says.omit:
            answer["usage"] = usage
        await self._json(answer)

    async def _embedding(self, field: str) -> tuple[Json, int]:
        """The body, and how many texts it holds."""
        found = self._body()
        self._model(found)
        await self._begin()
        self._seen.prompt_tokens = self._says.prompt_tokens
        texts = found.get(field)
        if not isinstance(texts, list):
            return found, 1
        if self._ollama and not all(isinstance(text, str) for text in texts):
            raise Refused(400, "invalid input type")
        tokens = bool(texts) and isinstance(texts[0], int)  # one text, tokenized already
        return found, 1 if tokens else len(texts)

    # Calls about models.

    async def root(self) -> None:
        await self._begin()
        await self._whole(200, "text/plain; charset=utf-8", b"Ollama is running")

    async def version(self) -> None:
        await self._begin()
        await self._json({"version": "0.18.0"})

    async def status(self) -> None:
        await self._begin()
        await self._json({"cloud": {"disabled": True, "source": "env"}})

    async def health(self) -> None:
        await self._begin()
        await self._json({"status": "ok"})

    async def tags(self) -> None:
        await self._begin()
        await self._json({"models": [_entry(name) for name in self._server.models]})

    async def ps(self) -> None:
        await self._begin()
        loaded = {"expires_at": "2099-01-01T00:00:00Z", "size_vram": 0, "context_length": 4096}
        await self._json({"models": [{**_entry(name), **loaded} for name in self._server.models]})

    async def show(self) -> None:
        self._model(self._body())
        await self._begin()
        entry = _entry(self._seen.model or "")
        await self._json(
            {
                "license": "none",
                "modelfile": "FROM stand-in",
                "template": "{{ .Prompt }}",
                "details": entry["details"],
                "model_info": {"general.architecture": "llama", "llama.context_length": 4096},
                "capabilities": entry["capabilities"],
                "modified_at": entry["modified_at"],
            }
        )

    async def v1_models(self) -> None:
        await self._begin()
        names = self._server.models
        if self._ollama:
            names = [_tagged(name) for name in names]
        await self._json({"object": "list", "data": [self._v1_entry(name) for name in names]})

    async def v1_model(self) -> None:
        name = unquote(self._request.path.removeprefix("/v1/models/"))
        self._seen.model = self._server.model(name, self._flavour)
        await self._begin()
        if self._seen.model is None:
            raise Refused(404, f"model '{name}' not found")
        await self._json(self._v1_entry(name))

    def _v1_entry(self, name: str) -> Json:
        owner = {"ollama": "library", "llamacpp": "llamacpp"}.get(self._flavour, "stand-in")
        more = {"status": {"value": "loaded"}} if self._flavour == "llamacpp" else {}
        return {
            "id": name, "object": "model", "created": 1_790_000_000, "owned_by": owner, **more,
        }  # fmt: skip

    async def pull(self) -> None:
        await self._transfer(
            "pulling", ["pulling manifest", None, "verifying sha256 digest", "writing manifest"]
        )

    async def push(self) -> None:
        await self._transfer("pushing", ["retrieving manifest", None, "pushing manifest"])

    async def create(self) -> None:
        await self._transfer(
            "using existing layer", ["gathering model components", None, "writing manifest"]
        )

    async def _transfer(self, moving: str, states: list[str | None]) -> None:
        """None stands for the lines that count bytes."""
        found = self._body()
        name = dialects.typed(found, "model", str) or dialects.typed(found, "name", str) or ""
        if dialects.ollama_name(name) is None:
            raise Refused(400, "invalid model name")
        await self._begin()
        if self._server.model(name, self._flavour) is None and self._request.path != "/api/push":
            self._server.models.append(name)
        if found.get("stream") is False:
            return await self._json({"status": "success"})
        lines: list[Json] = []
        for state in [*states, "success"]:
            if state is not None:
                lines.append({"status": state})
                continue
            if self._request.path == "/api/create":
                lines.append({"status": f"{moving} {_DIGEST}"})
                continue
            layer = {"status": f"{moving} {_DIGEST[7:19]}", "digest": _DIGEST, "total": 1000}
            lines += [{**layer, "completed": done} for done in (250, 500, 750, 1000)]
        if self._says.error_after is not None:
            lines[self._says.error_after :] = [{"error": self._says.error}]
        await self._stream(NDJSON, ((dump(x, self._says.spaces) + b"\n", 0) for x in lines))

    async def delete(self) -> None:
        self._model(self._body())
        await self._begin()
        self._server.models.remove(self._seen.model or "")
        await self._whole(200, "", b"")

    async def copy(self) -> None:
        found = self._body()
        source, target = found.get("source"), found.get("destination")
        if not isinstance(source, str) or self._server.model(source, self._flavour) is None:
            raise Refused(404, f'model "{source}" not found')
        await self._begin()
        self._server.models.append(str(target))
        await self._whole(200, "", b"")

    async def blob(self) -> None:
        """The body of a blob is hashed as it comes and not kept."""
        digest, known = self._request.path.removeprefix("/api/blobs/"), self._server.blobs
        await self._begin()
        if self._request.method == "HEAD":
            return await self._whole(200 if digest in known else 404, "", b"")
        if digest in known:
            return await self._whole(200, "", b"")
        if digest != f"sha256:{self._request.sha256}":
            raise Refused(400, "digest mismatch")
        known.add(digest)
        await self._whole(201, "", b"")

    # How the bytes are written.

    async def _hold(self, chunk: int) -> None:
        if self._says.hold_at != chunk:
            return
        while not self._server.released(self._says.gate):
            self._seen.held = True
            self._server.changed(self._seen)
            await self._connection.happening()
        self._seen.held = False

    async def _stream(self, content_type: str, chunks: Iterable[tuple[bytes, int]]) -> None:
        says = self._says
        if says.raw is not None:
            return await self._whole(200, content_type, b"")
        if not says.final_newline:
            chunks = list(chunks)
            chunks[-1] = (chunks[-1][0].rstrip(), chunks[-1][1])
        self._seen.prompt_tokens = says.prompt_tokens
        await self._head(200, content_type, None)
        if self._early_headers:
            await self._begin()
        count = 0
        for index, (data, tokens) in enumerate(chunks):
            if index == says.cut_after:
                await self._flush()
                raise _Cut
            if index:
                await self._hold(index)
                await self._connection.pause(says.gap)
            self._pending.append((data, tokens))
            count += 1
            if len(self._pending) >= says.chunks_per_write:
                await self._flush()
        if count == says.cut_after:  # everything was said, but the body does not end
            await self._flush()
            raise _Cut
        await self._end()

    async def _whole(self, status: int, content_type: str, body: bytes, tokens: int = 0) -> None:
        """An answer in one piece."""
        if self._says.raw is not None and status == 200:
            body = self._says.raw.encode()
        await self._head(status, content_type, len(body))
        if self._request.method == "HEAD":
            return
        if self._says.cut_after is not None:
            await self._bytes(body[: len(body) // 2])
            raise _Cut
        self._pending.append((body, tokens))
        await self._end()

    async def _head(self, status: int, content_type: str, length: int | None) -> None:
        says = self._says
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}"]
        if content_type:
            lines.append(f"content-type: {says.content_type or content_type}")
        lines.append(f"date: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())}")
        lines += [f"{name}: {value}" for name, value in says.headers.items()]
        if self._gzip is not None:
            lines.append("content-encoding: gzip")
        if says.framing == "close":
            self.keep_alive = False
        elif length is None or says.framing == "chunked" or self._gzip is not None:
            self._chunked = True
            lines.append("transfer-encoding: chunked")
        else:
            lines.append(f"content-length: {length}")
        if not self.keep_alive:
            lines.append("connection: close")
        self._seen.status = status
        await self._connection.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def _flush(self) -> None:
        """Chunks and tokens count once they are written."""
        pending, self._pending = self._pending, []
        if pending:
            await self._bytes(b"".join(data for data, _ in pending))
            self._seen.chunks += len(pending)
            self._seen.emitted += sum(tokens for _, tokens in pending)
            self._server.changed(self._seen)

    async def _bytes(self, data: bytes) -> None:
        if self._gzip is not None:
            data = self._gzip.compress(data) + self._gzip.flush(zlib.Z_SYNC_FLUSH)
        await self._pieces(data)

    async def _pieces(self, data: bytes) -> None:
        size = self._says.write_size or len(data) or 1
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            framed = b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece
            await self._connection.write(framed)

    async def _end(self) -> None:
        await self._flush()
        if self._gzip is not None:
            await self._pieces(self._gzip.flush())
        if self._chunked:
            await self._connection.write(b"0\r\n\r\n")


_ROUTES: dict[str, tuple[tuple[str, ...], Any]] = {
    "/": (READ, Exchange.root),
    "/health": (READ, Exchange.health),
    "/api/version": (READ, Exchange.version),
    "/api/status": (("GET",), Exchange.status),
    "/api/tags": (READ, Exchange.tags),
    "/api/ps": (("GET",), Exchange.ps),
    "/api/show": (POST, Exchange.show),
    "/api/chat": (POST, Exchange.chat),
    "/api/generate": (POST, Exchange.generate),
    "/api/embed": (POST, Exchange.embed),
    "/api/embeddings": (POST, Exchange.embeddings),
    "/api/pull": (POST, Exchange.pull),
    "/api/push": (POST, Exchange.push),
    "/api/create": (POST, Exchange.create),
    "/api/copy": (POST, Exchange.copy),
    "/api/delete": (("DELETE",), Exchange.delete),
    "/v1/models": (("GET",), Exchange.v1_models),
    "/v1/chat/completions": (POST, Exchange.v1_chat),
    "/v1/completions": (POST, Exchange.v1_completions),
    "/v1/embeddings": (POST, Exchange.v1_embeddings),
    "/v1/responses": (POST, Exchange.responses),
    "/v1/messages": (POST, Exchange.messages),
    "/v1/messages/count_tokens": (POST, Exchange.count_tokens),
}
_NAMED = ("/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens")
_TYPED = ("v1/responses", "v1/messages")


def forms(work: dialects.Work) -> Any:
    """The module that knows this API's answers."""
    return standin_typed if work.kind in _TYPED else dialects


def _vector(found: Json) -> list[float]:
    return _VECTOR[: dialects.typed(found, "dimensions", int) or None]


_VECTOR = [0.125, 0.25, 0.375, 0.5]  # exact as float32 and as float64
_DIGEST = f"sha256:{'ab' * 32}"


def _tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _entry(name: str) -> Json:
    details = {"parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"]}
    details |= {"parameter_size": "135M", "quantization_level": "Q4_0"}
    return {
        "name": _tagged(name),
        "model": _tagged(name),
        "modified_at": "2026-10-01T08:00:00Z",
        "size": 91_000_000,
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "details": details,
        "capabilities": ["completion", "tools", "vision"],
    }
