-- Most lines of a stream differ from the one before in what one or two strings say, and in nothing
-- else. Such a line needs no second look: it is read by comparing the bytes between those strings.

jit.off(true, true) -- see usage.lua
package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local byte, find, sub = string.byte, string.find, string.sub

local M = {}

local STAMPS = { '"created_at"', '"obfuscation"' } -- these differ in every line of some servers

-- Where the string of a member with this key is, if it has one that is not empty.
local function string_of(line, key)
  local _, e = find(line, key, 1, true)
  while e do
    local i, c = scan.space(line, e + 1)
    if c == 58 then
      i, c = scan.space(line, i + 1)
      if c == 34 and byte(line, i + 1) ~= 34 then
        local ok, to = pcall(scan.value_end, line, i)
        return ok and i or nil, to
      end
    end
    _, e = find(line, key, e + 1, true)
  end
end

local function first_of(line, keys)
  for k = 1, #keys do
    local from, to = string_of(line, keys[k])
    if from then return from, to end
  end
end

-- What lines like this one have in common, or nil. s has the line from i to its end at nl; `model`
-- is where its model's name is, counted from i, or nil.
function M.learn(s, i, nl, keys, model)
  local line = sub(s, i, nl - 1)
  local from, to = first_of(line, keys)
  if not from then return nil end
  local stamp, stamp_to = first_of(line, STAMPS)
  local close = nl
  if byte(s, nl + 1) == 10 then
    close = nl + 1
  elseif byte(s, nl - 1) == 13 and sub(s, nl + 1, nl + 2) == "\r\n" then
    close = nl + 2
  end
  local middle
  if stamp and stamp < from then
    from, to, stamp, stamp_to = stamp, stamp_to, from, to
  end
  if stamp then middle = sub(line, to, stamp) end
  local last_at = stamp and stamp_to or to
  local found = {
    first = sub(line, 1, from), middle = middle, last = sub(s, i + last_at - 1, close),
    line = nl - (i + last_at - 1), blank = close > nl,
  }
  if model then
    found.size = model[2] - model[1] + 1
    if model[2] < from then
      found.in_first = model[1] - 1
    elseif model[1] > last_at then
      found.in_last = model[1] - last_at
    elseif middle and model[1] > to and model[2] < stamp then
      found.in_middle = model[1] - to
    else
      return nil
    end
  end
  return found
end

-- Is the line of s from i to nl like that? Then the result is its last byte, the blank line after it
-- included if the one it was learned from had one, and where its model's name begins.
function M.fits(found, s, i, nl)
  local part = found.first
  local from = i + #part
  if sub(s, i, from - 1) ~= part then return nil end
  local close = find(s, '"', from, true)
  if not close or close == from or byte(s, close - 1) == 92 then return nil end
  local model = found.in_first and i + found.in_first
  part = found.middle
  if part then
    from = close + #part
    if sub(s, close, from - 1) ~= part then return nil end
    if found.in_middle then model = close + found.in_middle end
    close = find(s, '"', from, true)
    if not close or close == from or byte(s, close - 1) == 92 then return nil end
  end
  part = found.last
  local last = close + #part - 1
  if close + found.line ~= nl or sub(s, close, last) ~= part then return nil end
  if found.in_last then model = close + found.in_last end
  return last, model
end

return M
