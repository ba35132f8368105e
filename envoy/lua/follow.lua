-- Follows an answer as it passes, in whatever chunks it comes, and changes what is to be changed.

jit.off(true, true) -- see usage.lua
package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local alike = require("alike")
local byte, find, sub, concat = string.byte, string.find, string.sub, table.concat

local LONGEST_ANSWER = 16 * 1024 * 1024 -- of a JSON answer, and of one line in a stream
local MOST_TRIES = 64 -- at judging one line, or one answer, before its end is here
local MOST_MISSES = 8 -- lines that were learned from and had no like

local BROKEN = "the answer ended before it was complete: the server behind this gateway stopped without an end mark"

local LARGE = 1024 * 1024 -- more than this is not left to a collector that comes seldom

local M = {}

local function nothing() end

local function is_object(s, from)
  return (pcall(scan.whole, from > 1 and sub(s, from) or s, nothing))
end

-- Can a line that begins with this be one that is to be changed, a JSON object?
local function may_be_object(head, begins)
  local n = #begins
  if #head <= n then return sub(begins, 1, #head) == head end
  if sub(head, 1, n) ~= begins then return false end
  local _, c = scan.space(head, n + 1)
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

-- Gives each line of the stream to form.take() as soon as its end is here, and passes on what that
-- makes of it: see streams.lua.
--
-- Where lines may change, one whose end is still to come is held back until it is complete: until
-- its end is here, or until its JSON object is, since the last line of a stream may have no end. No
-- client could read it earlier. Where none may, every chunk passes as it comes.
--
-- If the upstream is done and the answer is not, the client is told at its end: `may_add` says that a
-- chunk without a byte is that end, and that there is room for more.
function M.stream(handle, tally, form, names, may_add)
  local take, begins, text_keys = form.take, form.begins, form.strings
  local changes = names ~= nil or tally.hides == true
  local name = names and names.value
  local line_end = begins == "" and "" or "\n" -- what ends an event after the end of its line
  local pieces, size = {}, 0 -- of the line whose end is still to come
  local head = "" -- how that line begins
  local held = false -- are its pieces kept from the client?
  local tries = 0 -- at finding its object complete
  local cut_ends = 0 -- line ends that belong to a hidden event
  local missing = "" -- the line ends that an event of ours would need before it
  local like, misses = nil, 0

  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    local s = chunk:getBytes(0, length)
    local out -- what passes instead of s; nil as long as that is s
    local i = 1 -- where the current line goes on
    local from = 1 -- where the bytes begin that are neither in `out` nor hidden
    if cut_ends > 0 and length > 0 then
      i, cut_ends = line_ends(s, 1, cut_ends)
      from, out = i, {}
    end

    local nl = find(s, "\n", i, true)
    while nl do
      local last, at
      if like and size == 0 then last, at = alike.fits(like, s, i, nl) end
      if last then
        misses = 0
        tally:count()
        if tally.text then tally.text:add(sub(s, i, nl - 1)) end
        if at and name then
          out = out or {}
          out[#out + 1] = sub(s, from, at - 1)
          out[#out + 1] = name
          from = at + like.size
        end
        i, missing = last + 1, like.blank and "" or line_end
      else
        local line = sub(s, i, nl - 1)
        local new, plain, model
        if size > 0 then
          local begun = concat(pieces)
          line = begun .. line
          new = take(tally, line, names)
          if held then
            out = out or {}
            if not new then out[#out + 1] = begun end
          else
            new = nil -- it has passed already
          end
          pieces, size, head, held, tries = {}, 0, "", false, 0
        else
          new, plain, model = take(tally, line, names)
          if plain and text_keys and misses < MOST_MISSES then
            like = alike.learn(s, i, nl, text_keys, names and model)
            misses = misses + 1
          end
        end
        missing = (line == "" or line == "\r") and "" or line_end
        if new == "" then
          out = out or {}
          out[#out + 1] = sub(s, from, i - 1)
          i, cut_ends = line_ends(s, nl + 1, 1)
          from, missing = i, ""
        elseif new then
          out = out or {}
          out[#out + 1] = sub(s, from, i - 1)
          out[#out + 1] = new
          i, from = nl + 1, nl
        else
          i = nl + 1
        end
      end
      nl = find(s, "\n", i, true)
    end

    if i <= length then
      local rest = i == 1 and s or sub(s, i)
      missing = "\n" .. line_end
      if size == 0 then held = changes end
      if size > LONGEST_ANSWER then pieces = {} end -- passed on already, and no line that matters
      pieces[#pieces + 1], size = rest, size + #rest
      if size > LARGE then collectgarbage("step", 64) end
      if held then
        if #head < 64 then head = sub(head .. rest, 1, 64) end
        out = out or {}
        out[#out + 1] = sub(s, from, i - 1)
        from = length + 1
        if not may_be_object(head, begins) or size > LONGEST_ANSWER then
          out[#out + 1] = concat(pieces)
          held = false
        elseif byte(s, length) == 125 and tries < MOST_TRIES then
          tries = tries + 1
          local line = concat(pieces)
          if is_object(line, #begins + 1) then
            local new = take(tally, line, names)
            if new == "" then
              cut_ends, missing = 2, ""
            else
              out[#out + 1] = new or line
            end
            pieces, size, head, held, tries = {}, 0, "", false, 0
          end
        end
      end
    elseif length == 0 and may_add then
      if size > 0 then -- the stream ends inside this line
        local line = concat(pieces)
        local new = take(tally, line, names)
        if held then out = { new or line } end
        pieces, size, held = {}, 0, false
      end
      if not tally.ended then
        out = out or {}
        out[#out + 1] = missing
        out[#out + 1] = form.broken(tally, BROKEN)
        may_add = false
      end
    elseif length == 0 and held then
      out = { concat(pieces) } -- if this is the end, it ends inside this line
      held = false
    end

    if out then
      out[#out + 1] = sub(s, from)
      chunk:setBytes(concat(out))
    end
    tally:publish()
  end
  if size > 0 then take(tally, concat(pieces), names) end
  if not tally.ended then tally:cut() end
end

-- A JSON answer as it passes, "" if it is too long to be read; and its size. Where `change` is given
-- the answer is held back until it is complete, and what change() makes of it goes on instead.
function M.whole(handle, change)
  local pieces, size, tries = {}, 0, 0
  local text
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    size = size + length
    if size > LARGE then collectgarbage("step", 64) end
    if pieces and not text then
      if length > 0 then pieces[#pieces + 1] = chunk:getBytes(0, length) end
      if change then
        local ends = length == 0
        if length > 0 and tries < MOST_TRIES and find(pieces[#pieces], "}%s*$") then
          tries = tries + 1
          pieces = { concat(pieces) }
          ends = is_object(pieces[1], 1)
        end
        if ends then
          text = concat(pieces)
          chunk:setBytes(change(text) or text)
        elseif size > LONGEST_ANSWER then
          chunk:setBytes(concat(pieces))
        else
          chunk:setBytes("")
        end
      end
      if size > LONGEST_ANSWER and not text then pieces = nil end
    end
  end
  return text or pieces and concat(pieces) or "", size
end

return M
