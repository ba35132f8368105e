-- The name that the client asked for, put where an answer has the one that was meant.

package.path = "envoy/lua/?.lua;" .. package.path
local edits_of = require("edits")
local tally_of = require("tally")
local byte, find, sub, concat = string.byte, string.find, string.sub, table.concat
local inner = tally_of.inner

local Names = {}
Names.__index = Names

local M = {}

local function raw(name)
  return (name:gsub('[\\"]', "\\%0"))
end

-- `asked` is what the client sent, `meant` what the upstream was sent instead.
function M.new(asked, meant)
  return setmetatable({ asked = raw(asked), meant = raw(meant), value = '"' .. raw(asked) .. '"' }, Names)
end

-- Is there no more of a name at this place? A dot or a colon belongs to one where it goes on after it.
local function apart(before, after, next_one)
  if before and find(before, "[%w_/.:@-]") then return false end
  if find(after, "[%w_/@-]") then return false end
  return not (find(after, "[.:]") and find(next_one, "[%w]"))
end

-- The text between from and to with the name that was meant replaced, or nil where it is not there.
function Names:told(s, from, to)
  local text, meant = sub(s, from, to), self.meant
  local out, at = {}, 1
  local i, e = find(text, meant, 1, true)
  while i do
    if sub(text, e + 1, e + 7) == ":latest" and not find(sub(text, e + 8, e + 8), "[%w_/@-]") then e = e + 7 end
    if apart(i > 1 and sub(text, i - 1, i - 1) or nil, sub(text, e + 1, e + 1), sub(text, e + 2, e + 2)) then
      out[#out + 1] = sub(text, at, i - 1)
      out[#out + 1] = self.asked
      at = e + 1
    end
    i, e = find(text, meant, e + 1, true)
  end
  if at == 1 then return nil end
  out[#out + 1] = sub(text, at)
  return concat(out)
end

function Names:note(edits, s, models)
  for _, span in ipairs(models) do
    if byte(s, span[1]) == 34 then edits:replace(span[1], span[2], self.value) end
  end
end

function Names:note_told(edits, s, span)
  if not span or byte(s, span[1]) ~= 34 then return end
  local new = self:told(s, span[1], span[2])
  if new then edits:replace(span[1], span[2], new) end
end

-- The JSON text s with the name the client knows, or nil where nothing in it is to be changed. `at`
-- and `models` are its top level; `below` is the member that holds an answer, if one does.
function Names:put(s, at, models, below)
  local edits = edits_of.new(s)
  self:note(edits, s, models)
  if below and at[below] then
    local _, more = inner(s, at[below])
    self:note(edits, s, more)
  end
  local trouble = at.error
  if trouble then
    self:note_told(edits, s, trouble)
    self:note_told(edits, s, inner(s, trouble).message)
  end
  return edits:made()
end

-- The same of an error: some servers have their sentence at the top.
function Names:put_in_error(s)
  local at, models = tally_of.top(s)
  if not at then return nil end
  if not at.error then at.error = at.message or at.detail end
  return self:put(s, at, models)
end

return M
