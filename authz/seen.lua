-- Remembers what was asked once.
--
-- KEYS[1]  stands for what was signed
-- ARGV[1]  who asks now
-- ARGV[2]  seconds for which it could be asked again
-- returns  who asked first, nothing where that is now

local first = redis.call('GET', KEYS[1])
if not first then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2]) end
return first
