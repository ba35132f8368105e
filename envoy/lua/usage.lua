-- Response: counts tokens as the answer passes, and takes the numbers that the upstream reports.
--
-- Runs only where authz set `metered`. Never holds a stream back, except for the line that may be
-- the usage event which only splice.lua asked for. Metadata is true after every chunk, because an
-- abandoned stream is charged with what it says then. In the steady state a chunk costs one set().

package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local texts = require("texts")
local byte, find, sub, concat = string.byte, string.find, string.sub, table.concat

local NS, AUTHZ = "parallama", "envoy.filters.http.ext_authz"
local MOST_TOKENS = 1e9
local LONGEST_NAME = 256
local LONGEST_ANSWER = 16 * 1024 * 1024 -- of a JSON answer, and of one line in a stream
local BYTES_PER_TOKEN = 4 -- a common average; what it leads to is marked as an estimate
local MOST_TRIES = 64 -- at judging one line before its end is here

local SSE_TEXT = { '"content"', '"reasoning_content"', '"reasoning"', '"text"', '"tool_calls"' }
local OLLAMA_TEXT = { '"content"', '"thinking"', '"response"', '"tool_calls"' }

-- Does a member with one of these keys hold text, or an array with something in it? Quotes inside
-- JSON strings are escaped and only a key is followed by a colon, so no answer's text looks so.
local function has_text(line, keys)
  for k = 1, #keys do
    local key = keys[k]
    local _, e = find(line, key, 1, true)
    while e do
      local i, c = scan.space(line, e + 1)
      if c == 58 then
        i, c = scan.space(line, i + 1)
        if c == 34 then
          if byte(line, i + 1) ~= 34 then return true end
        elseif c == 91 and key == '"tool_calls"' then
          i, c = scan.space(line, i + 1)
          if c ~= 93 then return true end
        end
      end
      _, e = find(line, key, e + 1, true)
    end
  end
  return false
end

-- The top level of a JSON text as {key = {from, to}} (the last of equal keys), or nil if it is not one whole object.
local function top(s)
  local at = {}
  local ok = pcall(scan.whole, s, function(key, from, to)
    at[key] = { from, to }
  end)
  return ok and at or nil
end

local function inner(s, span)
  local at = {}
  if span and byte(s, span[1]) == 123 then
    pcall(scan.object, s, span[1], function(key, from, to)
      at[key] = { from, to }
    end)
  end
  return at
end

local function number(s, span)
  return span and scan.number(s, span[1], span[2])
end

local function tokens(s, span)
  local n = number(s, span)
  return n and n >= 0 and n <= MOST_TOKENS and n == math.floor(n) and n or nil
end

local function is_true(s, span)
  return span ~= nil and sub(s, span[1], span[2]) == "true"
end

local function is_set(s, span)
  return span ~= nil and sub(s, span[1], span[2]) ~= "null"
end

-- What is known so far. `news` is what the next publish() writes beside the running total; `text`
-- is there where usage_sink is to count it, as long as the upstream reports nothing.
local Tally = {}
Tally.__index = Tally

local function new_tally(handle)
  return setmetatable({ handle = handle, total = 0, counted = 0, changed = false, news = nil }, Tally)
end

function Tally:note(key, value)
  self.news = self.news or {}
  self.news[key] = value
end

-- One more token was delivered.
function Tally:count()
  self.counted = self.counted + 1
  self.total = self.total + 1
  self.changed = true
  if not self.seen_text then
    self.seen_text = true
    self:note("first_token_at", self.handle:timestamp())
    self:note("usage_source", "counted")
  end
  if self.reported then -- text after a report that was not the last word
    self.completion = self.completion + 1
    self:note("completion_tokens", self.completion)
    self:note("usage_source", "counted")
  end
end

-- A count that the upstream reports. One that cannot be is left out, and that is noted.
function Tally:tokens(s, span)
  local n = tokens(s, span)
  if not n and is_set(s, span) then self:note("usage_odd", true) end
  return n
end

-- The upstream's own numbers; nil is what it did not say. A completion it does not name is what was counted.
function Tally:report(prompt, completion, cached, total)
  if not prompt and not completion then return end
  local source = "reported"
  if not completion then
    if self.counted > 0 then source = "counted" end
    completion = self.reported and self.completion or self.counted
  end
  self:drop_text()
  local sum = (prompt or 0) + completion
  if sum > MOST_TOKENS then self:note("usage_odd", true) end
  self.reported, self.completion = true, completion
  self.total = math.min(total and total > sum and total or sum, MOST_TOKENS)
  self.changed = true
  if prompt then
    self:note("prompt_tokens", prompt)
    self:note("prompt_reported", string.format("%d", prompt))
  end
  if cached then self:note("cached_tokens", cached) end
  self:note("completion_tokens", completion)
  self:note("usage_source", source)
end

function Tally:drop_text()
  if self.text then self.text:drop() end
  self.text = nil
end

function Tally:work(a, b)
  local ms = (a or 0) + (b or 0)
  if (a or b) and ms >= 0 and ms <= MOST_TOKENS then self:note("compute_ms", ms) end
end

function Tally:model(s, span)
  if self.named or not span or byte(s, span[1]) ~= 34 or span[2] - span[1] > 6 * LONGEST_NAME then return end
  local name = scan.decode(sub(s, span[1] + 1, span[2] - 1))
  if name and name ~= "" and #name <= LONGEST_NAME and scan.is_plain_text(name) then
    self.named = true
    self:note("response_model", name)
  end
end

function Tally:publish()
  if self.text then self.text:publish() end
  if not self.changed and not self.news then return end
  local metadata = self.handle:streamInfo():dynamicMetadata() -- fetched anew: a yield ends its scope
  if self.changed then metadata:set(NS, "total_tokens", self.total) end
  if self.news then
    for key, value in pairs(self.news) do
      metadata:set(NS, key, value)
    end
  end
  self.changed, self.news = false, nil
end

-- OpenAI's `usage`, and llama.cpp's `timings` where there is none.
function Tally:openai(s, at)
  local usage, timings = inner(s, at.usage), inner(s, at.timings)
  local prompt, completion = self:tokens(s, usage.prompt_tokens), self:tokens(s, usage.completion_tokens)
  if prompt or completion then
    local details = inner(s, usage.prompt_tokens_details)
    self:report(prompt, completion, self:tokens(s, details.cached_tokens), self:tokens(s, usage.total_tokens))
  else
    local cached, fresh = self:tokens(s, timings.cache_n), self:tokens(s, timings.prompt_n)
    self:report(fresh and fresh + (cached or 0), self:tokens(s, timings.predicted_n), cached)
  end
  self:work(number(s, timings.prompt_ms), number(s, timings.predicted_ms))
end

-- The last line of an Ollama stream, or its whole answer. It leaves out what is zero, which no text is.
function Tally:ollama(s, at)
  local prompt, completion = self:tokens(s, at.prompt_eval_count), self:tokens(s, at.eval_count)
  if prompt or completion or (self.counted == 0 and not has_text(s, OLLAMA_TEXT)) then
    self:report(prompt or 0, completion or self.counted == 0 and 0 or nil)
  end
  local prompt_ns, eval_ns = number(s, at.prompt_eval_duration), number(s, at.eval_duration)
  self:work(prompt_ns and prompt_ns / 1e6, eval_ns and eval_ns / 1e6)
end

-- Takes one line of an event stream. True if it is an event that reports usage and nothing else.
function Tally:sse_line(line)
  if byte(line, #line) == 13 then line = sub(line, 1, -2) end
  if line == "" then return false end
  if sub(line, 1, 5) ~= "data:" then
    if sub(line, 1, 6) == "error:" or line == "event: error" or line == "event:error" then
      self:note("upstream_error", true)
    end
    return false
  end
  local i, c = scan.space(line, 6)
  if c ~= 123 then
    if sub(line, i, i + 5) == "[DONE]" then self:note("finished", true) end
    return false
  end

  if self.text then self.text:add(line) end
  local text = has_text(line, SSE_TEXT)
  if text then self:count() end
  if text and self.named then
    -- The usual event: only a usage object in it would be news.
    local _, e = find(line, '"usage"', 1, true)
    if not e then return false end
    i, c = scan.space(line, e + 1)
    if c == 58 then
      i, c = scan.space(line, i + 1)
      if c == 110 and not find(line, '"usage"', i, true) then return false end
    end
  end

  local s = sub(line, 6)
  local at = top(s)
  if not at then return false end
  self:model(s, at.model)
  self.named = true -- only the first event is asked
  if is_set(s, at.error) then self:note("upstream_error", true) end
  if at.usage or at.timings then self:openai(s, at) end
  local no_choices = at.choices and find(sub(s, at.choices[1], at.choices[2]), "^%[[ \t]*%]$") ~= nil
  return no_choices and at.usage ~= nil and byte(s, at.usage[1]) == 123 or false
end

-- Takes one line of an Ollama stream.
function Tally:ndjson_line(line)
  if self.text then self.text:add(line) end
  local ends = find(line, "true", 1, true) -- or else it cannot say that it is done
  local fails = find(line, '"error"', 1, true)
  if not ends and not fails and self.named then
    if has_text(line, OLLAMA_TEXT) then self:count() end
    return false
  end
  local at = top(line)
  if not at then return false end
  self:model(line, at.model)
  self.named = true
  if is_set(line, at.error) then
    self:note("upstream_error", true)
  elseif is_true(line, at.done) then
    self:ollama(line, at)
    self:note("finished", true)
  elseif has_text(line, OLLAMA_TEXT) then
    self:count()
  end
  return false
end

-- Nobody said what this answer cost, so it is charged by its size; a vector costs its prompt alone.
function Tally:estimate(request_bytes, answer_bytes, endpoint)
  local prompt = math.ceil(request_bytes / BYTES_PER_TOKEN)
  local completion = find(endpoint, "/embed", 1, true) and 0 or math.ceil(answer_bytes / BYTES_PER_TOKEN)
  self.total, self.changed = math.min(prompt + completion, MOST_TOKENS), true
  self:note("prompt_tokens", prompt)
  self:note("completion_tokens", completion)
  self:note("usage_source", "estimated")
  self.estimated = true
end

function Tally:json(s)
  local at = top(s)
  if not at then return end
  self:model(s, at.model)
  if at.usage or at.timings then
    self:openai(s, at)
  elseif at.prompt_eval_count or at.eval_count or at.done then
    self:ollama(s, at)
  end
  self.failed = is_set(s, at.error)
  if self.failed then self:note("upstream_error", true) end
  self:note("finished", true)
end

-- Gives each line of the stream to take() as soon as its end is here. The chunks pass untouched.
local function follow(handle, tally, take)
  local pieces, size = {}, 0 -- of the line whose end is still to come
  for chunk in handle:bodyChunks() do
    local s = chunk:getBytes(0, chunk:length())
    local i, nl = 1, find(s, "\n", 1, true)
    while nl do
      local line = sub(s, i, nl - 1)
      if size > 0 then
        pieces[#pieces + 1] = line
        line = concat(pieces)
        pieces, size = {}, 0
      end
      take(tally, line)
      i = nl + 1
      nl = find(s, "\n", i, true)
    end
    if i <= #s then
      if size > LONGEST_ANSWER then pieces = {} end -- no line that matters
      pieces[#pieces + 1] = sub(s, i)
      size = size + #s - i + 1
    end
    tally:publish()
  end
  if size > 0 then take(tally, concat(pieces)) end
end

-- Can a line that begins with this be an event with a JSON object?
local function may_be_event(start)
  if #start <= 5 then return sub("data:", 1, #start) == start end
  if sub(start, 1, 5) ~= "data:" then return false end
  local _, c = scan.space(start, 6)
  return c == 123 or c == nil
end

-- Passes over the line ends from i on, `left` of them; the result is what follows, and how many are still to come.
local function line_ends(s, i, left)
  while left > 0 do
    local c = byte(s, i)
    if not c then return i, left end
    if c == 10 then
      left = left - 1
    elseif c ~= 13 then
      return i, 0
    end
    i = i + 1
  end
  return i, 0
end

-- As follow(), but events for which take() is true are cut out, with the blank line that ends them.
-- So a line that may be one is held back until it is complete: until its end is here, or until its
-- JSON object is, since the last line of a stream may have no end.
local function follow_and_hide(handle, tally, take)
  local pieces, size = {}, 0 -- of the line whose end is still to come
  local head = "" -- how that line begins
  local held = false -- are its pieces kept from the client?
  local tries = 0 -- at finding its object complete
  local cut_ends = 0 -- line ends that belong to a hidden event

  for chunk in handle:bodyChunks() do
    local s = chunk:getBytes(0, chunk:length())
    local out -- what passes instead of s; nil as long as that is s
    local i = 1 -- where the current line goes on
    local from = 1 -- where the bytes begin that are neither in `out` nor hidden
    if cut_ends > 0 then
      i, cut_ends = line_ends(s, 1, cut_ends)
      from, out = i, {}
    end

    local nl = find(s, "\n", i, true)
    while nl do
      local begun = size > 0 and concat(pieces) or ""
      if take(tally, begun .. sub(s, i, nl - 1)) and (size == 0 or held) then
        out = out or {}
        out[#out + 1] = sub(s, from, i - 1)
        i, cut_ends = line_ends(s, nl + 1, 1)
        from = i
      else
        if held then
          out = out or {}
          out[#out + 1] = begun
        end
        i = nl + 1
      end
      if size > 0 then
        pieces, size, head, held, tries = {}, 0, "", false, 0
      end
      nl = find(s, "\n", i, true)
    end

    if i <= #s then
      local rest = sub(s, i)
      if size == 0 then held = true end
      if size > LONGEST_ANSWER then pieces = {} end -- passed on already, and no line that matters
      pieces[#pieces + 1], size = rest, size + #rest
      if #head < 64 then head = sub(head .. rest, 1, 64) end
      if held then
        out = out or {}
        out[#out + 1] = sub(s, from, i - 1)
        from = #s + 1
        if not may_be_event(head) or size > LONGEST_ANSWER then
          out[#out + 1] = concat(pieces)
          held = false
        elseif byte(s, #s) == 125 and tries < MOST_TRIES then
          tries = tries + 1
          local line = concat(pieces)
          if top(sub(line, 6)) then
            if take(tally, line) then
              cut_ends = 2
            else
              out[#out + 1] = line
            end
            pieces, size, head, held, tries = {}, 0, "", false, 0
          end
        end
      end
    elseif held and #s == 0 then
      out = { concat(pieces) } -- the stream ends inside this line
      held = false
    end

    if out then
      out[#out + 1] = sub(s, from)
      chunk:setBytes(concat(out))
    end
    tally:publish()
  end
  if size > 0 then take(tally, concat(pieces)) end
end

-- A JSON answer as it passes, "" if it is too long to be read; and its size.
local function whole(handle)
  local pieces, size = {}, 0
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    size = size + length
    if size > LONGEST_ANSWER then
      pieces = nil
    elseif pieces and length > 0 then
      pieces[#pieces + 1] = chunk:getBytes(0, length)
    end
  end
  return pieces and concat(pieces) or "", size
end

function envoy_on_response(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local authz = metadata:get(AUTHZ)
  if not authz or not authz.metered then return end
  local headers = handle:headers()
  local kind = (headers:get("content-type") or ""):lower():match("^[^; ]*")
  local tally = new_tally(handle)
  if authz.count_text then tally.text = texts.answer(handle, authz, kind ~= "application/json") end
  if not find(headers:get(":status") or "", "^2") then return tally:drop_text() end

  if kind == "text/event-stream" then
    local facts = metadata:get(NS)
    local hide = facts ~= nil and facts.stream_usage == "ours"
    if hide then headers:remove("content-length") end
    local pass = hide and follow_and_hide or follow
    pass(handle, tally, tally.sse_line)
  elseif kind == "application/x-ndjson" then
    follow(handle, tally, tally.ndjson_line)
  elseif kind == "application/json" then
    local text, size = whole(handle)
    tally:json(text)
    if not tally.reported and not tally.failed and size > 0 then
      local facts = handle:streamInfo():dynamicMetadata():get(NS)
      tally:estimate(tonumber(facts and facts.body_bytes) or 0, size, authz.endpoint)
      if tally.text then tally.text:add(text) end
    end
  else
    return tally:drop_text()
  end
  if tally.counted == 0 and not tally.estimated then tally:drop_text() end
  if not tally.reported and tally.counted > 0 then tally:note("completion_tokens", tally.counted) end
  tally:publish()
end
