-- How many calls are open beyond their lease. Changes nothing.
--
-- KEYS[1]  open
-- ARGV[1]  the latest end of a lease that is too long ago, in seconds

return call('ZCOUNT', KEYS[1], '-inf', ARGV[1])
