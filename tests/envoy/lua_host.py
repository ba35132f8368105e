"""Runs one of our Lua filters under LuaJIT, with a handle that behaves as Envoy 1.40's does."""

from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lupa import luajit21

from parallama.contract import AUTHZ, LUA

ROOT = Path(__file__).resolve().parents[2]
NOW_MS = 1_700_000_000_123

# A yield ends the scope of every object fetched before it, but for the handle: using one afterwards
# is an error here as it is there. Headers stay writable until the body passes.
HANDLE = rb"""
local run = ...
local generation = 0

local function scoped(object)
  local born = generation
  return setmetatable({}, { __index = function(_, name)
    if born ~= generation then error("object used outside of proper scope") end
    return object[name]
  end })
end

local function wait()
  local value = coroutine.yield()
  generation = generation + 1
  return value
end

local metadata = {}
function metadata:get(namespace)
  local found = run.metadata[namespace]
  if not found then return nil end
  local copy = {}
  for key, value in pairs(found) do copy[key] = value end
  return copy
end
function metadata:set(namespace, key, value)
  assert(type(value) == "string" or type(value) == "number" or type(value) == "boolean")
  run.metadata[namespace] = run.metadata[namespace] or {}
  run.metadata[namespace][key] = value
  run.sets = run.sets + 1
end

local stream_info = {}
function stream_info:dynamicMetadata() return scoped(metadata) end

local headers = {}
function headers:get(name) return run.headers[name] end
local function writable()
  if run.headers_sent then error("header map can no longer be modified") end
end
function headers:replace(name, value) writable() run.headers[name] = value end
function headers:remove(name) writable() run.headers[name] = nil end

local function buffer()
  local object = {}
  function object:length() return #run.data end
  function object:getBytes(index, length)
    assert(index >= 0 and length >= 0 and index + length <= #run.data)
    return run.data:sub(index + 1, index + length)
  end
  function object:setBytes(bytes)
    run.data = bytes
    run.headers["content-length"] = tostring(#bytes)
    return #bytes
  end
  return scoped(object)
end

local handle = {}
function handle:streamInfo() return scoped(stream_info) end
function handle:headers() return scoped(headers) end
function handle:filterContext()
  local context = {}
  function context:get(name) return name == "max_body_bytes" and 33554432 or nil end
  return context
end
function handle:timestamp() return run.now end
function handle:base64Escape(bytes) return run.base64(bytes) end
function handle:logErr(message) run.logs[#run.logs + 1] = message end
function handle:body()
  if run.ended then return run.saw_body and buffer() or nil end
  run.wants = "body"
  wait()
  if not run.saw_body then return nil end
  return buffer()
end
function handle:bodyChunks()
  return function()
    if run.ended then return nil end
    run.wants = "chunk"
    run.headers_sent = true
    if not wait() then return nil end
    return buffer()
  end
end
function handle:respond(answer_headers, body)
  if run.is_response then error("respond not currently supported in the response path") end
  run.answer = { headers = answer_headers, body = body }
  coroutine.yield()
end
return handle
"""

DRIVER = b"""
local fn, make_handle, run = ...
local thread = coroutine.create(function() fn(make_handle(run)) end)
return function(value)
  if coroutine.status(thread) == "dead" then return false end
  run.wants = nil
  local ok, trouble = coroutine.resume(thread, value)
  if not ok then error(trouble, 0) end
  return true
end
"""


@dataclass(frozen=True)
class Answer:
    """A local reply."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Passed:
    """What a filter let through."""

    headers: dict[str, str]
    body: bytes
    metadata: dict[str, dict[str, Any]]
    answer: Answer | None
    logs: list[str] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        return self.metadata.get(LUA, {})


def _to_lua(value: object) -> object:
    return value.encode() if isinstance(value, str) else value


def _from_lua(value: object) -> Any:
    # Not UTF-8 would break Envoy's metadata, so it breaks the test.
    return value.decode() if isinstance(value, bytes) else value


class Filter:
    """One Lua file, loaded once, as in an Envoy worker."""

    def __init__(self, name: str) -> None:
        self.lua = luajit21.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        lua_globals = self.lua.globals()
        folder = f"{ROOT}/envoy/lua/?.lua;".encode()
        lua_globals[b"package"][b"path"] = folder + lua_globals[b"package"][b"path"]
        self.lua.execute((ROOT / "envoy" / "lua" / f"{name}.lua").read_bytes())
        self._handle = self.lua.eval(b"loadstring")(HANDLE)
        self._driver = self.lua.eval(b"loadstring")(DRIVER)

    def request(
        self,
        body: bytes | None,
        metadata: Mapping[str, Mapping[str, object]],
        headers: Mapping[str, str] | None = None,
    ) -> Passed:
        """A request whose body comes in one piece (None: it has none)."""
        stream = Stream(self, b"envoy_on_request", dict(headers or {}), metadata, body is None)
        return stream.passed(stream.feed(body, end=True) if body is not None else b"")

    def response(
        self,
        chunks: Iterable[bytes],
        metadata: Mapping[str, Mapping[str, object]],
        content_type: str = "application/json",
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        end_with_last: bool = False,
    ) -> Passed:
        """
        A whole answer. Envoy ends most of them with an empty chunk; with `end_with_last` the
        last chunk is also the end, as with a content-length or HTTP/2.
        """
        stream = self.open_response(metadata, content_type, status, headers)
        pieces = list(chunks) if end_with_last else [*chunks, b""]
        out = b"".join([stream.feed(p, end=i + 1 == len(pieces)) for i, p in enumerate(pieces)])
        return stream.passed(out)

    def open_response(
        self,
        metadata: Mapping[str, Mapping[str, object]],
        content_type: str = "application/json",
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> "Stream":
        """An answer whose chunks the test feeds itself."""
        all_headers = {":status": str(status), "content-type": content_type, **(headers or {})}
        return Stream(self, b"envoy_on_response", all_headers, metadata, False)


class Stream:
    """One pass through a filter, chunk by chunk."""

    def __init__(
        self,
        owner: Filter,
        function: bytes,
        headers: dict[str, str],
        metadata: Mapping[str, Mapping[str, object]],
        ended: bool,
    ) -> None:
        table = owner.lua.table_from
        self._run = table(
            {
                b"headers": table({_to_lua(k): _to_lua(v) for k, v in headers.items()}),
                b"metadata": table(
                    {
                        _to_lua(ns): table({_to_lua(k): _to_lua(v) for k, v in values.items()})
                        for ns, values in metadata.items()
                    }
                ),
                b"logs": table([]),
                b"sets": 0,
                b"now": NOW_MS,
                b"base64": b64encode,
                b"data": b"",
                b"ended": ended,
                b"is_response": function == b"envoy_on_response",
            }
        )
        self._buffered = b""
        fn = owner.lua.globals()[function]
        self._resume = owner._driver(fn, owner._handle, self._run) if fn else lambda _value: False
        self._resume(None)

    @property
    def sets(self) -> int:
        """How often metadata was written."""
        return int(self._run[b"sets"])

    @property
    def facts(self) -> dict[str, Any]:
        return self._metadata().get(LUA, {})

    def feed(self, data: bytes, end: bool = False) -> bytes:
        """The bytes that leave the filter for those that come in."""
        run = self._run
        if run[b"answer"] is not None:
            return b""
        run[b"saw_body"] = run[b"saw_body"] or bool(data)
        run[b"ended"] = end
        if run[b"wants"] == b"body":
            self._buffered += data
            if not end:
                return b""
            data = self._buffered
        run[b"data"] = data
        if run[b"wants"] is not None:
            self._resume(True)
        return bytes(run[b"data"])

    def passed(self, body: bytes) -> Passed:
        run = self._run
        answer = None
        if run[b"answer"] is not None:
            headers = {_from_lua(k): _from_lua(v) for k, v in run[b"answer"][b"headers"].items()}
            status = int(headers.pop(":status"))
            answer = Answer(status, headers, run[b"answer"][b"body"])
        return Passed(
            headers={_from_lua(k): _from_lua(v) for k, v in run[b"headers"].items()},
            body=body,
            metadata=self._metadata(),
            answer=answer,
            logs=[_from_lua(line) for line in run[b"logs"].values()],
        )

    def _metadata(self) -> dict[str, dict[str, Any]]:
        return {
            _from_lua(ns): {_from_lua(k): _from_lua(v) for k, v in values.items()}
            for ns, values in self._run[b"metadata"].items()
        }


def authz(**values: object) -> dict[str, dict[str, object]]:
    """Metadata as authz leaves it behind."""
    return {AUTHZ: values}


def chat(**more: object) -> dict[str, dict[str, object]]:
    """Metadata of a metered call of the OpenAI dialect."""
    values: dict[str, object] = {
        "read_body": True,
        "metered": "1",
        "dialect": "openai",
        "endpoint": "/v1/chat/completions",
    }
    return authz(**{**values, **more})


def ollama(**more: object) -> dict[str, dict[str, object]]:
    """Metadata of a metered call of the Ollama dialect."""
    return chat(**{"dialect": "ollama", "endpoint": "/api/chat", **more})
