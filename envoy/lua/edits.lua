-- Edits of a JSON text: bytes are spliced in, every other byte stays.
--
-- They may be noted in any order, and do not overlap. What is put into an object goes before its
-- first member.

package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local sub, concat, sort = string.sub, table.concat, table.sort

local Edits = {}
Edits.__index = Edits

local M = {}

function M.new(s)
  return setmetatable({ s = s, list = {}, into = {} }, Edits)
end

-- Puts `text` in the place of the bytes from..to.
function Edits:replace(from, to, text)
  self.list[#self.list + 1] = { from = from, to = to, text = text }
end

-- Puts one more member into the object that begins at i.
function Edits:insert(i, member)
  local edit = self.into[i]
  if edit then
    edit.text = edit.text .. "," .. member
    return
  end
  edit = { from = i + 1, to = i, text = member, into = i }
  self.into[i] = edit
  self.list[#self.list + 1] = edit
end

-- `member` of the object at i becomes `text`, wherever it stood (a span, or nil).
function Edits:put(i, member, span, text)
  if span then
    self:replace(span[1], span[2], text)
  else
    self:insert(i, '"' .. member .. '":' .. text)
  end
end

-- The text with all of them made, or nil where there are none.
function Edits:made()
  local list, s = self.list, self.s
  if #list == 0 then return nil end
  sort(list, function(a, b)
    return a.from < b.from
  end)
  local out, at = {}, 1
  for _, edit in ipairs(list) do
    out[#out + 1] = sub(s, at, edit.from - 1)
    out[#out + 1] = edit.text
    if edit.into then
      local _, c = scan.space(s, edit.from)
      if c ~= 125 then out[#out + 1] = "," end
    end
    at = edit.to + 1
  end
  out[#out + 1] = sub(s, at)
  return concat(out)
end

return M
