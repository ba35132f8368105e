-- Walks JSON text in place: tells where members and elements begin and end, and never builds a tree.
--
-- Exact on every JSON text. What is skipped over is not validated: no parser behind the gateway
-- accepts what this would get wrong. Positions are 1-based and inclusive. Trouble is raised as
-- a plain string without position, so callers run it under pcall.
--
-- No patterns in here: byte() and plain find() are compiled by LuaJIT, patterns are not.

local byte, find, sub, char = string.byte, string.find, string.sub, string.char

local M = {}

local function bad(what)
  error(what, 0)
end

local function space(s, i)
  local c = byte(s, i)
  while c == 32 or c == 10 or c == 13 or c == 9 do
    i = i + 1
    c = byte(s, i)
  end
  return i, c
end
M.space = space

-- i is at the opening quote; the result is the closing one.
local function string_end(s, i)
  while true do
    i = find(s, '"', i + 1, true)
    if not i then bad("truncated") end
    local b = i - 1
    while byte(s, b) == 92 do
      b = b - 1
    end
    if (i - b) % 2 == 1 then return i end
  end
end

-- The last byte of the value that begins at i.
local function value_end(s, i)
  local c = byte(s, i)
  if c == 34 then return string_end(s, i) end
  if c == 123 or c == 91 then
    local depth = 1
    while depth > 0 do
      i = i + 1
      c = byte(s, i)
      if c == 34 then
        i = string_end(s, i)
      elseif c == 123 or c == 91 then
        depth = depth + 1
      elseif c == 125 or c == 93 then
        depth = depth - 1
      elseif not c then
        bad("truncated")
      end
    end
    return i
  end
  local from = i
  while c and c ~= 44 and c ~= 125 and c ~= 93 and c ~= 32 and c ~= 10 and c ~= 13 and c ~= 9 do
    if c == 34 or c == 58 or c == 123 or c == 91 then bad("malformed") end
    i = i + 1
    c = byte(s, i)
  end
  if i == from then bad(c and "malformed" or "truncated") end
  return i - 1
end
M.value_end = value_end

-- Calls on_member(key, from, to) for each member of the object at i, with the key as it is
-- spelled between its quotes; the result is the closing brace.
function M.object(s, i, on_member)
  local c
  if byte(s, i) ~= 123 then bad("not an object") end
  i, c = space(s, i + 1)
  if c == 125 then return i end
  while true do
    if c ~= 34 then bad(c and "malformed" or "truncated") end
    local close = string_end(s, i)
    local key = sub(s, i + 1, close - 1)
    i, c = space(s, close + 1)
    if c ~= 58 then bad(c and "malformed" or "truncated") end
    i = space(s, i + 1)
    local to = value_end(s, i)
    on_member(key, i, to)
    i, c = space(s, to + 1)
    if c == 125 then return i end
    if c ~= 44 then bad(c and "malformed" or "truncated") end
    i, c = space(s, i + 1)
  end
end

-- Calls on_element(from, to) for each element of the array at i; the result is the closing bracket.
function M.array(s, i, on_element)
  local c
  if byte(s, i) ~= 91 then bad("not an array") end
  i, c = space(s, i + 1)
  if c == 93 then return i end
  while true do
    local to = value_end(s, i)
    on_element(i, to)
    i, c = space(s, to + 1)
    if c == 93 then return i end
    if c ~= 44 then bad(c and "malformed" or "truncated") end
    i = space(s, i + 1)
  end
end

-- Calls on_member for the one object that s consists of, white space around it allowed.
function M.whole(s, on_member)
  local i = M.object(s, space(s, 1), on_member)
  if space(s, i + 1) <= #s then bad("trailing bytes") end
end

local function utf8(n)
  if n < 0x80 then return char(n) end
  if n < 0x800 then return char(0xC0 + (n - n % 64) / 64, 0x80 + n % 64) end
  local low, rest = n % 64, (n - n % 64) / 64
  if n < 0x10000 then return char(0xE0 + (rest - rest % 64) / 64, 0x80 + rest % 64, 0x80 + low) end
  local mid = (rest - rest % 64) / 64
  return char(0xF0 + (mid - mid % 64) / 64, 0x80 + mid % 64, 0x80 + rest % 64, 0x80 + low)
end

local function hex4(s, i)
  local digits = sub(s, i, i + 3)
  return find(digits, "^%x%x%x%x$") and tonumber(digits, 16)
end

local SHORT = { ['"'] = '"', ["\\"] = "\\", ["/"] = "/", b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

-- What a string between its quotes means, or nil where an escape is wrong or half of a pair.
function M.decode(raw)
  local i = find(raw, "\\", 1, true)
  if not i then return raw end
  local out, from = {}, 1
  while i do
    out[#out + 1] = sub(raw, from, i - 1)
    local c = sub(raw, i + 1, i + 1)
    if c == "u" then
      local n = hex4(raw, i + 2)
      if not n then return nil end
      from = i + 6
      if n >= 0xD800 and n <= 0xDFFF then
        local low = sub(raw, i + 6, i + 7) == "\\u" and hex4(raw, i + 8)
        if n > 0xDBFF or not low or low < 0xDC00 or low > 0xDFFF then return nil end
        n = 0x10000 + (n - 0xD800) * 0x400 + low - 0xDC00
        from = i + 12
      end
      out[#out + 1] = utf8(n)
    else
      if not SHORT[c] then return nil end
      out[#out + 1] = SHORT[c]
      from = i + 2
    end
    i = find(raw, "\\", from, true)
  end
  out[#out + 1] = sub(raw, from)
  return table.concat(out)
end

-- Is t valid UTF-8 without control characters (C0, DEL, C1)?
function M.is_plain_text(t)
  local i, n = 1, #t
  while i <= n do
    local c, d = byte(t, i, i + 1)
    local more
    if c < 0x80 then
      if c < 0x20 or c == 0x7F then return false end
      more = 0
    elseif c >= 0xC2 and c <= 0xDF then
      if c == 0xC2 and d and d < 0xA0 then return false end
      more = 1
    elseif c >= 0xE0 and c <= 0xEF then
      if d and (c == 0xE0 and d < 0xA0 or c == 0xED and d > 0x9F) then return false end
      more = 2
    elseif c >= 0xF0 and c <= 0xF4 then
      if d and (c == 0xF0 and d < 0x90 or c == 0xF4 and d > 0x8F) then return false end
      more = 3
    else
      return false
    end
    for k = i + 1, i + more do
      local x = byte(t, k)
      if not x or x < 0x80 or x > 0xBF then return false end
    end
    i = i + 1 + more
  end
  return true
end

-- The number that is written in s between from and to, or nil if there is none.
function M.number(s, from, to)
  local text = sub(s, from, to)
  return find(text, "^%-?%d[%d.eE+-]*$") and tonumber(text) or nil
end

return M
