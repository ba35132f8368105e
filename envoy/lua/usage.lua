-- Response: counts tokens as the answer passes, takes the numbers that the upstream reports, and puts
-- the name of a model back that the client asked for.
--
-- Runs only where facts.lua set `total_tokens`, which it does where authz set `metered`. Holds no
-- stream back, but for a line that may have to change: the usage event which only facts.lua asked for,
-- and, where a name is mapped, any line with an object in it.
--
-- tally.lua keeps the numbers, streams.lua knows what lines say, follow.lua passes the bytes on,
-- alike.lua makes that cheap, and names.lua changes names.

jit.off(true, true) -- most of what a chunk does are calls of Envoy's, between which compiled code is slower
package.path = "envoy/lua/?.lua;" .. package.path
local tally_of = require("tally")
local streams = require("streams")
local follow = require("follow")
local names_of = require("names")
local texts = require("texts")
local byte = string.byte

local NS, AUTHZ = "parallama", "envoy.filters.http.ext_authz"

-- A chunk leaves a kilobyte or two behind, and little lives for longer: collecting that seldom makes
-- chunks cheaper. What is large is collected at once: see follow.lua.
collectgarbage("setpause", 1000)

local KINDS = {
  ["application/json"] = "json", ["text/event-stream"] = "sse", ["application/x-ndjson"] = "ndjson",
}
local FORMS = { ["/v1/responses"] = streams.responses, ["/v1/messages"] = streams.messages }

-- OpenAI's dialect, Anthropic's and Ollama's tell their numbers under names of their own.
local function read(tally, s)
  local at = tally_of.top(s)
  if not at then return end
  tally:model(s, at.model)
  if at.usage or at.timings then
    local usage = tally_of.inner(s, at.usage)
    if usage.cache_read_input_tokens or usage.cache_creation_input_tokens then
      tally:anthropic(s, at.usage)
    else
      tally:openai(s, at.usage, at.timings)
    end
  elseif at.prompt_eval_count or at.eval_count or at.done then
    tally:ollama(s, at, streams.has_text(s, streams.ollama.keys))
  end
  if tally_of.is_set(s, at.error) then tally:fail() end
  tally:finish()
end

local function stream(handle, headers, tally, facts, names, kind, endpoint)
  if headers:get("content-encoding") then return end -- there is nothing to read
  local form = streams.ollama
  if kind == "sse" then
    tally.hides = facts.stream_usage == "ours"
    form = streams.chat
    if not facts.stream_usage then form = FORMS[endpoint()] or form end -- there nobody can ask for usage
  end
  -- HTTP/1's chunks, or its end by close: only there an empty chunk is sure to be the end.
  local open = headers:get("transfer-encoding")
  if not open and not headers:get("content-length") then open = headers:get("connection") end
  if tally.hides or names then headers:remove("content-length") end
  follow.stream(handle, tally, form, names, open ~= nil)
  if not tally.reported and tally.counted > 0 then tally:note("completion_tokens", tally.counted) end
end

local function json(handle, headers, tally, facts, names, endpoint)
  local change
  if names then
    headers:remove("content-length")
    change = function(s)
      local at, models = tally_of.top(s)
      return at and names:put(s, at, models)
    end
  end
  local text, size = follow.whole(handle, change)
  read(tally, text)
  if not tally.reported and not tally.failed and size > 0 then
    tally:estimate(tonumber(facts.body_bytes) or 0, size, endpoint())
    if tally.text then tally.text:add(text) end
  end
end

local function refused(handle, headers, names)
  headers:remove("content-length")
  follow.whole(handle, function(s)
    return names:put_in_error(s)
  end)
end

function envoy_on_response(handle)
  local facts = handle:streamInfo():dynamicMetadata():get(NS)
  if not facts or not facts.total_tokens then return end
  local headers = handle:headers()
  local kind = headers:get("content-type") or ""
  kind = KINDS[kind] or KINDS[kind:lower():match("^[^; ]*")]
  local good = byte(headers:get(":status") or "", 1) == 50 -- 2xx
  local names = facts.requested_model and names_of.new(facts.requested_model, facts.model)
  local authz
  local function endpoint()
    authz = authz or handle:streamInfo():dynamicMetadata():get(AUTHZ)
    return authz.endpoint
  end

  local tally = tally_of.new(handle)
  if facts.text_counted then
    endpoint()
    tally.text = texts.answer(handle, authz, kind ~= "json")
  end
  if not good and names and kind == "json" then refused(handle, headers, names) end
  if not good or not kind then return tally:drop_text() end

  if kind == "json" then
    json(handle, headers, tally, facts, names, endpoint)
  else
    stream(handle, headers, tally, facts, names, kind, endpoint)
  end
  if tally.counted == 0 and not tally.estimated then tally:drop_text() end
  tally:publish()
end
