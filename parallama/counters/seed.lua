-- Tells buckets that do not exist what was spent before, by the usage rows.
--
-- KEYS[1]  open
-- KEYS[2]  known
-- KEYS[3]  counted
-- KEYS[4..] buckets
-- ARGV[1]  now, in seconds
-- ARGV[2]  since when the user was known before the rows were read
-- ARGV[3]  seconds for which a call stays known
-- then for each bucket: used, seconds to keep it; then the records of rows that are in those sums
-- and may be told of again
-- returns  1, or 0 if the buckets were lost since then

if call('GET', KEYS[2]) ~= ARGV[2] then return 0 end
for i = 4, #KEYS do
  local at = 2 * i - 4
  local there = call('HMGET', KEYS[i], 'used', 'reserved')
  if not there[1] and not there[2] then
    call('HSET', KEYS[i], 'used', math.min(tonumber(ARGV[at]), MOST))
    call('EXPIRE', KEYS[i], ARGV[at + 1])
  end
end

-- Who comes second has seen more rows than are in the buckets, and says nothing of them.
if tonumber(ARGV[1]) < tonumber(ARGV[2]) + STAYS and call('SISMEMBER', KEYS[3], '') == 0 then
  note_counted(KEYS[3], '')
  for i = 4 + 2 * (#KEYS - 3), #ARGV do
    call('SADD', KEYS[3], ARGV[i])
    local record = call('GET', ARGV[i])
    if record and read(record) == 'r' then
      call('SET', ARGV[i], 'd 0 -', 'EX', ARGV[3])
      call('ZREM', KEYS[1], ARGV[i])
    end
  end
end
return 1
