-- Request, after the rate limit: makes the edits that are needed, every other byte stays.
--
-- Two there are: facts.lua found where a stream is asked to report its usage, and where limits are
-- hard the rate limit says how many tokens the answer may have.

package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local byte, find, sub = string.byte, string.find, string.sub

local NS, AUTHZ, RATELIMIT = "parallama", "envoy.filters.http.ext_authz", "envoy.filters.http.ratelimit"

local BOUNDS = { max_tokens = true, max_completion_tokens = true, max_output_tokens = true, n_predict = true }
local BOUNDS_OLLAMA = { num_predict = true }
local ANSWERS = { n = true, best_of = true }

-- Of an object at i: the edits that leave no bound above `most`, and whether `needed` is in it.
local function lowered(s, i, bounds, needed, most, edits)
  local there = false
  scan.object(s, i, function(key, from, to)
    if not bounds[key] then return end
    if key == needed then there = true end
    local n = scan.number(s, from, to)
    if n and n > 0 and n <= most then return end
    if sub(s, from, to) == "null" and key ~= needed then return end
    edits[#edits + 1] = { from - 1, to - from + 1, string.format("%d", most) }
  end)
  return there
end

-- Puts `text` in front of the first member of the object at i.
local function insert(s, i, text, edits)
  local _, c = scan.space(s, i + 1)
  edits[#edits + 1] = { i, 0, c == 125 and text or text .. "," }
end

-- The edits that hold an answer to `cap` tokens.
local function capped(s, cap, authz, edits)
  local open = scan.space(s, 1)
  if authz.dialect == "ollama" then
    local options
    scan.object(s, open, function(key, from, to)
      if key == "options" then options = { from, to } end
    end)
    if not options then
      insert(s, open, string.format('"options":{"num_predict":%d}', cap), edits)
    elseif byte(s, options[1]) ~= 123 then -- null
      edits[#edits + 1] = { options[1] - 1, options[2] - options[1] + 1, string.format('{"num_predict":%d}', cap) }
    elseif not lowered(s, options[1], BOUNDS_OLLAMA, "num_predict", cap, edits) then
      insert(s, options[1], string.format('"num_predict":%d', cap), edits)
    end
    return
  end
  -- Several answers share the cap: n or best_of of them, for each prompt.
  local answers, prompts = 1, 1
  scan.object(s, open, function(key, from, to)
    if ANSWERS[key] then
      answers = math.max(answers, scan.number(s, from, to) or 1)
    elseif key == "prompt" and authz.endpoint == "/v1/completions" and byte(s, from) == 91 then
      local count, numbers = 0, true
      scan.array(s, from, function(at)
        count = count + 1
        if not find(sub(s, at, at), "%d") then numbers = false end
      end)
      if not numbers then prompts = math.max(1, count) end
    end
  end)
  local most = math.max(1, math.floor(cap / (answers * prompts)))
  local base = authz.endpoint == "/v1/responses" and "max_output_tokens" or "max_tokens"
  if not lowered(s, open, BOUNDS, base, most, edits) then
    insert(s, open, string.format('"%s":%d', base, most), edits)
  end
end

local function apply(s, edits)
  -- From the end, so that no edit moves another; of two at one place the first goes before the second.
  table.sort(edits, function(a, b)
    return a[1] > b[1]
  end)
  for _, edit in ipairs(edits) do
    s = sub(s, 1, edit[1]) .. edit[3] .. sub(s, edit[1] + edit[2] + 1)
  end
  return s
end

function envoy_on_request(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local facts, limits = metadata:get(NS), metadata:get(RATELIMIT)
  local splice = facts and facts.splice_at
  local cap = limits and tonumber(limits.cap)
  if not splice and not cap then return end
  local authz = metadata:get(AUTHZ)
  local body = handle:body()
  local s = body:getBytes(0, body:length())
  local edits = {}
  if splice then
    local offset, replaced = splice:match("^(%d+):(%d+)$")
    edits[1] = { tonumber(offset), tonumber(replaced), facts.splice_text }
  end
  if cap then capped(s, cap, authz, edits) end
  body:setBytes(apply(s, edits))
end
