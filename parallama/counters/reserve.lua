-- Takes a place in every bucket of one user, or in none of them.
--
-- KEYS[1]  open
-- KEYS[2]  record of this call
-- KEYS[3]  known
-- KEYS[4..] buckets
-- ARGV[1]  now, in seconds
-- ARGV[2]  seconds until the lease ends; 0 to take nothing and only say what would come of it
-- ARGV[3]  seconds to keep the record
-- ARGV[4]  tokens wanted
-- ARGV[5]  fewest tokens that are of use; 0 where the call cannot be capped
-- ARGV[6]  facts, to keep with the record
-- then for each bucket: kind, limit, amount to hold, start of its window, seconds to keep it,
-- 1 if it refuses nothing
-- returns  1 if taken (now, or before under the same id), 0 if not, -1 if what was spent before
--          must be looked up first; tokens held; then for each bucket, as it is now: used,
--          reserved, 1 if it had no room

local now, lease = tonumber(ARGV[1]), tonumber(ARGV[2])
local wanted, least = tonumber(ARGV[4]), tonumber(ARGV[5])

local repeated, since = unpack(call('MGET', KEYS[2], KEYS[3]))
if repeated then
  local _, held = read(repeated)
  wanted = held
end

since = tonumber(since or math.huge)
local used, reserved, fresh = {}, {}, {}
local cold = false
for i = 4, #KEYS do
  local at = 6 * (i - 3)
  if ARGV[at + 1] == 'l' then
    call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now)
    used[i], reserved[i] = call('ZCARD', KEYS[i]), 0
  else
    local bucket = call('HMGET', KEYS[i], 'used', 'reserved')
    fresh[i] = not bucket[1] and not bucket[2]
    if fresh[i] and tonumber(ARGV[at + 4]) < since then cold = true end
    used[i], reserved[i] = tonumber(bucket[1] or 0), tonumber(bucket[2] or 0)
  end
end
if cold then return { -1, 0 } end

if least > 0 and not repeated then
  for i = 4, #KEYS do
    local at = 6 * (i - 3)
    if ARGV[at + 1] == 't' and ARGV[at + 6] ~= '1' then
      wanted = math.min(wanted, tonumber(ARGV[at + 2]) - used[i] - reserved[i])
    end
  end
  wanted = math.max(wanted, least)
end

local answer, room, full = { 1, wanted }, true, {}
for i = 4, #KEYS do
  local at = 6 * (i - 3)
  local kind, limit, amount = ARGV[at + 1], tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  if kind == 't' then amount = wanted end
  local taken = used[i] + reserved[i]
  full[i] = taken >= limit
  -- Alone, a call that cannot be capped may cross the limit. Beside another, it must fit.
  if kind ~= 'n' and kind ~= 'l' and taken + amount > limit and (least > 0 or reserved[i] > 0) then
    full[i] = true
  end
  if repeated then full[i] = false end
  if full[i] and ARGV[at + 6] ~= '1' then room = false end
  local out = 3 * (i - 3)
  answer[out], answer[out + 1], answer[out + 2] = used[i], reserved[i], full[i] and 1 or 0
end

if not room then answer[1] = 0 end
if repeated or lease == 0 then return answer end
-- What refuses, or what would have, had it not been in the shadow.
for i = 4, #KEYS do
  local at = 6 * (i - 3)
  if full[i] and (ARGV[at + 6] == '1') == room then
    if ARGV[at + 1] == 'l' then
      local key = KEYS[i] .. ':no_room'
      if call('INCR', key) == 1 then call('EXPIRE', key, NO_ROOM_KEPT) end
    else
      call('HINCRBY', KEYS[i], 'no_room', 1)
      if fresh[i] then call('EXPIRE', KEYS[i], ARGV[at + 5]) end
    end
  end
end
if not room then return answer end

local record = { 'o', wanted, '-' }
for i = 4, #KEYS do
  local at, out = 6 * (i - 3), 3 * (i - 3)
  local kind, amount, keep = ARGV[at + 1], ARGV[at + 3], tonumber(ARGV[at + 5])
  if kind == 'n' then
    answer[out] = call('HINCRBY', KEYS[i], 'used', amount)
  else
    if kind == 't' then amount = wanted end
    if kind == 'l' then
      call('ZADD', KEYS[i], now + lease, KEYS[2])
      answer[out] = used[i] + 1
    else
      answer[out + 1] = call('HINCRBY', KEYS[i], 'reserved', amount)
    end
    local n = #record
    record[n + 1], record[n + 2], record[n + 3], record[n + 4] = KEYS[i], kind, amount, now + keep
  end
  if fresh[i] or kind == 'l' then call('EXPIRE', KEYS[i], keep) end
end
call('ZADD', KEYS[1], now + lease, KEYS[2])
call('SET', KEYS[2], table.concat(record, ' ') .. '|' .. ARGV[6], 'EX', ARGV[3])
return answer
