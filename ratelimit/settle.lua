-- Charges what a reservation really used, once, in the windows it was taken in. Never refuses.
--
-- KEYS[1]  open reservations: record key by the end of its lease
-- KEYS[2]  record of this reservation
-- ARGV[1]  now, in seconds
-- ARGV[2]  tokens used
-- ARGV[3]  seconds for which the settled reservation stays known
-- returns  1 if charged, 0 if it was settled before, -1 if nothing is known of it
--
-- The buckets that the record names are touched too: all keys of a user share one hash tag.

local call = redis.call
local now, used = tonumber(ARGV[1]), tonumber(ARGV[2])
local record = call('GET', KEYS[2])
if not record then return -1 end

local held, buckets = string.match(record, '^(%d+)(.*)$')
if buckets == '' then return 0 end

-- Not open any more: its lease ended, and what it held was given back then.
local open = call('ZREM', KEYS[1], KEYS[2]) == 1
for bucket, kept_until in string.gmatch(buckets, ' (%S+) (%d+)') do
  local keep = tonumber(kept_until) - now
  if keep > 0 then
    local reserved = call('HGET', bucket, 'reserved')
    call('HINCRBY', bucket, 'used', used)
    if not reserved then
      call('EXPIRE', bucket, keep)
    elseif open then
      call('HSET', bucket, 'reserved', math.max(tonumber(reserved) - tonumber(held), 0))
    end
  end
end
call('SET', KEYS[2], held, 'EX', ARGV[3])
return 1
