-- What the lines of a stream say, form by form: text, usage, the end, an error.
--
-- Each form has take(tally, line, names), which takes one line without its end. It returns what goes
-- on instead: nil for the line as it came, "" for nothing, which is only said of an event that reports
-- usage and nothing else. With it comes whether the line had text and no more, and where its model is.

jit.off(true, true) -- see usage.lua
package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local tally_of = require("tally")
local byte, find, sub = string.byte, string.find, string.sub
local top, inner, is_set = tally_of.top, tally_of.inner, tally_of.is_set

local M = {}

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
M.has_text = has_text

-- The line of an event that holds a JSON object. Of others it is noted what they say.
local function event(tally, line)
  if byte(line, #line) == 13 then line = sub(line, 1, -2) end
  if sub(line, 1, 5) ~= "data:" then
    if sub(line, 1, 6) == "error:" or line == "event: error" or line == "event:error" then tally:fail() end
    return nil
  end
  local i, c = scan.space(line, 6)
  if c == 123 then return line end
  if sub(line, i, i + 5) == "[DONE]" then tally:finish() end
  return nil
end

-- The object behind "data:", and what goes on instead of its line.
local function object(line)
  local s = sub(line, 6)
  return s, top(s)
end

local function renamed(line, names, s, at, models, below)
  local new = names and names:put(s, at, models, below)
  return new and "data:" .. new
end

-- Only a usage object in a line with text would be news.
local function may_report(line)
  local _, e = find(line, 'usage"', 1, true)
  while e do
    local i, c = scan.space(line, e + 1)
    if c == 58 then
      i, c = scan.space(line, i + 1)
      if c ~= 110 then return true end
    end
    _, e = find(line, 'usage"', e + 1, true)
  end
  return false
end

-- Chat and completions of OpenAI's dialect.
local CHAT = {
  keys = { '"content"', '"reasoning_content"', '"reasoning"', '"text"', '"tool_calls"' },
  strings = { '"content"', '"reasoning_content"', '"reasoning"', '"text"', '"arguments"' },
  begins = "data:",
}

function CHAT.take(tally, line, names)
  local given = line
  line = event(tally, line)
  if not line then return nil end
  if tally.text then tally.text:add(line) end
  local text = has_text(line, CHAT.keys)
  if text then tally:count() end
  if text and tally.named and not names and not may_report(line) then return nil, true end

  local s, at, models = object(given)
  if not at then return nil end
  tally:model(s, at.model)
  tally.named = true -- only the first event is asked
  if is_set(s, at.error) then tally:fail() end
  local reports = at.usage or at.timings
  if reports then tally:openai(s, at.usage, at.timings) end
  if tally.hides and at.usage and byte(s, at.usage[1]) == 123 and at.choices
    and find(sub(s, at.choices[1], at.choices[2]), "^%[[ \t]*%]$") then
    return ""
  end
  local model = models[1]
  if model then model = { model[1] + 5, model[2] + 5 } end
  return renamed(given, names, s, at, models), text and not models[2] and (not reports or not may_report(line))
    and not at.timings and not at.error, model
end

function CHAT.broken(_, message)
  return 'data: {"error":{"message":"' .. message .. '","type":"server_error","param":null,"code":"incomplete_stream"}}\n\n'
end

-- Responses, of OpenAI's dialect. The answer as a whole stands in some of its events.
local RESPONSES = { keys = { '"delta"' }, begins = "data:" }
local RESPONSES_END = {
  ['"response.completed"'] = true, ['"response.incomplete"'] = true, ['"response.failed"'] = true,
}

function RESPONSES.take(tally, line, names)
  local given = line
  line = event(tally, line)
  if not line then return nil end
  tally.last = line
  if tally.text then tally.text:add(line) end
  if has_text(line, RESPONSES.keys) then
    tally:count()
    if not find(line, '"response"', 1, true) then return nil end
  end
  local s, at, models = object(given)
  if not at then return nil end
  local kind = at.type and sub(s, at.type[1], at.type[2])
  if is_set(s, at.error) or kind == '"error"' then tally:fail() end
  if at.response then
    local response = inner(s, at.response)
    tally:model(s, response.model)
    if is_set(s, response.error) then tally:fail() end
    if RESPONSES_END[kind] then
      if is_set(s, response.usage) or at.timings then tally:openai(s, response.usage, at.timings) end
      tally:finish()
    end
  end
  return renamed(given, names, s, at, models, "response")
end

-- The number goes on from the last event's, where those have one.
function RESPONSES.broken(tally, message)
  local s = tally.last and sub(tally.last, 6)
  local at = s and top(s)
  local n = at and at.sequence_number and scan.number(s, at.sequence_number[1], at.sequence_number[2])
  return 'event: error\ndata: {"type":"error","code":"incomplete_stream","message":"' .. message .. '","param":null,'
    .. (n and string.format('"sequence_number":%d,', n + 1) or "")
    .. '"error":{"type":"server_error","code":"incomplete_stream","message":"' .. message .. '","param":null}}\n\n'
end

-- Anthropic's messages.
local MESSAGES = { keys = { '"text"', '"thinking"', '"partial_json"' }, begins = "data:" }

function MESSAGES.take(tally, line, names)
  local given = line
  line = event(tally, line)
  if not line then return nil end
  if tally.text then tally.text:add(line) end
  if has_text(line, MESSAGES.keys) then
    tally:count()
    if not find(line, '"message"', 1, true) and not may_report(line) then return nil end
  end
  local s, at, models = object(given)
  if not at then return nil end
  local kind = at.type and sub(s, at.type[1], at.type[2])
  if is_set(s, at.error) or kind == '"error"' then tally:fail() end
  if at.message then
    local message = inner(s, at.message)
    tally:model(s, message.model)
    if message.usage then tally:anthropic(s, message.usage, true) end
  end
  if at.usage then tally:anthropic(s, at.usage, kind == '"message_start"') end
  if kind == '"message_stop"' then tally:finish() end
  return renamed(given, names, s, at, models, "message")
end

function MESSAGES.broken(_, message)
  return 'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"' .. message .. '"}}\n\n'
end

-- Ollama's own.
local OLLAMA = {
  keys = { '"content"', '"thinking"', '"response"', '"tool_calls"' },
  strings = { '"content"', '"thinking"', '"response"' },
  begins = "",
}

function OLLAMA.take(tally, line, names)
  if tally.text then tally.text:add(line) end
  local ends = find(line, "true", 1, true) -- or else it cannot say that it is done
  local fails = find(line, '"error"', 1, true)
  if not ends and not fails and tally.named and not names then
    local text = has_text(line, OLLAMA.keys)
    if text then tally:count() end
    return nil, text
  end
  local at, models = top(line)
  if not at then return nil end
  tally:model(line, at.model)
  tally.named = true
  local text = has_text(line, OLLAMA.keys)
  local plain = false
  if is_set(line, at.error) then
    tally:fail()
  elseif at.done and sub(line, at.done[1], at.done[2]) == "true" then
    tally:ollama(line, at, text)
    tally:finish()
  elseif text then
    tally:count()
    plain = not at.error and not models[2]
  end
  return names and names:put(line, at, models), plain, models[1]
end

function OLLAMA.broken(_, message)
  return '{"error":"' .. message .. '"}\n'
end

M.chat, M.responses, M.messages, M.ollama = CHAT, RESPONSES, MESSAGES, OLLAMA
return M
