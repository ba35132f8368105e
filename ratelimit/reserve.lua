-- Takes a place in every bucket of one user, or in none of them.
--
-- KEYS[1]      open reservations: record key by the end of its lease
-- KEYS[2]      record of this reservation
-- KEYS[3..]    buckets, those that count requests before those that count tokens
-- ARGV[1]      now, in seconds
-- ARGV[2]      tokens to hold
-- ARGV[3]      seconds until the lease ends
-- ARGV[4]      seconds to keep the record
-- ARGV[5]      how many buckets count requests
-- ARGV[6,8..]  limit of each bucket
-- ARGV[7,9..]  seconds to keep each bucket
-- returns      1 if taken (now, or before under the same id) else 0; tokens held; then for each
--              bucket, as it is now: used, reserved, 1 if it had no room
--
-- A bucket is a hash of `used` and `reserved`. A record is "<held> <bucket> <kept until> ...", and
-- only "<held>" when nothing is left to settle. Besides KEYS, the records and buckets of expired
-- reservations are touched: all keys of a user share one hash tag.

local DUE_AT_ONCE = 100
local call = redis.call

local now, held = tonumber(ARGV[1]), tonumber(ARGV[2])
local requests = tonumber(ARGV[5])

local due = call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, DUE_AT_ONCE)
for _, key in ipairs(due) do
  call('ZREM', KEYS[1], key)
  local record = call('GET', key) or '0'
  local amount = tonumber(string.match(record, '^%d+'))
  for bucket in string.gmatch(record, ' (%S+) %d+') do
    local reserved = tonumber(call('HGET', bucket, 'reserved') or 0)
    if reserved > 0 then
      call('HSET', bucket, 'reserved', math.max(reserved - amount, 0))
    end
  end
end

local known = call('GET', KEYS[2])
if known then held = tonumber(string.match(known, '^%d+')) end

local answer, room = {1, held}, true
for i = 3, #KEYS do
  local bucket = call('HMGET', KEYS[i], 'used', 'reserved')
  local used, reserved = tonumber(bucket[1] or 0), tonumber(bucket[2] or 0)
  local limit = tonumber(ARGV[2 * i])
  local full = used + reserved >= limit
  -- Alone, a request may cross the limit. Beside another, it must fit.
  if i - 2 > requests and reserved > 0 and used + reserved + held > limit then full = true end
  if known then full = false end
  if full then room = false end
  local at = 3 * (i - 2)
  answer[at], answer[at + 1], answer[at + 2] = used, reserved, full and 1 or 0
end

if known then return answer end
if not room then
  answer[1] = 0
  return answer
end

local record = {held}
for i = 3, #KEYS do
  local at, keep = 3 * (i - 2), tonumber(ARGV[2 * i + 1])
  local fresh = answer[at] == 0 and answer[at + 1] == 0
  if i - 2 <= requests then
    answer[at] = call('HINCRBY', KEYS[i], 'used', 1)
  else
    answer[at + 1] = call('HINCRBY', KEYS[i], 'reserved', held)
    record[#record + 1] = KEYS[i]
    record[#record + 1] = now + keep
  end
  if fresh then call('EXPIRE', KEYS[i], keep) end
end
if #KEYS - 2 > requests then
  call('ZADD', KEYS[1], now + tonumber(ARGV[3]), KEYS[2])
end
call('SET', KEYS[2], table.concat(record, ' '), 'EX', ARGV[4])
return answer
