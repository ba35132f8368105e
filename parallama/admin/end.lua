-- Ends what was begun by begin.lua.
--
-- KEYS[1]  the place
-- ARGV[1]  what to keep there: "<digest of the request> <the answer>"; empty: nothing was done
-- ARGV[2]  seconds to keep it

if ARGV[1] == '' then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
end
