-- An attempt that was counted turned out well, or was none.
--
-- KEYS[1]  the count of attempts
-- KEYS[2]  is there while no attempt is let through
-- ARGV[1]  the number of the attempt
-- ARGV[2]  1: all attempts are forgotten, 0: this one alone

if ARGV[2] == '1' then
  return redis.call('DEL', KEYS[1], KEYS[2])
end
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
if redis.call('EXISTS', KEYS[1]) == 1 and redis.call('DECR', KEYS[1]) < 1 then
  redis.call('DEL', KEYS[1])
end
return 0
