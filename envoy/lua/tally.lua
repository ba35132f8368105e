-- What is known of an answer so far: the tokens that passed, and what the upstream says of them.
--
-- Metadata is true after every chunk, because an abandoned stream is charged with what it says then.
-- In the steady state a chunk costs one set(). The names are those of parallama/contract.py.

package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local byte, find, sub = string.byte, string.find, string.sub

local NS = "parallama"
local MOST_TOKENS = 1e9
local LONGEST_NAME = 256
local BYTES_PER_TOKEN = 4 -- a common average; what it leads to is marked as an estimate

local M = {}

-- The top level of a JSON text as {key = {from, to}} (the last of equal keys), and every place where
-- it names a model; nil if it is not one whole object.
function M.top(s)
  local at, models = {}, {}
  local ok = pcall(scan.whole, s, function(key, from, to)
    local span = { from, to }
    at[key] = span
    if key == "model" then models[#models + 1] = span end
  end)
  if ok then return at, models end
end

-- The same of an object within it; empty where there is none.
function M.inner(s, span)
  local at, models = {}, {}
  if span and byte(s, span[1]) == 123 then
    pcall(scan.object, s, span[1], function(key, from, to)
      local found = { from, to }
      at[key] = found
      if key == "model" then models[#models + 1] = found end
    end)
  end
  return at, models
end

local inner = M.inner

function M.is_set(s, span)
  return span ~= nil and not (span[2] - span[1] == 3 and sub(s, span[1], span[2]) == "null")
end

local function number(s, span)
  return span and span[2] - span[1] < 64 and scan.number(s, span[1], span[2]) or nil
end

local function tokens(s, span)
  local n = number(s, span)
  return n and n >= 0 and n <= MOST_TOKENS and n == math.floor(n) and n or nil
end

-- `news` is what the next publish() writes beside the running total; `text` is there where usage_sink
-- is to count it, as long as the upstream reports nothing; `ended` once the answer said that it is over.
local Tally = {}
Tally.__index = Tally

function M.new(handle)
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

function Tally:finish()
  self.ended = true
  self:note("finished", true)
end

function Tally:fail()
  self.ended, self.failed = true, true
  self:note("upstream_error", true)
end

-- The upstream was done, and the answer was not.
function Tally:cut()
  self:note("no_end", true)
end

-- A count that the upstream reports. One that cannot be is left out, and that is noted.
function Tally:tokens(s, span)
  local n = tokens(s, span)
  if not n and M.is_set(s, span) then self:note("usage_odd", true) end
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

-- The prompt, as it is told before the first token: what is said at the end counts more.
function Tally:prompt(prompt, cached)
  if self.reported or self.counted > 0 or not prompt then return end
  self.total, self.changed = math.min(prompt, MOST_TOKENS), true
  self:note("prompt_tokens", prompt)
  if cached then self:note("cached_tokens", cached) end
  self:note("usage_source", "counted")
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

jit.off(Tally.publish) -- see usage.lua

-- OpenAI's `usage`, of Responses too, and llama.cpp's `timings` where there is none.
function Tally:openai(s, span, timings_span)
  local usage, timings = inner(s, span), inner(s, timings_span)
  local prompt = self:tokens(s, usage.prompt_tokens) or self:tokens(s, usage.input_tokens)
  local completion = self:tokens(s, usage.completion_tokens) or self:tokens(s, usage.output_tokens)
  if prompt or completion then
    local details = inner(s, usage.prompt_tokens_details or usage.input_tokens_details)
    self:report(prompt, completion, self:tokens(s, details.cached_tokens), self:tokens(s, usage.total_tokens))
    details = inner(s, usage.completion_tokens_details or usage.output_tokens_details)
    local reasoning = self:tokens(s, details.reasoning_tokens)
    if reasoning then self:note("reasoning_tokens", reasoning) end
  else
    local cached, fresh = self:tokens(s, timings.cache_n), self:tokens(s, timings.prompt_n)
    self:report(fresh and fresh + (cached or 0), self:tokens(s, timings.predicted_n), cached)
  end
  self:work(number(s, timings.prompt_ms), number(s, timings.predicted_ms))
end

-- Anthropic's `usage`. What came from the cache and what went into it is not part of `input_tokens`
-- there. At the end of a stream the numbers are those of all of it, and what is left out is as it was.
-- The completion that a stream begins with is no count.
function Tally:anthropic(s, span, begins)
  local usage = inner(s, span)
  self.input = self:tokens(s, usage.input_tokens) or self.input
  self.cache_read = self:tokens(s, usage.cache_read_input_tokens) or self.cache_read
  self.cache_made = self:tokens(s, usage.cache_creation_input_tokens) or self.cache_made
  local prompt = self.input and self.input + (self.cache_read or 0) + (self.cache_made or 0)
  if begins then return self:prompt(prompt, self.cache_read) end
  self:report(prompt, self:tokens(s, usage.output_tokens), self.cache_read)
end

-- The last line of an Ollama stream, or its whole answer. It leaves out what is zero, which no text is.
function Tally:ollama(s, at, has_text)
  local prompt, completion = self:tokens(s, at.prompt_eval_count), self:tokens(s, at.eval_count)
  if prompt or completion or (self.counted == 0 and not has_text) then
    self:report(prompt or 0, completion or self.counted == 0 and 0 or nil)
  end
  local prompt_ns, eval_ns = number(s, at.prompt_eval_duration), number(s, at.eval_duration)
  self:work(prompt_ns and prompt_ns / 1e6, eval_ns and eval_ns / 1e6)
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

return M
