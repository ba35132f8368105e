-- Begins what is to be done only once, unless somebody has.
--
-- KEYS[1]  the place of this key of this caller
-- ARGV[1]  what to write there: "begun <digest of the request> <a number of its own>"
-- ARGV[2]  seconds to keep it
-- returns  what stands there now; it is ARGV[1] for whoever may begin

local kept = redis.call('GET', KEYS[1])
if kept then return kept end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return ARGV[1]
