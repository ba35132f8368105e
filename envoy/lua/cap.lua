-- Request, after the rate limit: holds an answer to the tokens that limits have left for it.
--
-- Runs only where limits are hard: envoy.yaml has the filter disabled, and `parallama up` enables it
-- by `rate_limiting.enforcement`. Every byte but those of a bound stays.

package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local edits_of = require("edits")
local byte, find, sub = string.byte, string.find, string.sub

local AUTHZ, RATELIMIT = "envoy.filters.http.ext_authz", "envoy.filters.http.ratelimit"

local BOUNDS = { max_tokens = true, max_completion_tokens = true, max_output_tokens = true, n_predict = true }
local BOUNDS_OLLAMA = { num_predict = true }
local ANSWERS = { n = true, best_of = true }

-- Of an object at i: leaves no bound above `most`, and has `needed` in it.
local function lower(s, i, bounds, needed, most, edits)
  local there, text = false, string.format("%d", most)
  scan.object(s, i, function(key, from, to)
    if not bounds[key] then return end
    if key == needed then there = true end
    local n = scan.number(s, from, to)
    if n and n > 0 and n <= most then return end
    if sub(s, from, to) == "null" and key ~= needed then return end
    edits:replace(from, to, text)
  end)
  if not there then edits:put(i, needed, nil, text) end
end

local function cap_ollama(s, open, cap, edits)
  local options
  scan.object(s, open, function(key, from, to)
    if key == "options" then options = { from, to } end
  end)
  if options and byte(s, options[1]) == 123 then
    lower(s, options[1], BOUNDS_OLLAMA, "num_predict", cap, edits)
  else -- not there, or null
    edits:put(open, "options", options, string.format('{"num_predict":%d}', cap))
  end
end

-- Several answers share the cap: n or best_of of them, for each prompt.
local function answers(s, open, endpoint)
  local each, prompts = 1, 1
  scan.object(s, open, function(key, from, to)
    if ANSWERS[key] then
      each = math.max(each, scan.number(s, from, to) or 1)
    elseif key == "prompt" and endpoint == "/v1/completions" and byte(s, from) == 91 then
      local count, numbers = 0, true
      scan.array(s, from, function(at)
        count = count + 1
        if not find(sub(s, at, at), "%d") then numbers = false end
      end)
      if not numbers then prompts = math.max(1, count) end
    end
  end)
  return each * prompts
end

local function capped(s, cap, authz)
  local edits, open = edits_of.new(s), scan.space(s, 1)
  if authz.dialect == "ollama" then
    cap_ollama(s, open, cap, edits)
  else
    local most = math.max(1, math.floor(cap / answers(s, open, authz.endpoint)))
    local base = authz.endpoint == "/v1/responses" and "max_output_tokens" or "max_tokens"
    lower(s, open, BOUNDS, base, most, edits)
  end
  return edits:made()
end

function envoy_on_request(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local limits = metadata:get(RATELIMIT)
  local cap = limits and tonumber(limits.cap)
  if not cap then return end
  local authz = metadata:get(AUTHZ)
  local body = handle:body()
  local s = capped(body:getBytes(0, body:length()), cap, authz)
  if s then body:setBytes(s) end
end
