-- Tells buckets that do not exist what was spent before, by the usage rows.
--
-- KEYS[1]  known
-- KEYS[2..] buckets, then records of rows that are in those sums
-- ARGV[1]  now, in seconds
-- ARGV[2]  seconds to remember that the user is known
-- ARGV[3]  seconds for which those calls stay known
-- ARGV[4]  how many buckets there are
-- then for each bucket: used, seconds to keep it

call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2], 'NX')
local last = 1 + tonumber(ARGV[4])
for i = 2, #KEYS do
  if i > last then
    call('SET', KEYS[i], 'd 0 -', 'EX', ARGV[3], 'NX')
  elseif call('EXISTS', KEYS[i]) == 0 then
    call('HSET', KEYS[i], 'used', ARGV[2 * i + 1])
    call('EXPIRE', KEYS[i], ARGV[2 * i + 2])
  end
end
return 1
