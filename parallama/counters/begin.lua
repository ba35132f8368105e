-- From now on everything that the user spends gets into the buckets, or is kept until they exist.
--
-- KEYS[1]  known
-- ARGV[1]  now, in seconds
-- ARGV[2]  seconds to remember that the user is known
-- returns  since when that is so

call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2], 'NX')
return call('GET', KEYS[1])
