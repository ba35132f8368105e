-- Request, after the rate limit: makes the one edit that facts.lua found, every other byte stays.

local NS = "parallama"

function envoy_on_request(handle)
  local facts = handle:streamInfo():dynamicMetadata():get(NS)
  if not facts or not facts.splice_at then return end
  local offset, replaced = facts.splice_at:match("^(%d+):(%d+)$")
  local body = handle:body()
  local s = body:getBytes(0, body:length())
  body:setBytes(s:sub(1, offset) .. facts.splice_text .. s:sub(offset + replaced + 1))
end
