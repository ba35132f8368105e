-- What an operator makes of parameters that a request sends: see `request_shapes` in the
-- configuration, and parallama/shapes.py, which writes the rules that are read here.
--
-- A rule is one of: `drop`, `set`, or `max` with or without `default`. What is no value that could
-- be compared with a maximum counts as above it.

package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local byte, sub, format = string.byte, string.sub, string.format

local M = {}

local LONGEST_DURATION = 100

-- Smaller numbers than these mean "as much as there is" to some server.
local LEAST = { num_gpu = 0, main_gpu = 0 }

local FLAGS = { use_mmap = true, use_mlock = true, numa = true, low_vram = true }
local UNITS = { ns = 1e-9, us = 1e-6, ["\194\181s"] = 1e-6, ["\206\188s"] = 1e-6, ms = 1e-3, s = 1, m = 60, h = 3600 }

-- Rules by parameter: "\n", name, then " " and "<what>=<value>" for each part of the rule.
local function parsed(text)
  local rules, options, any = {}, {}, false
  for name, parts in text:gmatch("\n([^ \n]+)([^\n]*)") do
    local rule = {}
    for what, value in parts:gmatch(" (%w+)=(%S+)") do
      rule[what] = tonumber(value) or value
    end
    rules[name] = rule
    if name ~= "max_tokens" and name ~= "keep_alive" then
      options[name] = true
      any = true
    end
  end
  return { rules = rules, options = any and options or nil }
end

-- There is one text for each role, so few are ever seen; but a configuration may change.
local MOST_KNOWN = 64
local known, count = {}, 0

-- What `text` says: `rules` by parameter, and which of them are Ollama's `options` (nil without any).
function M.of(text)
  local shape = known[text]
  if not shape then
    if count == MOST_KNOWN then known, count = {}, 0 end
    shape = parsed(text)
    known[text] = shape
    count = count + 1
  end
  return shape
end

-- Seconds of a duration as Go writes it, or nil where it is none.
local function seconds(text)
  local sign, rest = text:match("^([+-]?)(.*)$")
  if rest == "0" then return 0 end
  local total, i = 0, 1
  repeat
    local digits, unit, after = rest:match("^([%d.]+)([^%d.]+)()", i)
    local n = digits and tonumber(digits)
    if not n or not UNITS[unit] then return nil end
    total, i = total + n * UNITS[unit], after
  until i > #rest
  return sign == "-" and -total or total
end

-- What a keep_alive says, in seconds; -1 is for ever. Nil where no server takes it.
local function kept_for(s, from, to)
  local n
  if byte(s, from) == 34 then
    local text = to - from <= LONGEST_DURATION and scan.decode(sub(s, from + 1, to - 1))
    n = text and seconds(text)
  else
    n = scan.number(s, from, to)
  end
  return n and (n < 0 and -1 or n)
end

local function value_of(s, name, span)
  if name == "keep_alive" then return kept_for(s, span[1], span[2]) end
  if FLAGS[name] then return sub(s, span[1], span[2]) end
  return scan.number(s, span[1], span[2])
end

-- How a value is written into the body, and how it is told.
local function written(name, value)
  if type(value) == "string" then return value, value end
  if name == "keep_alive" and value >= 0 then return format('"%ds"', value), format("%ds", value) end
  local text = format("%d", value)
  return text, text
end

-- What the rule makes of a value (nil: none was sent), or nil where it stays.
local function becomes(rule, name, value, there)
  if rule.drop then return there and "null" or nil end
  if rule.set ~= nil then
    if there and value == rule.set then return nil end
    return rule.set
  end
  if not there then return rule.default end
  local least = LEAST[name] or name == "keep_alive" and 0 or 1
  if rule.max and not (value and value >= least and value <= rule.max) then return rule.max end
end

local function is_there(s, span)
  return span ~= nil and not (span[2] - span[1] == 3 and sub(s, span[1], span[2]) == "null")
end

-- One parameter, which stands at `span` (nil: nowhere): what to write in its place, if anything.
local function shaped(s, rule, name, span, told)
  local there = is_there(s, span)
  local value = there and value_of(s, name, span) or nil
  local after = becomes(rule, name, value, there)
  if after == nil then return nil end
  local text, said = written(name, after)
  told[#told + 1] = name .. "=" .. said
  return text
end

-- keep_alive, at the top of a call of Ollama's dialect that begins at `open`.
function M.keep_alive(s, shape, open, span, edits, told)
  local rule = shape.rules.keep_alive
  local text = rule and shaped(s, rule, "keep_alive", span, told)
  if text then edits:put(open, "keep_alive", span, text) end
end

-- The parameters in `options`, but for num_predict: the edits are made in `into`, which puts.
function M.options(s, shape, at, put, told)
  if not shape.options then return end
  local names = {}
  for name in pairs(shape.options) do
    names[#names + 1] = name
  end
  table.sort(names)
  for _, name in ipairs(names) do
    local text = shaped(s, shape.rules[name], name, at[name], told)
    if text then put(name, at[name], text) end
  end
end

-- How many tokens an answer may have. `bounds` are those that were sent, by name, and are what is
-- sent on afterwards; `base` is the one that every server honours.
function M.max_tokens(shape, bounds, base, put, told)
  local rule = shape.rules.max_tokens
  if not rule then return end
  local largest
  local function change(name, n)
    bounds[name] = n
    put(name, n and format("%d", n) or "null")
    told[#told + 1] = name .. "=" .. (n and format("%d", n) or "null")
  end
  for _, name in ipairs(M.BOUNDS) do
    local n = bounds[name]
    if n then
      if rule.drop then
        change(name, nil)
      elseif rule.set then
        if n ~= rule.set then change(name, rule.set) end
      elseif rule.max and (n < 1 or n > rule.max) then
        change(name, rule.max)
      end
      largest = math.max(largest or 0, bounds[name] or 0)
    end
  end
  if rule.drop or bounds[base] then return end
  -- Without a bound that counts there is none, and so it is above any maximum.
  local n = rule.set
  if not n and largest then n = rule.max and largest end
  if not n and not largest then n = rule.default or rule.max end
  if n then change(base, n) end
end

M.BOUNDS = { "max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict", "num_predict" }

return M
