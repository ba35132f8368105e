-- Reads buckets of one user and changes nothing.
--
-- KEYS[1]  known
-- KEYS[2..] buckets
-- ARGV[1]  now, in seconds
-- then for each bucket: kind, start of its window
-- returns  for each bucket: used, reserved, 0 if what was spent before must be looked up

local now = tonumber(ARGV[1])
local since = tonumber(call('GET', KEYS[1]) or math.huge)
local answer = {}
for i = 2, #KEYS do
  local kind, start, out = ARGV[2 * i - 2], tonumber(ARGV[2 * i - 1]), 3 * (i - 2)
  local used, reserved, known = 0, 0, 1
  if kind == 'l' then
    used = call('ZCOUNT', KEYS[i], '(' .. now, '+inf')
  else
    local bucket = call('HMGET', KEYS[i], 'used', 'reserved')
    if not bucket[1] and not bucket[2] and start < since then known = 0 end
    used, reserved = tonumber(bucket[1] or 0), tonumber(bucket[2] or 0)
  end
  answer[out + 1], answer[out + 2], answer[out + 3] = used, reserved, known
end
return answer
