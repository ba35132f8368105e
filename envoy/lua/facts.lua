-- Request: writes what the body says at its top level into metadata, or refuses the body.
--
-- For every JSON text that Go, Python or llama.cpp accepts, the facts are the values they would
-- use; where two of them could see different ones, the request is refused. Runs only where authz
-- set `read_body`. The names are those of parallama/contract.py.

package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local texts = require("texts")
local byte, find, sub = string.byte, string.find, string.sub

local NS, AUTHZ = "parallama", "envoy.filters.http.ext_authz"
local LONGEST_NAME = 256
local MOST_TOKENS = 1e9
local WORTH_ASKING = 65536 -- no limit is set below this
local MOST_MEMBERS = 10000 -- looking at a million keys would stop a worker for half a second

-- Only these exact spellings, and each of them once.
local WATCHED = {
  model = true, stream = true, stream_options = true, options = true, prompt = true, n = true, best_of = true,
  max_tokens = true, max_completion_tokens = true, max_output_tokens = true, n_predict = true,
}
local WATCHED_OLLAMA = setmetatable({ name = true }, { __index = WATCHED })
local WATCHED_OPTIONS = { num_predict = true }
local WATCHED_STREAM_OPTIONS = { include_usage = true }

local STREAMS_BY_DEFAULT = { ["/api/chat"] = true, ["/api/generate"] = true }
local CAN_REPORT_USAGE = { ["/v1/chat/completions"] = true, ["/v1/completions"] = true }

local function refuse(status, code, message)
  error({ status = status, code = code, message = message }, 0)
end

-- The key as Go's encoding/json compares it: without case, and with the two letters beyond ASCII
-- that fold into it (U+017F, U+212A).
local function folded(raw)
  if not find(raw, "[\\\128-\255]") then return raw:lower() end
  local key = scan.decode(raw)
  if not key then refuse("400", "invalid_json", "the request body has a key with an invalid escape") end
  return (key:gsub("\197\191", "s"):gsub("\226\132\170", "k"):lower())
end

-- Where the watched members of the object at i are: {key = {from, to}}, and its closing brace.
local function members(s, i, watched)
  local at, seen = {}, 0
  local last = scan.object(s, i, function(raw, from, to)
    seen = seen + 1
    if seen > MOST_MEMBERS then refuse("400", "invalid_json", "the request body has too many members") end
    if watched[raw] then
      if at[raw] then
        refuse("400", "duplicate_key", 'the request body names "' .. raw .. '" more than once')
      end
      at[raw] = { from, to }
    else
      local key = folded(raw)
      if watched[key] then
        refuse("400", "ambiguous_key", 'the request body spells "' .. key .. '" in another way; write it exactly so')
      end
    end
  end)
  return at, last
end

local function text(s, span)
  return span and sub(s, span[1], span[2])
end

local function model_name(s, span, key)
  if not span then return nil end
  local from, to = span[1], span[2]
  local name
  if byte(s, from) == 34 and to - from <= 6 * LONGEST_NAME + 1 then name = scan.decode(sub(s, from + 1, to - 1)) end
  if not name or name == "" or #name > LONGEST_NAME or not scan.is_plain_text(name) then
    refuse("400", "invalid_model", '"' .. key .. '" must be a non-empty string of at most '
      .. LONGEST_NAME .. " bytes, without control characters")
  end
  return name
end

local function bool(s, span, key)
  local word = text(s, span)
  if word == nil or word == "null" then return nil end
  if word ~= "true" and word ~= "false" then
    refuse("400", "invalid_value", '"' .. key .. '" must be true or false')
  end
  return word == "true"
end

local function integer(s, span, key)
  if not span or text(s, span) == "null" then return nil end
  local n = scan.number(s, span[1], span[2])
  if not n or n ~= math.floor(n) then refuse("400", "invalid_value", '"' .. key .. '" must be an integer') end
  return n
end

-- How many answers are asked for: n or best_of, times the prompts in an array of prompts.
local function answers(s, at, endpoint)
  local each = math.max(1, integer(s, at.n, "n") or 1, integer(s, at.best_of, "best_of") or 1)
  local prompts = 0
  if endpoint == "/v1/completions" and at.prompt and byte(s, at.prompt[1]) == 91 then
    local tokens_only = true
    scan.array(s, at.prompt[1], function(from)
      prompts = prompts + 1
      local c = byte(s, from)
      if c < 48 or c > 57 then tokens_only = false end
    end)
    if tokens_only then prompts = 1 end
  end
  return each * math.max(1, prompts)
end

-- The most tokens the model may write, or nil where the client sets no bound that counts.
--
-- A bound counts only if every server honours its name at this endpoint: Ollama ignores
-- max_completion_tokens, and llama.cpp prefers its own n_predict. The other names can raise the
-- bound, not set it. Zero and negative numbers mean "no bound" to at least one server.
local function most_tokens(s, at, ollama, endpoint)
  if ollama then
    local span = at.options
    if not span or text(s, span) == "null" then return nil end
    if byte(s, span[1]) ~= 123 then refuse("400", "invalid_value", '"options" must be an object') end
    local n = integer(s, members(s, span[1], WATCHED_OPTIONS).num_predict, "num_predict")
    return n and n > 0 and n or nil
  end
  local base = endpoint == "/v1/responses" and "max_output_tokens" or "max_tokens"
  local most, unbounded = 0, false
  for _, key in ipairs({ "max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict" }) do
    local n = integer(s, at[key], key)
    if n then
      if n <= 0 then unbounded = true end
      most = math.max(most, n)
    end
    if key == base and not n then unbounded = true end
  end
  most = most * answers(s, at, endpoint)
  return not unbounded and most or nil
end

-- The smallest edit that makes a stream report its usage: where, how many bytes it replaces, what
-- it puts there. Nothing if the client asked for usage already.
local function usage_edit(s, open, span)
  if not span then return open, 0, '"stream_options":{"include_usage":true},' end
  local from, to = span[1], span[2]
  if sub(s, from, to) == "null" then return from - 1, 4, '{"include_usage":true}' end
  if byte(s, from) ~= 123 then refuse("400", "invalid_value", '"stream_options" must be an object') end
  local asked = members(s, from, WATCHED_STREAM_OPTIONS).include_usage
  if not asked then
    local _, c = scan.space(s, from + 1)
    return from, 0, c == 125 and '"include_usage":true' or '"include_usage":true,'
  end
  if bool(s, asked, "include_usage") then return nil end
  return asked[1] - 1, asked[2] - asked[1] + 1, "true"
end

-- All facts of the body s, ready to be written.
local function facts(s, authz)
  local ollama, endpoint = authz.dialect == "ollama", authz.endpoint
  local open = scan.space(s, 1)
  local at, last = members(s, open, ollama and WATCHED_OLLAMA or WATCHED)
  if scan.space(s, last + 1) <= #s then refuse("400", "invalid_json", "the request body goes on after its JSON object") end

  local model = model_name(s, at.model, "model")
  if ollama then
    local name = model_name(s, at.name, "name")
    if model and name and model ~= name then
      refuse("400", "ambiguous_key", 'the request body names two models, in "model" and in "name"')
    end
    model = model or name
  end
  if authz.metered and not model then refuse("400", "model_required", "model is required") end

  local stream = bool(s, at.stream, "stream")
  if stream == nil then stream = ollama and STREAMS_BY_DEFAULT[endpoint] or false end

  local out = { model = model, stream = stream, body_bytes = string.format("%d", #s) }
  local most = most_tokens(s, at, ollama, endpoint)
  if most then out.max_tokens = string.format("%d", math.min(most, MOST_TOKENS)) end

  if stream and authz.metered and not ollama and CAN_REPORT_USAGE[endpoint] then
    local offset, replaced, words = usage_edit(s, open, at.stream_options)
    out.stream_usage = offset and "ours" or "client"
    if offset then
      out.splice_at = string.format("%d:%d", offset, replaced)
      out.splice_text = words
    end
  end
  return out
end

local SENTENCES = {
  ["not an object"] = "the request body must be one JSON object in UTF-8",
  ["truncated"] = "the request body ends before its JSON object does",
  ["malformed"] = "the request body is not valid JSON",
}

-- What to answer when reading the body failed. Our own mistakes refuse, too: nothing passes unread.
local function refusal(trouble)
  if type(trouble) == "table" then return trouble end
  local sentence = SENTENCES[trouble]
  if sentence then return { status = "400", code = "invalid_json", message = sentence } end
  return { status = "500", code = "internal_error", message = "the gateway could not read the request body" }
end

local function quoted(message)
  return '"' .. message:gsub('"', '\\"') .. '"'
end

local function respond(handle, authz, trouble)
  local body
  if authz.dialect == "ollama" then
    body = '{"error":' .. quoted(trouble.message) .. "}"
  else
    local kind = trouble.status == "500" and "server_error" or "invalid_request_error"
    body = '{"error":{"message":' .. quoted(trouble.message) .. ',"type":"' .. kind
      .. '","param":null,"code":"' .. trouble.code .. '"}}'
  end
  handle:respond({ [":status"] = trouble.status, ["content-type"] = "application/json" }, body)
end

local function read(handle, authz)
  local metadata = handle:streamInfo():dynamicMetadata()
  if authz.metered then metadata:set(NS, "total_tokens", 0) end
  if authz.read_body ~= true then return end

  local headers = handle:headers()
  local encoding = headers:get("content-encoding")
  if encoding and encoding ~= "" and encoding:lower() ~= "identity" then
    return respond(handle, authz, {
      status = "415", code = "unsupported_encoding", message = "send the request body uncompressed, without content-encoding",
    })
  end
  -- Waiting for more than Envoy may hold could wait for ever: where identity took long, reading has stopped by now.
  local announced = tonumber(headers:get("content-length") or nil)
  if announced and announced > WORTH_ASKING and announced > (handle:filterContext():get("max_body_bytes") or announced) then
    return respond(handle, authz, { status = "413", code = "request_too_large", message = "the request body is too large" })
  end
  -- What was read as UTF-8 JSON is sent on as that: another type or charset could make it mean something else.
  if headers:get("content-type") ~= "application/json" then headers:replace("content-type", "application/json") end

  local body = handle:body()
  local length = body and body:length() or 0
  if length == 0 then
    return respond(handle, authz, { status = "400", code = "missing_body", message = "missing request body" })
  end
  local s = body:getBytes(0, length)
  local ok, out = pcall(facts, s, authz)
  if not ok then
    if type(out) == "string" and not SENTENCES[out] then handle:logErr("facts.lua: " .. out) end
    return respond(handle, authz, refusal(out))
  end
  metadata = handle:streamInfo():dynamicMetadata() -- the one from before body() is out of scope
  for key, value in pairs(out) do
    metadata:set(NS, key, value)
  end
  if authz.count_text then texts.pass_request(handle, s) end
end

-- Envoy lets a request pass whose filter fails; ours must not.
function envoy_on_request(handle)
  local authz = handle:streamInfo():dynamicMetadata():get(AUTHZ)
  if not authz then return end
  local ok, trouble = pcall(read, handle, authz)
  if not ok then
    handle:logErr("facts.lua: " .. tostring(trouble))
    respond(handle, authz, refusal(trouble))
  end
end
