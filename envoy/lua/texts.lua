-- The text of a request and of its answer, bounded, for usage_sink to count the tokens that no
-- upstream reports. Runs only where authz set `count_text`, of which usage.lua hears by `text_counted`.
--
-- Strings pass as they stand between their quotes, escapes and all: whoever counts finds out what
-- they mean. Between two of them is a line end, which no JSON string has inside. All of it is
-- base64, because metadata must be UTF-8, which an answer that was cut or is broken need not be.
-- The names are those of parallama/contract.py.

local scan = require("json_scan")
local byte, find, sub, concat = string.byte, string.find, string.sub, table.concat

local NS, TEXT = "parallama", "parallama.text"
local MOST_BYTES = 65536 -- of the request, and of the answer; of what is more only the size is told
local MOST_STRINGS = 10000 -- in a request; what comes after them counts as one
local DEEPEST = 8 -- nesting that is looked into; each level is one more pass
local PIECE_BYTES = 1024 -- of a stream; the last piece is written anew with each chunk

local M = {}

-- Where requests have text: at the top, and in the objects and arrays below. Pictures and sound are
-- nowhere among these.
local AT_TOP = { messages = true, prompt = true, system = true, suffix = true, input = true, instructions = true }
local BELOW = {
  content = true, text = true, thinking = true, reasoning = true, reasoning_content = true, refusal = true,
  tool_calls = true, ["function"] = true, input = true, output = true,
}

local function take(found, s, from, to)
  if to < from then return end
  found.strings = found.strings + 1
  if found.strings > MOST_STRINGS then to = #s end
  local room = MOST_BYTES - found.size
  local n = math.min(to - from + 1, room)
  if n > 0 then
    found.pieces[#found.pieces + 1] = sub(s, from, from + n - 1)
    found.size = found.size + n + 1
  end
  found.more = found.more + to - from + 1 - math.max(n, 0)
  if found.strings > MOST_STRINGS then error("enough", 0) end
end

local function look_into(found, s, from, to, depth)
  local c = byte(s, from)
  if c == 34 then
    take(found, s, from + 1, to - 1)
  elseif c == 91 and depth > 0 then
    scan.array(s, from, function(a, b)
      look_into(found, s, a, b, depth - 1)
    end)
  elseif c == 123 and depth > 0 then
    scan.object(s, from, function(key, a, b)
      if (key == "arguments" or key == "input") and byte(s, a) == 123 then
        take(found, s, a, b) -- what a tool was called with
      elseif BELOW[key] or key == "arguments" then
        look_into(found, s, a, b, depth - 1)
      end
    end)
  end
end

-- Tools are shown to the model as JSON, so all of that is text.
local function of_request(found, s)
  scan.whole(s, function(key, from, to)
    if AT_TOP[key] then
      look_into(found, s, from, to, DEEPEST)
    elseif key == "tools" and byte(s, from) == 91 then
      take(found, s, from, to)
    end
  end)
end

-- Passes on the text of the request s.
function M.pass_request(handle, s)
  local found = { pieces = {}, strings = 0, size = 0, more = 0 }
  pcall(of_request, found, s) -- what was found until then is text all the same
  local metadata = handle:streamInfo():dynamicMetadata()
  metadata:set(NS, "text_counted", true)
  if found.size == 0 then return end
  metadata:set(TEXT, "prompt", handle:base64Escape(concat(found.pieces, "\n")))
  if found.more > 0 then metadata:set(TEXT, "prompt_more", found.more) end
end

-- Members whose strings are an answer's text, by endpoint; `delta` is what a stream has instead.
-- There a text that is complete comes once more, at its end.
local OPENAI = { '"content"', '"reasoning_content"', '"reasoning"', '"refusal"', '"text"', '"arguments"' }
local OLLAMA = { '"content"', '"thinking"', '"response"', '"arguments"' }
local ANTHROPIC = { '"text"', '"thinking"', '"input"' }
local ANTHROPIC_STREAM = { '"text"', '"thinking"', '"partial_json"' }
local RESPONSES = { '"text"', '"refusal"', '"arguments"' }
local RESPONSES_STREAM = { '"delta"' }

local function keys_of(authz, is_stream)
  if authz.dialect == "ollama" then return OLLAMA end
  if authz.endpoint == "/v1/messages" then return is_stream and ANTHROPIC_STREAM or ANTHROPIC end
  if authz.endpoint == "/v1/responses" then return is_stream and RESPONSES_STREAM or RESPONSES end
  return OPENAI
end

local Answer = {}
Answer.__index = Answer

function M.answer(handle, authz, is_stream)
  return setmetatable({
    handle = handle, keys = keys_of(authz, is_stream), is_stream = is_stream,
    number = 1, tail = "", size = 0, more = 0, changed = false, before = nil,
  }, Answer)
end

local function choice(line)
  local _, e = find(line, '"index"', 1, true)
  if not e then return nil end
  local i, c = scan.space(line, e + 1)
  if c ~= 58 then return nil end
  _, c = scan.space(line, i + 1)
  return c
end

function Answer:take(s, from, to)
  if to < from then return end
  local room = MOST_BYTES - self.size
  local n = math.min(to - from + 1, room)
  if n > 0 then
    self.tail = self.tail .. sub(s, from, from + n - 1)
    self.size = self.size + n
  end
  self.more = self.more + to - from + 1 - math.max(n, 0)
  self.changed = true
end

-- What comes next is not the continuation of what came before.
function Answer:apart(place)
  if place and place == self.before then return end
  if self.before and self.size < MOST_BYTES then
    self.tail = self.tail .. "\n"
    self.size = self.size + 1
  end
  self.before = place or ""
end

-- Takes the text of one line of a stream, or of a whole JSON answer.
function Answer:add(line)
  local at_choice
  for k = 1, #self.keys do
    local key = self.keys[k]
    local _, e = find(line, key, 1, true)
    while e do
      local i, c = scan.space(line, e + 1)
      if c == 58 then
        i, c = scan.space(line, i + 1)
        if (c == 34 and byte(line, i + 1) ~= 34) or (c == 123 and (key == '"arguments"' or key == '"input"')) then
          local ok, to = pcall(scan.value_end, line, i)
          if not ok then break end
          if self.is_stream then
            at_choice = at_choice or choice(line) or 0
            self:apart(key .. at_choice)
          else
            self:apart(nil)
          end
          if c == 34 then
            self:take(line, i + 1, to - 1)
          else
            self:take(line, i, to)
          end
          e = to
        end
      end
      _, e = find(line, key, e + 1, true)
    end
  end
end

function Answer:publish()
  if not self.changed then return end
  local metadata = self.handle:streamInfo():dynamicMetadata()
  if self.tail ~= "" then
    metadata:set(TEXT, string.format("%d", self.number), self.handle:base64Escape(self.tail))
  end
  if self.more > 0 then metadata:set(TEXT, "answer_more", self.more) end
  if #self.tail >= PIECE_BYTES then self.number, self.tail = self.number + 1, "" end
  self.changed = false
end

-- Nobody needs the text: what was passed on is taken back.
function Answer:drop()
  local metadata = self.handle:streamInfo():dynamicMetadata()
  metadata:set(TEXT, "prompt", false)
  for n = 1, self.size > 0 and self.number or 0 do
    metadata:set(TEXT, string.format("%d", n), false)
  end
end

return M
