-- Request: writes what the body says at its top level into metadata, or refuses the body.
--
-- For every JSON text that Go, Python or llama.cpp accepts, the facts are the values they would
-- use; where two of them could see different ones, the request is refused. Runs only where authz
-- set `read_body`. The names are those of parallama/contract.py.
--
-- Also makes, in one pass, the edits that the facts are true after: the model that a mapped name
-- means, what the operator makes of parameters, and the wish for the usage of a stream. Every other
-- byte stays.

package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local texts = require("texts")
local edits_of = require("edits")
local shapes = require("shapes")
local byte, find, sub = string.byte, string.find, string.sub

local NS, AUTHZ = "parallama", "envoy.filters.http.ext_authz"
local LONGEST_NAME = 256
local MOST_TOKENS = 1e9
local WORTH_ASKING = 65536 -- no limit is set below this
local LONGEST_KEY = 6 * #"max_completion_tokens" -- that is watched, with all of it escaped
local MOST_MEMBERS = 10000 -- looking at a million keys would stop a worker for half a second

-- Only these exact spellings, and each of them once.
local WATCHED = {
  model = true, stream = true, stream_options = true, options = true, prompt = true, n = true, best_of = true,
  max_tokens = true, max_completion_tokens = true, max_output_tokens = true, n_predict = true,
}
local WATCHED_OLLAMA = setmetatable({ name = true }, { __index = WATCHED })
local WATCHED_KEEPING = setmetatable({ keep_alive = true }, { __index = WATCHED_OLLAMA })
local WATCHED_OPTIONS = { num_predict = true }
local WATCHED_STREAM_OPTIONS = { include_usage = true }

local STREAMS_BY_DEFAULT = { ["/api/chat"] = true, ["/api/generate"] = true }
local GENERATES = {
  ["/api/chat"] = true, ["/api/generate"] = true, ["/v1/chat/completions"] = true,
  ["/v1/completions"] = true, ["/v1/responses"] = true, ["/v1/messages"] = true,
}
local CAN_REPORT_USAGE = { ["/v1/chat/completions"] = true, ["/v1/completions"] = true }

local function refuse(status, code, message)
  error({ status = status, code = code, message = message }, 0)
end

-- The key as Go's encoding/json compares it: without case, and with the two letters beyond ASCII
-- that fold into it (U+017F, U+212A).
local function folded(raw)
  if #raw > LONGEST_KEY then return raw end
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

local function is_null(s, span)
  return span[2] - span[1] == 3 and text(s, span) == "null"
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
  if not span or is_null(s, span) then return nil end
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

-- The options of a call of Ollama's dialect: their members, and put(name, span, text), which edits them.
local function options_of(s, open, span, shape, edits)
  if span and not is_null(s, span) then
    if byte(s, span[1]) ~= 123 then refuse("400", "invalid_value", '"options" must be an object') end
    local watched = shape and shape.options and setmetatable({ num_predict = true }, { __index = shape.options })
    return (members(s, span[1], watched or WATCHED_OPTIONS)), function(name, at, value)
      edits:put(span[1], name, at, value)
    end
  end
  local new = {}
  return {}, function(name, _, value)
    new[#new + 1] = '"' .. name .. '":' .. value
  end, function()
    if #new > 0 then edits:put(open, "options", span, "{" .. table.concat(new, ",") .. "}") end
  end
end

-- The most tokens the model may write, after what the operator makes of it; nil where there is no
-- bound that counts.
--
-- A bound counts only if every server honours its name at this endpoint: Ollama ignores
-- max_completion_tokens, and llama.cpp prefers its own n_predict. The other names can raise the
-- bound, not set it. Zero and negative numbers mean "no bound" to at least one server.
local function most_tokens(s, at, endpoint, base, shape, put, told)
  local bounds = {}
  for _, key in ipairs(shapes.BOUNDS) do
    bounds[key] = integer(s, at[key], key)
  end
  if shape and GENERATES[endpoint] then
    shapes.max_tokens(shape, bounds, base, function(key, value) put(key, at[key], value) end, told)
  end
  local most = bounds[base]
  for _, n in pairs(bounds) do
    if n <= 0 then return nil end
    most = most and math.max(most, n)
  end
  return most
end

-- The same for a call as it stands, with all else that the operator makes of its parameters.
local function shaped(s, open, at, authz, shape, edits, told)
  if authz.dialect == "ollama" then
    local options, put, done = options_of(s, open, at.options, shape, edits)
    local most = most_tokens(s, options, authz.endpoint, "num_predict", shape, put, told)
    if shape then
      shapes.options(s, shape, options, put, told)
      if done then done() end
      shapes.keep_alive(s, shape, open, at.keep_alive, edits, told)
    end
    return most
  end
  local each = answers(s, at, authz.endpoint)
  local base = authz.endpoint == "/v1/responses" and "max_output_tokens" or "max_tokens"
  local most = most_tokens(s, at, authz.endpoint, base, shape, function(key, span, value)
    edits:put(open, key, span, value)
  end, told)
  return most and most * each
end

-- What is meant by a name that a client may use: see parallama/mappings.py.
local function meant(aliases, name)
  local plain = name:lower():gsub(":latest$", "")
  if plain == "" and name ~= "" then return nil end
  local _, before = find(aliases, "\n" .. plain .. "\t", 1, true)
  return before and sub(aliases, before + 1, find(aliases, "\n", before, true) - 1)
end

-- The smallest edit that makes a stream report its usage. Returns whether there is one to make:
-- none if the client asked for usage already.
local function ask_for_usage(s, open, span, edits)
  if not span or is_null(s, span) then
    edits:put(open, "stream_options", span, '{"include_usage":true}')
    return true
  end
  if byte(s, span[1]) ~= 123 then refuse("400", "invalid_value", '"stream_options" must be an object') end
  local asked = members(s, span[1], WATCHED_STREAM_OPTIONS).include_usage
  if asked and bool(s, asked, "include_usage") then return false end
  edits:put(span[1], "include_usage", asked, "true")
  return true
end

-- All facts of the body s, ready to be written, and the body as it goes on (nil: as it is).
local function facts(s, authz)
  local ollama, endpoint = authz.dialect == "ollama", authz.endpoint
  local edits, told = edits_of.new(s), {}
  local open = scan.space(s, 1)
  local shape = authz.shape and shapes.of(authz.shape)
  local keeping = shape and shape.rules.keep_alive
  local watched = ollama and (keeping and WATCHED_KEEPING or WATCHED_OLLAMA) or WATCHED
  local at, last = members(s, open, watched)
  if scan.space(s, last + 1) <= #s then refuse("400", "invalid_json", "the request body goes on after its JSON object") end

  local model = model_name(s, at.model, "model")
  if ollama then
    local name = model_name(s, at.name, "name")
    if model and name and model ~= name then
      refuse("400", "ambiguous_key", 'the request body names two models, in "model" and in "name"')
    end
    model = model or name
  end
  local out = { model = model, body_bytes = string.format("%d", #s) }
  local target = authz.aliases and (model or authz.metered) and meant(authz.aliases, model or "")
  if target then
    local written = '"' .. target:gsub('[\\"]', "\\%0") .. '"'
    out.model, out.requested_model = target, model
    if at.model or not model then edits:put(open, "model", at.model, written) end
    if ollama and at.name then edits:put(open, "name", at.name, written) end
  end
  if authz.metered and not out.model then refuse("400", "model_required", "model is required") end

  out.stream = bool(s, at.stream, "stream")
  if out.stream == nil then out.stream = ollama and STREAMS_BY_DEFAULT[endpoint] or false end

  local most = shaped(s, open, at, authz, shape, edits, told)
  if most then out.max_tokens = string.format("%d", math.min(most, MOST_TOKENS)) end
  if #told > 0 then out.changed = table.concat(told, ", ") end

  if out.stream and authz.metered and authz.dialect == "openai" and CAN_REPORT_USAGE[endpoint] then
    out.stream_usage = ask_for_usage(s, open, at.stream_options, edits) and "ours" or "client"
  end
  return out, edits:made()
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
  elseif authz.dialect == "anthropic" then
    local kind = trouble.status == "500" and "api_error" or "invalid_request_error"
    body = '{"type":"error","error":{"type":"' .. kind .. '","message":' .. quoted(trouble.message)
      .. '},"request_id":' .. quoted(handle:headers():get("x-request-id") or "") .. "}"
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
  -- Both are read from our copy. In the metadata they would go into every line of the trail.
  if authz.aliases then metadata:set(AUTHZ, "aliases", "") end
  if authz.shape then metadata:set(AUTHZ, "shape", "") end

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
  local ok, out, edited = pcall(facts, s, authz)
  if not ok then
    if type(out) == "string" and not SENTENCES[out] then handle:logErr("facts.lua: " .. out) end
    return respond(handle, authz, refusal(out))
  end
  metadata = handle:streamInfo():dynamicMetadata() -- the one from before body() is out of scope
  for key, value in pairs(out) do
    metadata:set(NS, key, value)
  end
  if authz.count_text then texts.pass_request(handle, s) end
  if edited then body:setBytes(edited) end
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
