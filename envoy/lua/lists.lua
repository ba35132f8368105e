-- Response: takes the models that a key may not use out of lists of models.
--
-- Runs only where authz set `list_models`. Other bytes stay. A list that it cannot read is not
-- passed on: the answer becomes a 502 in the caller's dialect.

package.path = "envoy/lua/?.lua;" .. package.path
local scan = require("json_scan")
local byte, sub = string.byte, string.sub

local AUTHZ = "envoy.filters.http.ext_authz"

-- Names and prefixes as {exact = {name = true}, prefixes = {...}}.
local function parse(list)
  local exact, prefixes = {}, {}
  for name in list:gmatch("[^,]+") do
    if sub(name, -1) == "*" then
      prefixes[#prefixes + 1] = sub(name, 1, -2)
    else
      exact[name] = true
    end
  end
  return { exact = exact, prefixes = prefixes }
end

-- Ollama lists "name:latest" what a client may call "name".
local function is_allowed(name, allowed)
  if allowed.exact[name] or allowed.exact[name:match("^(.*):latest$") or name] then return true end
  for _, prefix in ipairs(allowed.prefixes) do
    if sub(name, 1, #prefix) == prefix then return true end
  end
  return false
end

-- What a client would call the entry of a list that begins at i. Nil hides it.
local function entry_name(s, i)
  if byte(s, i) ~= 123 then return nil end
  local at = {}
  scan.object(s, i, function(key, from, to)
    at[key] = { from, to }
  end)
  local span = at.id or at.model or at.name
  return span and byte(s, span[1]) == 34 and scan.decode(sub(s, span[1] + 1, span[2] - 1)) or nil
end

-- The text of the array between open and close without what is not allowed. A comma goes with the
-- entry that it precedes, or with the first one.
local function kept(s, open, close, allowed)
  local out, first, last = {}, nil, nil
  local empty = true
  scan.array(s, open, function(from, to)
    first = first or from
    local name = entry_name(s, from)
    if name and is_allowed(name, allowed) then
      out[#out + 1] = empty and sub(s, from, to) or sub(s, last + 1, to)
      empty = false
    end
    last = to
  end)
  if not first then return sub(s, open, close) end
  return sub(s, open, first - 1) .. table.concat(out) .. sub(s, last + 1, close)
end

local function filtered(s, allowed)
  local out, from, lists = {}, 1, 0
  scan.whole(s, function(key, v, to)
    if key ~= "models" and key ~= "data" then return end
    lists = lists + 1
    if sub(s, v, to) == "null" then return end
    out[#out + 1] = sub(s, from, v - 1)
    out[#out + 1] = kept(s, v, to, allowed)
    from = to + 1
  end)
  if lists == 0 then error("no list", 0) end
  out[#out + 1] = sub(s, from)
  return table.concat(out)
end

local UNREADABLE = {
  ollama = '{"error":"the upstream\'s list of models cannot be read"}',
  openai = '{"error":{"message":"the upstream\'s list of models cannot be read","type":"server_error",'
    .. '"param":null,"code":"bad_upstream_answer"}}',
}

function envoy_on_response(handle)
  local authz = handle:streamInfo():dynamicMetadata():get(AUTHZ)
  if not authz or not authz.list_models then return end
  local headers = handle:headers()
  if not (headers:get(":status") or ""):find("^2") then return end
  local encoding = headers:get("content-encoding")
  local body = handle:body()
  if not body then return end
  local ok, s = false, nil
  if not encoding then
    ok, s = pcall(function()
      return filtered(body:getBytes(0, body:length()), parse(authz.list_models))
    end)
  end
  if ok then
    body:setBytes(s)
    return
  end
  headers = handle:headers() -- the one from before body() is out of scope
  headers:replace(":status", "502")
  headers:replace("content-type", "application/json")
  headers:remove("content-encoding")
  body:setBytes(UNREADABLE[authz.dialect] or UNREADABLE.openai)
end
