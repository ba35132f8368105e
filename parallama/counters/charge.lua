-- Charges a call of which nothing is known any more, as if it had been taken just now.
--
-- KEYS[1]  record
-- KEYS[2]  known
-- KEYS[3..] buckets
-- ARGV[1]  seconds for which the call stays known
-- then for each bucket: amount, seconds to keep it
-- returns  1 if charged, 0 if the call is known, -2 if what the user spent before is not known

if call('EXISTS', KEYS[2]) == 0 then return -2 end
if not call('SET', KEYS[1], 'd 0 -', 'EX', ARGV[1], 'NX') then return 0 end
for i = 3, #KEYS do
  local amount, keep = tonumber(ARGV[2 * (i - 2)]), tonumber(ARGV[2 * (i - 2) + 1])
  charge(KEYS[i], 0, amount, keep, false)
end
return 1
