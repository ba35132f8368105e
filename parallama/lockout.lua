-- One more attempt, counted before anybody knows how it ends.
--
-- KEYS[1]  the count of attempts
-- KEYS[2]  is there while no attempt is let through
-- ARGV[1]  attempts without a wait between them
-- ARGV[2]  the first wait, and
-- ARGV[3]  the longest, in milliseconds
-- ARGV[4]  milliseconds after which the count begins anew
-- returns  milliseconds to wait, or 0; and the number of this attempt

local wait = redis.call('PTTL', KEYS[2])
if wait > 0 then return {wait, 0} end
local number = redis.call('INCR', KEYS[1])
if number == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
local beyond = number - tonumber(ARGV[1])
if beyond >= 0 then
  local pause = math.min(tonumber(ARGV[2]) * 2 ^ beyond, tonumber(ARGV[3]))
  redis.call('SET', KEYS[2], number, 'PX', string.format('%d', pause))
end
return {0, number}
