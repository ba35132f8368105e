-- Charges a call of which nothing is on record: it began without, or its record was lost.
--
-- KEYS[1]  open
-- KEYS[2]  record
-- KEYS[3]  known
-- KEYS[4]  counted
-- KEYS[5..] buckets
-- ARGV[1]  now, in seconds
-- ARGV[2]  seconds that its row may take
-- ARGV[3]  seconds for which the call stays known once it is done
-- ARGV[4]  1 if its row is stored: then compute and money are charged as well, and it is done
-- ARGV[5]  tokens used
-- ARGV[6]  facts, to keep with the record
-- then for each bucket: kind, amount, start of its window, seconds to keep it
-- returns  1 if charged, 0 if the call is known, -1 if what the user spent before must be looked up
--          first

local now, lease, stored = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[4] == '1'
local record = call('GET', KEYS[2])
if record and read(record) ~= 'r' then return 0 end
if not record and call('SISMEMBER', KEYS[4], KEYS[2]) == 1 then return 0 end
local since = tonumber(call('GET', KEYS[3]) or math.huge)

local over = {}
for i = 5, #KEYS do
  local start, keep = tonumber(ARGV[4 * i - 11]), tonumber(ARGV[4 * i - 10])
  local bucket = call('HMGET', KEYS[i], 'used', 'reserved')
  if not bucket[1] and not bucket[2] and start < since then
    if keep > lease then return -1 end
    over[i] = true
  end
end

local left, longest = {}, 0
for i = 5, #KEYS do
  local kind, amount = ARGV[4 * i - 13], tonumber(ARGV[4 * i - 12])
  local keep = tonumber(ARGV[4 * i - 10])
  longest = math.max(longest, keep)
  if not stored and (kind == 'c' or kind == 'm') then
    left[#left + 1] = string.format(' %s %s 0 %d', KEYS[i], kind, now + keep)
  elseif not over[i] then
    charge(KEYS[i], 0, amount, keep, false)
    if kind == 't' then
      left[#left + 1] = string.format(' %s T %s %d', KEYS[i], ARGV[5], now + keep)
    end
  end
end
if stored then
  call('ZREM', KEYS[1], KEYS[2])
  call('SET', KEYS[2], 'd 0 -', 'EX', ARGV[3])
  note_counted(KEYS[4], KEYS[2])
else
  call('ZADD', KEYS[1], now + lease, KEYS[2])
  local head = 's 0 ' .. ARGV[5] .. table.concat(left)
  call('SET', KEYS[2], head .. '|' .. ARGV[6], 'EX', math.max(longest, lease) + 3 * lease)
end
return 1
